"""Time, memory and sizes of packing and exporting a full-size drafter, and whether every code comes back.

    python benchmarks/drafter_full_size.py e2b --cache DIR

It takes 0.6 GB in DIR for E2B and E4B and 3 GB for the others, which are freed afterwards, and minutes on two cores.

The checkpoint is random, in bfloat16. Where the head is clustered, the order of tokens is random too. The bundled tokenizer
knows fewer tokens than the model. Then these commands run, each in a process of its own:

    intaglio quantize DRAFTER --recipe q4_0
    intaglio export PACKED gguf
    intaglio export PACKED hf           both are read back, bit by bit

Peak memory is the operating system's count (ru_maxrss; pages of mapped files included).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from common import environment, write_result
from export_speed import run
from mobile_full_size import write_random

from intaglio.formats.checkpoint.write import hf_tensors
from intaglio.packed.store import SafetensorsWriter
from intaglio.plan.bundled import DRAFTER, MODELS, bundled_config
from intaglio.plan.family import describe
from intaglio.plan.plan import make_plan
from intaglio.sizing.sizes import gguf_size, safetensors_size
from intaglio.tiny import MODEL_DIR

RECIPE = "q4_0"


def make_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(MODEL_DIR / name, folder / name)
    tensors = sorted(describe(config).tensors, key=lambda tensor: tensor.role != "token_ordering")  # int64 first
    specs = {t.name: (torch.int64 if t.role == "token_ordering" else torch.bfloat16, t.shape) for t in tensors}
    generator = torch.Generator().manual_seed(0)
    with SafetensorsWriter(folder / "model.safetensors", specs, {"format": "pt"}) as writer:
        for name, (dtype, shape) in specs.items():
            if dtype == torch.int64:
                writer.write(name, torch.randperm(shape[0], generator=generator))
            else:
                write_random(writer, name, shape, generator)


def measure(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    cli = [sys.executable, "-c", "from intaglio.cli import main; main()"]
    packed, gguf, hf = folder / "packed", folder / "model.gguf", folder / "hf"
    rows: dict[str, Any] = {"checkpoint_bytes": (folder / "model/model.safetensors").stat().st_size}
    for name, arguments in (
        ("quantize", ["quantize", folder / "model", "--recipe", RECIPE, "--out", packed]),
        ("export gguf", ["export", packed, "gguf", "--out", gguf]),
        ("export hf", ["export", packed, "hf", "--out", hf]),
    ):
        usage = run([*cli, *arguments])
        rows[name] = usage._asdict()
        print(f"{name:12} {usage.seconds:7.1f} s  peak {usage.peak_bytes / 1e9:.2f} GB", flush=True)
    plan = make_plan(config, RECIPE)
    rows["gguf_bytes"], rows["hf_bytes"] = gguf.stat().st_size, (hf / "model.safetensors").stat().st_size
    rows["hf_predicted_bytes"], rows["gguf_predicted_data_bytes"] = (
        safetensors_size(hf_tensors(plan)).total,
        gguf_size(plan).data,
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=[name.removeprefix("gemma-4-") for name in MODELS])
    parser.add_argument("--cache", type=Path, required=True, help="for the checkpoint and what is made of it")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "drafter_full_size.json")
    arguments = parser.parse_args()
    config = bundled_config(f"gemma-4-{arguments.size}{DRAFTER}")
    folder = arguments.cache / f"drafter-{arguments.size}"
    shutil.rmtree(folder, ignore_errors=True)
    # a child counts the memory that its parent had at the fork as its own peak: keep this process small
    builder = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(folder / "model", config))
    builder.start()
    builder.join()
    try:
        row = measure(folder, config)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results = json.loads(arguments.out.read_text("utf-8")) if arguments.out.is_file() else {"models": {}}
    write_result(arguments.out, {"environment": environment(), "models": results["models"] | {arguments.size: row}})
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
