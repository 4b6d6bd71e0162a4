"""A run's folder as a training leaves it part way, without training."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from intaglio.packed.outputs import started_at
from intaglio.plan.recipe import Recipe

TOTAL, STEP_TOKENS, TAIL = 40, 64, 30


def step_rows(step: int, **speed: float) -> tuple[str, str]:
    """The lines of losses.jsonl and speed.jsonl of a step, which took half a second."""
    row: dict[str, float] = {"step": step, "tokens": step * STEP_TOKENS, "loss": 1 / (step + 1), "lr": 1e-4}
    row |= {"codes_changed": 0.001 * step, "codes_moved": 0.0005}
    if step % 4 == 1:
        row["held_out_loss"] = 1.5 / (step + 1)
    machine = {"step": step, "time": 1.8e9 + step / 2, "tokens_per_s": 2.0 * STEP_TOKENS, "host_bytes": 3 << 30}
    return json.dumps(row) + "\n", json.dumps(machine | speed) + "\n"


def add_step(folder: Path, step: int, **speed: float) -> None:
    for name, line in zip(("losses.jsonl", "speed.jsonl"), step_rows(step, **speed), strict=True):
        with open(folder / name, "a") as file:
            file.write(line)


def make_run(folder: Path, steps: int, *, loss: str = "kl", log: str = "Training", **speed: float) -> Path:
    """A run of TOTAL steps that has done some of them."""
    folder.mkdir(parents=True, exist_ok=True)
    schedule = {"tokens": TOTAL * STEP_TOKENS, "batch_size": 4, "sequence_length": 16, "frozen_tail": 1 - TAIL / TOTAL}
    recipe = Recipe.load("q4_0").with_schedule(**schedule, loss=loss)
    (folder / "run.json").write_text(json.dumps({"plan": "0" * 64, "recipe": recipe.to_toml()}))
    for step in range(1, steps + 1):
        add_step(folder, step, **speed)
    (folder / "run.log").write_text(f"2026-11-30 12:00:00 process 7: intaglio train\n2026-11-30 12:00:05 {log}\n")
    return folder


def hold(folder: Path, pid: int | None = None) -> None:
    """Sign the lock for a process, by default this one, which lives."""
    pid = os.getpid() if pid is None else pid
    said = {"host": socket.gethostname(), "pid": pid, "start": started_at(pid), "command": ["intaglio"], "since": "now"}
    (folder / "run.lock").write_text(json.dumps(said))
