"""Time until each file of a run is there, for a model of real size, and the share in which the GPU works.

    python benchmarks/real_size.py e2b --cache DIR --out benchmarks/results/real_size_e2b.json
    python benchmarks/real_size.py --config tiny/config.json --cache DIR --out tiny.json    on any machine

It needs 2 bytes a parameter of disk for the checkpoint, and 6 more for what the run writes; both are removed
unless `--keep` is given. The checkpoint has the text model's shape and random bfloat16 weights, so tame that logits of
neighbouring weights stay neighbours: rows of unit gain, and norms behind blocks of 0.15. It has the bundled tokenizer,
whose tokens are the first of a real vocabulary. Then `intaglio train` runs in a process of its own, and everything is
seen from outside:

    files      the second at which each file or folder of the run appears, and the first and last line of losses.jsonl
    verified   the second at which the run says that its files hold what was trained
    GPU        share of a second in which kernels ran, and memory in use, from nvidia-smi once a second
    host       resident memory of all the run's processes together, from /proc; anonymous: without pages of files

What the run prints is kept beside the result, each line with its second.
"""

from __future__ import annotations

import argparse
import json
import lzma
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import environment, write_result

from intaglio.packed.store import SafetensorsWriter, row_slices
from intaglio.plan.bundled import bundled_config, bundled_name
from intaglio.plan.family import TensorSpec, describe, text_config
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR, TRAIN_TEXT

SHARD_BYTES = 4 << 30
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
BYTES_A_TOKEN = 8  # more than the bundled tokenizer needs of its own text
WATCHED = ("packed", "model.gguf", "hf", "mobile", "stock", "stock.gguf", "stock-mobile", "fitted", "start")
VERIFIED = "holds what was trained"
MEMORY = {"VmRSS": "resident", "RssAnon": "anonymous"}


def make_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Write random weights of the model's shape, shard by shard, a few rows of a tensor at a time."""
    spec = describe(config)
    folder.mkdir(parents=True)
    generator = torch.Generator(device="cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    shards: list[list[TensorSpec]] = [[]]
    for tensor in spec.tensors:
        if shards[-1] and sum(2 * t.numel for t in (*shards[-1], tensor)) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    places = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        parts = {tensor.name: (torch.bfloat16, tensor.shape) for tensor in tensors}
        with SafetensorsWriter(folder / name, parts, {"format": "pt"}) as file:
            for tensor in tensors:
                for rows in row_slices(tensor.shape):
                    file.write(tensor.name, random_rows(tensor, rows, generator), rows)
                places[tensor.name] = name
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    (folder / "config.json").write_text(json.dumps(spec.config, indent=2), "utf-8")
    for name in TOKENIZER:
        shutil.copyfile(MODEL_DIR / name, folder / name)


def random_rows(tensor: TensorSpec, rows: slice | None, generator: torch.Generator) -> torch.Tensor:
    """Rows of a matrix with unit gain, of an embedding less; norms and scalars near one, or near 0.15 behind a block."""
    count = tensor.shape[0] if rows is None else rows.stop - rows.start
    noise = torch.randn(count, *tensor.shape[1:], generator=generator, device=generator.device)
    if len(tensor.shape) > 1:
        values = noise * tensor.shape[-1] ** -0.5 * (0.25 if "embedding" in tensor.role else 1.0)
    else:
        values = (1 + 0.1 * noise) * (0.15 if "post_" in tensor.name else 1.0)
    return values.to(torch.bfloat16)


def write_text(path: Path, source: Path, tokens: int) -> None:
    """Write as many documents as make so many tokens, from the beginning again where there are too few."""
    with lzma.open(source, "rt", encoding="utf-8") as packed:
        lines = packed.readlines()
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < BYTES_A_TOKEN * tokens:
            for line in lines:
                written += file.write(line)


@dataclass
class Watch:
    """A watch sees a run from outside; its times are seconds since the run began."""

    run_dir: Path
    process: subprocess.Popen[str]
    log: Path
    began: float
    seen: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    gpu: list[tuple[float, int, int]] = field(default_factory=list)  # seconds, busy percent, MiB
    peak_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MEMORY.values(), 0))

    def now(self) -> float:
        return round(time.monotonic() - self.began, 2)

    def until_end(self) -> int:
        """Look at files and memory four times a second until the run ends; its exit code."""
        threads = [threading.Thread(target=self.read_lines), threading.Thread(target=self.read_gpu, daemon=True)]
        for thread in threads:
            thread.start()
        while self.process.poll() is None:
            self.look()
            time.sleep(0.25)
        self.look()
        self.seen["end"] = self.now()
        threads[0].join()
        return self.process.returncode

    def read_lines(self) -> None:
        """Keep everything the run prints, with the second it was printed at, also of a run that is stopped."""
        assert self.process.stdout is not None
        with open(self.log, "w", encoding="utf-8") as file:
            for line in self.process.stdout:
                print(f"{self.now():9.2f}  {line.rstrip()}", file=file, flush=True)
                if VERIFIED in line:
                    self.seen["verified"] = self.now()

    def read_gpu(self) -> None:
        """nvidia-smi's figures of the GPU that the run sees, once a second, where there is one."""
        number = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        query = ["nvidia-smi", "-i", number, "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
        if shutil.which("nvidia-smi") is None:
            return
        with subprocess.Popen([*query, "-lms", "1000"], stdout=subprocess.PIPE, text=True) as smi:
            assert smi.stdout is not None
            for line in smi.stdout:
                if self.process.poll() is not None:
                    smi.kill()
                    return
                busy, used = (int(part) for part in line.split(","))
                self.gpu.append((self.now(), busy, used))

    def look(self) -> None:
        """Record the files that exist, the steps that are done, and the memory that the processes hold."""
        for name in (*WATCHED, "report.json"):
            if name not in self.seen and (self.run_dir / name).exists():
                self.seen[name] = self.now()
        log = self.run_dir / "losses.jsonl"
        done = log.read_bytes().count(b"\n") if log.is_file() else 0
        self.losses += [self.now()] * (done - len(self.losses))
        for name, used in memory_of(self.process.pid).items():
            self.peak_bytes[name] = max(self.peak_bytes[name], used)


def memory_of(pid: int) -> dict[str, int]:
    """Memory of a process and its children together, in bytes."""
    total = dict.fromkeys(MEMORY.values(), 0)
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in MEMORY:
                total[MEMORY[key]] += int(value.split()[0]) << 10
        children = [p for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    except (OSError, ProcessLookupError):  # it has just ended
        return total
    for child in children:
        for name, used in memory_of(int(child)).items():
            total[name] += used
    return total


def stages(watch: Watch, tokens_a_step: int) -> dict[str, Any]:
    """Seconds of each stage, with the share of its seconds in which the GPU was busy."""
    first, last = watch.losses[0], watch.losses[-1]
    verified, report = watch.seen["verified"], watch.seen["report.json"]
    bounds = {
        "command_to_first_step": (0.0, first),
        "first_to_last_step": (first, last),
        "last_step_to_files_verified": (last, verified),
        "files_verified_to_report": (verified, report),
        "command_to_report": (0.0, report),
    }
    rows: dict[str, Any] = {}
    for name, (start, stop) in bounds.items():
        busy = [percent for at, percent, _ in watch.gpu if start <= at <= stop]
        rows[name] = {
            "seconds": round(stop - start, 1),
            "gpu_busy_share": round(sum(percent > 0 for percent in busy) / len(busy), 3) if busy else None,
            "gpu_busy_percent": round(statistics.mean(busy), 1) if busy else None,
        }
    steps = len(watch.losses)
    rows["tokens_a_second"] = (
        round((steps - 1) * tokens_a_step / (last - first)) if steps > 1 and last > first else None
    )
    return rows


def command(options: argparse.Namespace, folder: Path) -> list[str]:
    """The run's command, without the interpreter."""
    schedule = {"tokens": options.tokens, "batch_size": options.batch, "sequence_length": options.length}
    settings = [f"--set=schedule.{key}={value}" for key, value in schedule.items()] + [
        f"--set={s}" for s in options.set
    ]
    flags = ["--gradient-checkpointing"] if options.gradient_checkpointing else []
    flags += [] if options.compile is None else ["--compile" if options.compile else "--no-compile"]
    text = [f"--data={folder / 'train.jsonl'}", f"--text={folder / 'heldout.jsonl'}"]
    what = [f"--recipe={options.recipe}", f"--eval-tokens={options.eval_tokens}", f"--references={options.references}"]
    return ["train", str(folder / "checkpoint"), f"--out={folder / 'run'}", *text, *what, *flags, *settings]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the command on the checkpoint in `folder`; the result's figures."""
    arguments, environ = command(options, folder), os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", "from intaglio.cli import main; main()", *arguments],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    watch = Watch(folder / "run", process, options.out.with_suffix(".log"), began)
    code = watch.until_end()
    result = {
        "exit_code": code,
        "seen_at_seconds": dict(sorted(watch.seen.items(), key=lambda item: item[1])),
        "steps": len(watch.losses),
        "peak_host_gb": {name: round(used / 1e9, 2) for name, used in watch.peak_bytes.items()},
        "peak_gpu_gb": round(max(used for *_, used in watch.gpu) * (1 << 20) / 1e9, 2) if watch.gpu else None,
    }
    if code == 0:
        report = json.loads((folder / "run" / "report.json").read_text("utf-8"))
        rows = [row for row in report["comparisons"] if row["kind"] != "original"]
        kl = {row["label"]: row["comparison"]["kl_mean_nats"] if row["comparison"] else row["failure"] for row in rows}
        result |= {"stages": stages(watch, options.batch * options.length), "kl_nats": kl, "notes": report["notes"]}
    return result


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="e2b", help="a bundled config: e2b, e4b, 12b, 31b")
    parser.add_argument("--config", type=Path, help="a config.json instead")
    parser.add_argument("--cache", type=Path, required=True, help="folder for checkpoint and run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="q4_0")
    parser.add_argument("--tokens", type=int, default=131072, help="of training")
    parser.add_argument("--eval-tokens", type=int, default=65536)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--references", default="all")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--set", action="append", default=[], help="of the recipe, as `intaglio train` takes it")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and run where they are")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Make the checkpoint, run, write the result; the run's exit code."""
    options = parse(arguments)
    name = bundled_name(options.model)
    config = json.loads(options.config.read_text("utf-8")) if options.config else bundled_config(str(name))
    config = text_config(config)
    folder = options.cache / "real-size"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:  # whose GPU memory ends with it
        child.submit(make_checkpoint, folder / "checkpoint", config).result()
    write_text(folder / "train.jsonl", TRAIN_TEXT, options.tokens)
    write_text(folder / "heldout.jsonl", HELDOUT_TEXT, options.eval_tokens)
    parameters = sum(tensor.numel for tensor in describe(config).tensors)
    print(f"{parameters / 1e9:.2f} B parameters made in {time.monotonic() - began:.0f} s", flush=True)
    try:
        result = measure(options, folder)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    settings = {key: value for key, value in vars(options).items() if key not in ("config", "cache", "out", "keep")}
    settings |= {"model": "config" if options.config else name, "parameters": parameters}
    write_result(options.out, {"settings": settings, **result, "gpu": gpu, "environment": environment()})
    print(
        json.dumps({key: result[key] for key in ("stages", "peak_host_gb", "peak_gpu_gb") if key in result}, indent=1)
    )
    return result["exit_code"]


if __name__ == "__main__":
    sys.exit(main())
