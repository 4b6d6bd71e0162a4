"""Differences between vLLM on a CPU and the training forward, and their causes.

    make test-runtimes                          # the runtimes' environments, once
    python benchmarks/vllm_parity.py --out DIR  # DIR: as for runtimes.py, with the trained model in DIR/q4_0

Pairs of runs of the bundled model over held-out text. W4A16 (recipe q4_0): vLLM on codes and vLLM on decoded weights, in
bfloat16, float16 and float32, against transformers in float32 and in bfloat16; vLLM's kernel alone, in 16 bits, against
exact sums. mobile-ct (recipe mobile with scales of eight bits, not trained): vLLM with decoded 2- and 8-bit weights in
place of GPU kernels, against the training forward with the scales of the file and with those that vLLM uses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import environment, write_result
from runners.start import HERE, agreement, python_of, start
from runners.vllm_scales import fuse_scales
from transformers import AutoModelForCausalLM

from intaglio.formats.table import EXPORTERS
from intaglio.measure.evaluate import logits_of
from intaglio.measure.simulate import decoded_model
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import load_model
from intaglio.packed.model import PackedModel
from intaglio.plan.recipe import Recipe
from intaglio.runs.demo import run_demo
from intaglio.runs.proof import Evaluation
from intaglio.runs.quantize import quantize_model
from intaglio.runs.texts import read_windows
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR
from intaglio.train.static import switch_static

RESULT = Path(__file__).parent / "results" / "vllm_parity.json"
MOBILE = ["channel_scales=bf16", "schedule.calibration_tokens=8192", "schedule.sequence_length=256"]
FOUR_BITS = [f"weights.{rule}.grid=int4" for rule in ("mlp_late", "ple_linear")]
FOUR_BITS += [f"weights.{rule}.grid=bf16" for rule in ("token_embedding", "head", "ple_embedding")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the trained model is, or goes")
    parser.add_argument("--windows", type=int, default=4, help="of 256 held-out tokens")
    args = parser.parse_args()
    evaluation = Evaluation(text=HELDOUT_TEXT, tokens=args.windows * 256)
    ids_NT = read_windows(evaluation, load_model(MODEL_DIR).config.vocab_size, load_tokenizer(MODEL_DIR))
    if not (args.out / "q4_0" / "packed").is_dir():
        run_demo(args.out / "q4_0", recipe="q4_0")
    with TemporaryDirectory() as folder:
        result = {
            "environment": environment(),
            "tokens": int(ids_NT[:, 1:].size),
            "w4a16": _w4a16(PackedModel.open(args.out / "q4_0" / "packed"), ids_NT, Path(folder)),
            "kernel": json.loads(
                subprocess.check_output([python_of("vllm"), HERE / "vllm_kernel.py"]).splitlines()[-1]
            ),
            "mobile": _mobile([], ids_NT[:, :64], Path(folder) / "mobile"),
            "mobile, four bits": _mobile(FOUR_BITS, ids_NT[:, :64], Path(folder) / "four"),
        }
    write_result(RESULT, result)


def _w4a16(packed: PackedModel, ids_NT: np.ndarray, folder: Path) -> dict[str, Any]:
    runs = {"transformers, float32": _forward(decoded_model(load_model(MODEL_DIR), packed), ids_NT)}
    for name in ("hf", "vllm"):
        EXPORTERS[name](packed, folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.bfloat16).eval()
    runs["transformers, bfloat16"] = _forward(model, ids_NT)
    for dtype in ("float32", "bfloat16", "float16"):
        runs[f"vLLM on decoded weights, {dtype}"] = _vllm("vllm", folder / "hf", ids_NT, dtype)
        if dtype != "float32":  # which the kernel does not have
            runs[f"vLLM on codes, {dtype}"] = _vllm("vllm", folder / "vllm", ids_NT, dtype)
    return _pairs(runs, ids_NT)


def _mobile(rules: list[str], ids_NT: np.ndarray, folder: Path) -> dict[str, Any]:
    recipe = Recipe.load("mobile", MOBILE + rules)
    packed, _ = quantize_model(MODEL_DIR, recipe, folder / "packed", data=HELDOUT_TEXT)
    EXPORTERS["vllm"](packed, folder / "vllm")
    model = decoded_model(load_model(MODEL_DIR), packed)
    switch_static(model, activations=True, kv_cache=False)
    runs = {"training forward": _forward(model, ids_NT)}
    changed = fuse_scales(model, packed)
    runs["training forward, vLLM's scales"] = _forward(model, ids_NT)
    runs["the same in float64"] = _forward(model.double(), ids_NT)
    runs["vLLM, decoded weights, float32"] = _vllm("vllm_decoded", folder / "vllm", ids_NT, "float32")
    runs["vLLM, decoded weights, bfloat16"] = _vllm("vllm_decoded", folder / "vllm", ids_NT, "bfloat16")
    if rules:
        runs["vLLM, its kernel, bfloat16"] = _vllm("vllm", folder / "vllm", ids_NT, "bfloat16")
    return {"scales_changed": changed, **_pairs(runs, ids_NT)}


def _forward(model: Any, ids_NT: np.ndarray) -> np.ndarray:
    return np.stack([logits[:-1].float().numpy() for logits in logits_of(model, torch.from_numpy(ids_NT).long())])


def _vllm(runner: str, artifact: Path, ids_NT: np.ndarray, dtype: str) -> np.ndarray:
    os.environ["INTAGLIO_VLLM_DTYPE"] = dtype
    os.environ["VLLM_DISABLED_KERNELS"] = "CPUWNA16LinearKernel" if runner == "vllm_decoded" else ""
    return start(runner, "vllm", artifact, ids_NT, ids_NT[:1, :16], artifact.parent / "run", new_tokens=2).logits


def _pairs(runs: dict[str, np.ndarray], ids_NT: np.ndarray) -> dict[str, Any]:
    found = {}
    for one, other in combinations(runs, 2):
        found[f"{one} | {other}"] = pair = asdict(agreement(runs[one], runs[other], ids_NT))
        print(f"{one} | {other}: {pair}", flush=True)
    return found


if __name__ == "__main__":
    main()
