"""benchmarks/real_size.py at toy size: its checkpoint trains, its command is one of ours, and it sees a run's files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import intaglio
from tests.support.tiny import GEMMA4

CONFIG = GEMMA4 | {"vocab_size": 8192, "vocab_size_per_layer_input": 8192}
SETTINGS = ["--tokens=128", "--eval-tokens=256", "--batch=2", "--length=32", "--no-compile", "--references=none"]
# writes what a run writes, in its order, each after the watch has looked at all before it
RUN = """
import pathlib, sys, time
run, looks = map(pathlib.Path, sys.argv[1:])
def looked():
    enough = looks.stat().st_size + 2
    while looks.stat().st_size < enough:
        time.sleep(0.02)
run.mkdir()
for step in range(3):
    looked(); open(run / "losses.jsonl", "a").write("{}\\n")
(run / "packed").mkdir(); (run / "model.gguf").touch(); looked()
print("model.gguf: holds what was trained, 0 bits differ", flush=True); looked()
(run / "report.json").touch(); looked()
"""


@pytest.fixture
def real_size(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import real_size

    return real_size


def test_its_checkpoint_is_trained_by_its_command(real_size: Any, tmp_path: Path) -> None:
    options = real_size.parse([f"--cache={tmp_path}", f"--out={tmp_path / 'out.json'}", *SETTINGS])
    real_size.make_checkpoint(tmp_path / "checkpoint", CONFIG)
    real_size.write_text(tmp_path / "train.jsonl", real_size.TRAIN_TEXT, options.tokens)
    real_size.write_text(tmp_path / "heldout.jsonl", real_size.HELDOUT_TEXT, options.eval_tokens)
    outcome = intaglio(*real_size.command(options, tmp_path))
    assert outcome.code == 0, outcome.err
    assert real_size.VERIFIED in outcome.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert 0 < report["comparisons"][1]["comparison"]["kl_mean_nats"] < 1  # a chaotic model would be far beyond


def test_it_sees_each_stage_of_a_run(real_size: Any, tmp_path: Path) -> None:
    looks, began = tmp_path / "looks", time.monotonic()
    looks.touch()
    command = [sys.executable, "-c", RUN, str(tmp_path / "run"), str(looks)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    class Watch(real_size.Watch):
        """A watch that tells how often it has looked."""

        def look(self) -> None:
            super().look()
            looks.write_bytes(looks.read_bytes() + b".")

    watch = Watch(tmp_path / "run", process, tmp_path / "run.log", began)
    assert watch.until_end() == 0
    rows = real_size.stages(watch, tokens_a_step=64)
    assert len(watch.losses) == 3 and rows["tokens_a_second"] > 0
    parts = ("command_to_first_step", "first_to_last_step", "last_step_to_files_verified", "files_verified_to_report")
    seconds = [rows[name]["seconds"] for name in parts]
    assert min(seconds) > 0 and sum(seconds) == pytest.approx(rows["command_to_report"]["seconds"], abs=0.3)
    assert watch.seen["packed"] <= watch.seen["verified"] <= watch.seen["report.json"] <= watch.seen["end"]
    assert "holds what was trained" in (tmp_path / "run.log").read_text("utf-8")
    assert 1 << 20 < watch.peak_bytes["anonymous"] <= watch.peak_bytes["resident"]
