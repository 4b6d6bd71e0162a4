"""Differences between what llama.cpp and transformers compute from the same weights, and where they arise.

    python benchmarks/llamacpp_parity.py          # about 10 minutes on two cores

The bundled tiny Gemma 4 on recipe q4_0 (MSE fit, no training), exported to GGUF and compared over
held-out text in windows of 256 tokens. Every row is KL(reference || candidate), both from their own
runtime:

    decoded   transformers, float32, with the file's weights decoded to float32
    original  transformers, float32, with the weights as they were before quantization
    rounding  `decoded`, with the input of each quantized matrix rounded as llama.cpp rounds it
    q4_0      llama.cpp on the exported file
    f32       llama.cpp on the same weights in float32, which llama.cpp's own quantizer made from the
              Q4_0 file

What it shows. llama.cpp's CPU kernels multiply integers: in front of a Q4_0 matrix it rounds the
activations to 8 bits with one scale in 32 (Q8_0), in front of a Q6_K matrix, which is the head here,
with one scale in 256 (Q8_K). That is the runtime's arithmetic and in no file. So `q4_0` against
`decoded` is not zero although no weight differs by a bit; with the rounding gone (`f32`), or with it
on both sides (`rounding`), the two runtimes agree to the noise of float32 sums.

Is there a way to run the Q4_0 file itself without that rounding? Weight repacking
(`use_extra_bufts`) and the batch size only choose among kernels that all round the activations. A
llama.cpp built with a BLAS decodes the weights to float32 and multiplies in float32 where 32 or more
tokens come at once, which is any window here: build llama-cpp-python with
CMAKE_ARGS="-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS", run this script again, and row `q4_0` drops
to the level of row `f32`. The script says which build it found.

Last, the ids of every held-out document from llama.cpp's tokenizer and from transformers'.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import lzma
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import environment, write_result
from torch import Tensor, nn

from intaglio import export_gguf, load_model, load_tokenizer, make_plan, quantize, verify
from intaglio.measure.evaluate import Candidate, evaluate_many, transformers_runtime, transformers_source
from intaglio.measure.llamacpp import LlamaCpp
from intaglio.measure.simulate import decoded_model
from intaglio.plan.plan import Plan
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR
from intaglio.train.corpus import held_out_windows

LENGTH = 256
PAIRS = {"decoded": ("q4_0", "f32", "rounding"), "rounding": ("q4_0",), "original": ("q4_0", "f32", "decoded")}
GGML_TYPE_F32 = 0  # also the ftype LLAMA_FTYPE_ALL_F32


def write_f32(source: Path, target: Path) -> None:
    """llama.cpp's quantizer with float32 as its target: it decodes every block with its own code."""
    import llama_cpp.llama_cpp as lib

    params = lib.llama_model_quantize_default_params()
    params.ftype = params.token_embedding_type = params.output_tensor_type = GGML_TYPE_F32
    params.allow_requantize = params.pure = True
    status = lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    assert status == 0, f"llama_model_quantize failed with status {status}"


def built_with_blas() -> bool:
    import llama_cpp.llama_cpp as lib

    return b"BLAS = 1" in lib.llama_print_system_info()


def round_q8_0(x: Tensor) -> Tensor:
    """Activations as ggml's quantize_row_q8_0 leaves them: 8 bits, a float16 scale for each 32."""
    blocks = x.unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks * torch.where(step == 0, 0.0, 1 / step)).round()
    return (codes * step.half().float()).flatten(-2)


def round_q8_k(x: Tensor) -> Tensor:
    """The same for quantize_row_q8_K: a float32 scale for each 256; the extremum has code -127."""
    blocks = x.unflatten(-1, (-1, 256))
    extremum = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(extremum == 0, 0.0, -127 / extremum)
    codes = (blocks * inverse).round().clamp(max=127)
    return torch.where(inverse == 0, 0.0, codes / inverse).flatten(-2)


def with_rounded_activations(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` whose linears round their input as llama.cpp does for the planned type."""
    rounding = {"Q4_0": round_q8_0, "Q8_0": round_q8_0, "Q6_K": round_q8_k, "F16": lambda x: x.half().float()}
    model = copy.deepcopy(model)
    types = {tensor.name: tensor.grid.ggml_type for tensor in plan}
    types["lm_head.weight"] = types["model.embed_tokens.weight"]  # tied
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            rule = rounding[types[f"{name}.weight"]]
            module.forward = lambda x, rule=rule, module=module: F.linear(rule(x), module.weight, module.bias)
    return model


def compare(windows: int, folder: Path) -> dict[str, Any]:
    packed = quantize(MODEL_DIR, make_plan(MODEL_DIR, "q4_0"), folder / "packed")
    export_gguf(packed, folder / "q4_0.gguf")
    tokenizer, original = load_tokenizer(MODEL_DIR), load_model(MODEL_DIR)
    held_out = held_out_windows(HELDOUT_TEXT, tokenizer, length=LENGTH, vocab_size=original.config.vocab_size)
    windows_NT = torch.from_numpy(held_out[:: len(held_out) // windows][:windows]).long()
    decoded = decoded_model(original, packed)
    rounding = with_rounded_activations(decoded, packed.plan)
    models = {"original": original, "decoded": decoded, "rounding": rounding}
    logits = {name: list(map(transformers_source(model), windows_NT)) for name, model in models.items()}
    runtimes = dict.fromkeys(models, transformers_runtime())
    tokenization = compare_tokens(folder / "q4_0.gguf", tokenizer)
    with LlamaCpp(folder / "q4_0.gguf") as llama:
        logits["q4_0"] = list(map(llama.logits, windows_NT))
        write_f32(folder / "q4_0.gguf", folder / "f32.gguf")
        runtimes |= dict.fromkeys(("q4_0", "f32"), llama.version)
    with LlamaCpp(folder / "f32.gguf") as llama:
        logits["f32"] = list(map(llama.logits, windows_NT))
    rows = [
        {"reference": reference, "candidate": name, **result.to_dict()}
        for reference, names in PAIRS.items()
        for name, result in evaluate_many(
            logits[reference],
            {n: Candidate(source=logits[n], runtime=runtimes[n], simulated=n in models) for n in names},
            windows_NT,
        ).items()
    ]
    return {"verification": verify(packed, folder / "q4_0.gguf").summary(), "rows": rows, "tokenization": tokenization}


def show(row: dict[str, Any]) -> None:
    print(
        f"KL({row['reference']:8} || {row['candidate']:8}) {row['kl_mean_nats']:.3e} ± {row['kl_mean_ci_nats']:.1e}   "
        f"99% {row['kl_99_nats']:.2e}   same top {row['same_top_share']:.3%}   "
        f"perplexity ratio {row['perplexity_ratio']:.6f}   {row['tokens']} tokens",
        flush=True,
    )


def compare_tokens(gguf: Path, tokenizer: Any) -> dict[str, int]:
    import llama_cpp

    llama = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
    with lzma.open(HELDOUT_TEXT, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    ids_of = tokenizer(texts, verbose=False)["input_ids"]
    differing = sum(llama.tokenize(text.encode(), special=True) != ids for text, ids in zip(texts, ids_of, strict=True))
    return {"documents": len(texts), "tokens": sum(map(len, ids_of)), "differing_documents": differing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=96, help="held-out windows, of which 255 tokens each are scored")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "llamacpp_parity.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = compare(arguments.windows, Path(folder))
    for row in result["rows"]:
        show(row)
    print(result["verification"])
    print(
        "tokenization: {differing_documents} of {documents} documents differ, {tokens} tokens".format(
            **result["tokenization"]
        )
    )
    print(f"llama.cpp built with BLAS: {built_with_blas()}")
    settings = {"blas": built_with_blas(), "environment": environment("llama-cpp-python")}
    write_result(arguments.out, settings | result)


if __name__ == "__main__":
    main()
