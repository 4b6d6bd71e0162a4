"""The speed of `inspect` on a bfloat16 checkpoint, and whether it mistakes latent weights for trained ones.

    python benchmarks/inspect_speed.py --cache DIR             # speed: 2 GB of weights on grids, 2 GB latent
    python benchmarks/inspect_speed.py --latent 10000000       # false accepts among that many latent blocks

Speed uses a folder of random weights in the shapes of E2B's linears, put on grids with bfloat16 scales: a quarter each on
extremum / -8, absmax / 8, absmax / 7 and a free scale. It also uses the same weights without a grid. The file is read once
before, so that the disk does not count. MB/s count bfloat16 weights, on all cores.

Latent uses blocks of 32 normal, Laplace and Student t (4 degrees of freedom) numbers in bfloat16, float16 and float32. Each
is tried with every grid of blocks and every guess of the extremum's code, on one thread. A block counts as accepted if any
guess explains it.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from common import environment, write_result

from intaglio.numerics.identify import BLOCK_RULE
from intaglio.numerics.recover import Rule, recover
from intaglio.packed.store import SafetensorsWriter
from intaglio.sources.inspect import inspect

SHAPES = ((6144, 1536), (1536, 6144), (2048, 1536), (1536, 2048))
GIGABYTES = 2
CHUNK_BLOCKS = 1 << 13
UNSIGNED = Rule(code_min=-8, code_max=7, peaks=BLOCK_RULE.peaks)


def on_grid(values: torch.Tensor, kind: str) -> torch.Tensor:
    blocks = values.reshape(-1, 32)
    peak = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    ratio = 0.85 + 0.2 * torch.rand(len(blocks), 1)
    scale = {
        "extremum-8": peak / -8,
        "absmax-8": peak.abs() / 8,
        "absmax-7": peak.abs() / 7,
        "free": peak.abs() / 8 * ratio,
    }[kind]
    scale = scale.bfloat16().float()
    return ((blocks / scale).round().clamp(-7 if kind == "absmax-7" else -8, 7) * scale).reshape(values.shape)


def make_folder(folder: Path, trained: bool) -> int:
    """Write the weights; their bytes."""
    folder.mkdir(parents=True)
    count = max(1, int(GIGABYTES * 1e9 / sum(2 * rows * columns for rows, columns in SHAPES)))
    specs = {f"layers.{i}.{j}.weight": (torch.bfloat16, s) for i in range(count) for j, s in enumerate(SHAPES)}
    kinds = ("extremum-8", "absmax-8", "absmax-7", "free")
    with SafetensorsWriter(folder / "model.safetensors", specs, {"format": "pt"}) as writer:
        for number, (name, (_, shape)) in enumerate(specs.items()):
            values = torch.randn(shape) * 0.02
            writer.write(name, (on_grid(values, kinds[number % 4]) if trained else values).bfloat16())
    return sum(2 * shape[0] * shape[1] for _, shape in specs.values())


def measure_speed(cache: Path) -> dict[str, Any]:
    rows = {}
    for name, trained in (("on grids", True), ("latent", False)):
        folder = cache / "inspect-speed"
        shutil.rmtree(folder, ignore_errors=True)
        size = make_folder(folder, trained)
        (folder / "model.safetensors").read_bytes()
        began = time.perf_counter()
        found = inspect(folder)
        seconds = time.perf_counter() - began
        right = {v.grid for v in found.verdicts} == (
            {"extremum-8", "absmax-8", "absmax-7", "free"} if trained else {"latent"}
        )
        rows[name] = {"bytes": size, "seconds": seconds, "mb_per_second": size / seconds / 1e6, "all_right": right}
        print(
            f"{name:10} {size / 1e9:.2f} GB in {seconds:.1f} s: {size / seconds / 1e6:.0f} MB/s, right: {right}",
            flush=True,
        )
        shutil.rmtree(folder)
    return rows


def count_false_accepts(blocks: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    draw = {
        "normal": lambda n: torch.randn(n, 32),
        "laplace": lambda n: torch.distributions.Laplace(0.0, 1.0).sample((n, 32)),
        "student t": lambda n: torch.distributions.StudentT(4.0).sample((n, 32)),
    }
    rows: dict[str, Any] = {}
    kinds = [(dist, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32) for dist in draw]
    each = -(-blocks // len(kinds))
    for dist, dtype in kinds:
        accepted = done = 0
        while done < each:
            count = min(CHUNK_BLOCKS, each - done)
            values = (draw[dist](count) * 0.02).to(dtype)
            for rule in (BLOCK_RULE, UNSIGNED):
                accepted += int(recover(values, rule).exact.sum())
            done += count
        rows[f"{dist}, {str(dtype).removeprefix('torch.')}"] = {"blocks": done, "accepted": accepted}
        print(dist, dtype, done, accepted, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="for the checkpoints whose speed is measured")
    parser.add_argument("--latent", type=int, default=0, help="latent blocks to ask")
    parser.add_argument("--out", type=Path, help="default: results/inspect_speed.json or results/inspect_latent.json")
    arguments = parser.parse_args()
    results = Path(__file__).parent / "results"
    if arguments.latent:
        rows = count_false_accepts(arguments.latent)
        write_result(arguments.out or results / "inspect_latent.json", {"environment": environment(), "rows": rows})
    if arguments.cache is not None:
        rows = measure_speed(arguments.cache)
        write_result(arguments.out or results / "inspect_speed.json", {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
