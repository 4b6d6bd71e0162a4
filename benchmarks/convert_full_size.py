"""Time and memory of `inspect` and `convert` for a QAT checkpoint of E2B's shape.

    python benchmarks/convert_full_size.py --cache DIR

It takes 18 GB in DIR, which are freed afterwards. The checkpoint is random, in bfloat16, in several files, with towers.
Linears of the text model lie on blocks of 32 by absmax / 7 with bfloat16 scales. Everything else is latent. Each command is
a process of its own. Peak memory is the operating system's count (ru_maxrss; pages of mapped files included).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
from pathlib import Path

import torch
from common import environment, write_result
from export_speed import run
from inspect_speed import on_grid
from mobile_full_size import CHUNK, make_checkpoint

from intaglio.packed.checkpoint import tensor_files
from intaglio.packed.store import SafetensorsReader, SafetensorsWriter, headers

LINEARS = ("_proj.weight", "per_layer_input_gate.weight", "per_layer_projection.weight")


def put_linears_on_grid(folder: Path) -> None:
    """Write each file of the checkpoint anew, with the text model's linears on their grid."""
    for file in dict.fromkeys(tensor_files(folder).values()):
        found = headers(file)
        specs = {name: (torch.bfloat16, shape) for name, (_, shape) in found.items()}
        fresh = file.with_suffix(".new")
        with SafetensorsReader(file) as reader, SafetensorsWriter(fresh, specs, {"format": "pt"}) as writer:
            for name, (_, shape) in found.items():
                trained = "language_model.layers" in name and name.endswith(LINEARS)
                step = max(1, CHUNK // shape[1]) if len(shape) == 2 else 0
                pieces = [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)] if step else [None]
                for rows in pieces:
                    values = reader.read(name, rows)
                    writer.write(name, on_grid(values.float(), "absmax-7").bfloat16() if trained else values, rows)
        fresh.replace(file)


def build(folder: Path, size: str) -> None:
    make_checkpoint(folder, size)
    put_linears_on_grid(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="for the checkpoint and what is made of it")
    parser.add_argument("--size", choices=("E2B", "E4B"), default="E2B")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "convert_full_size.json")
    arguments = parser.parse_args()
    folder = arguments.cache / f"convert-{arguments.size}"
    shutil.rmtree(folder, ignore_errors=True)
    # a child counts the memory that its parent had at the fork as its own peak: keep this process small
    builder = multiprocessing.get_context("spawn").Process(target=build, args=(folder / "model", arguments.size))
    builder.start()
    builder.join()
    cli = [sys.executable, "-c", "from intaglio.cli import main; main()"]
    commands = {
        "inspect": [*cli, "inspect", folder / "model"],
        "convert": [*cli, "convert", folder / "model", "--text-only", "--out", folder / "packed"],
        "export": [*cli, "export", folder / "packed", "gguf", "--out", folder / "model.gguf"],
    }
    rows = {}
    try:
        size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        print(f"checkpoint: {size / 1e9:.2f} GB", flush=True)
        for name, command in commands.items():
            usage = run(command)
            rows[name] = usage._asdict()
            print(f"{name:8} {usage.seconds:7.1f} s  peak {usage.peak_bytes / 1e9:.2f} GB", flush=True)
    finally:
        shutil.rmtree(folder)
    result = json.loads(arguments.out.read_text("utf-8")) if arguments.out.is_file() else {}
    result |= {"environment": environment(), arguments.size: {"checkpoint_bytes": size, "commands": rows}}
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
