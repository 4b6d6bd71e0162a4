"""llama.cpp's own quantizer, with and without an importance matrix: from a float32 GGUF of the original.

    python llama.py MODEL WORK OUT TYPE [imatrix]        TYPE is Q4_0, Q4_K_M, Q5_K_M or Q2_K

The importance matrix is the mean square of each linear's inputs over the calibration text, by its published
definition (llama.cpp, tools/imatrix); it is summed up here, in transformers, and handed to `llama_model_quantize`.
Embeddings are in Q6_K or what the type's own rule says, norms and the projection to per-layer inputs in float32.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from pathlib import Path

import llama_cpp.llama_cpp as lib
import torch
from artifact import Making, linears

from intaglio import Recipe, export_gguf, make_plan, quantize
from intaglio.formats.gguf.names import gguf_name

FLOATS = ("linear", "ple_linear", "token_embedding", "ple_embedding", "ple_model_projection")
TYPES = {
    "F32": lib.LLAMA_FTYPE_ALL_F32,
    "Q4_0": lib.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": lib.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q5_K_M": lib.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q2_K": lib.LLAMA_FTYPE_MOSTLY_Q2_K,
}


def write_floats(model: Path, target: Path) -> None:
    """A float32 GGUF of a transformers folder."""
    recipe = Recipe.load("q4_0", [f"weights.{rule}.grid=f32" for rule in FLOATS])
    with tempfile.TemporaryDirectory() as folder:
        export_gguf(quantize(model, make_plan(model, recipe), Path(folder) / "packed"), target, replace=True)


@torch.no_grad()
def importance(making: Making) -> tuple[dict[str, torch.Tensor], float]:
    """Mean square of each input column, float32, by llama.cpp's name of the weight; and CPU seconds that it took.

    It is kept in WORK, for the next type.
    """
    kept = making.work / "importance.pt"
    if kept.is_file():
        found: tuple[dict[str, torch.Tensor], float] = torch.load(kept)
        return found
    model, text_NT = making.load(), making.calibration()
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0) + x.flatten(0, -2).square().sum(0).cpu()

    for name, module in linears(model).items():
        named = gguf_name(f"{name}.weight")
        module.register_forward_pre_hook(lambda _, x, named=named: add(named, x[0]))
    for rows in text_NT.split(8):
        model(input_ids=rows.to(model.device), use_cache=False)
    means = {name: (total / text_NT.numel()).contiguous() for name, total in sums.items()}
    torch.save((means, time.process_time() - making.began), kept)
    return means, time.process_time() - making.began


def llama_quantize(source: Path, target: Path, kind: str, matrix: dict[str, torch.Tensor] | None = None) -> None:
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = TYPES[kind], torch.get_num_threads(), kind == "F32"
    if kind == "F32":
        params.pure, params.token_embedding_type, params.output_tensor_type = True, lib.GGML_TYPE_F32, lib.GGML_TYPE_F32
    if matrix is not None:
        entries = (lib.llama_model_imatrix_data * (len(matrix) + 1))()  # one of zeros ends the list
        for entry, (name, values) in zip(entries, matrix.items(), strict=False):
            entry.name, entry.size = name.encode(), values.numel()
            entry.data = ctypes.cast(values.data_ptr(), ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    status = lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    assert status == 0, f"llama_model_quantize failed with status {status}"


def main() -> None:
    making = Making()
    kind, with_matrix = making.options[0], making.options[1:] == ["imatrix"]
    floats = making.out / "floats.gguf"
    write_floats(making.model_dir, floats)
    matrix, seconds = importance(making) if with_matrix else (None, 0.0)
    making.start()
    llama_quantize(floats, making.out / "model.gguf", kind, matrix)
    making.stop()
    making.record["cpu_seconds"] = round(making.record["cpu_seconds"] + seconds, 1)
    floats.unlink()
    tokens = making.calibration().numel() if with_matrix else 0
    making.finish("llama-cpp-python", calibration_tokens=tokens, training_tokens=0)


if __name__ == "__main__":
    main()
