"""Ranks that do not exist: the plan's memory for eight GPUs is what the trainer's own code allocates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from intaglio.tiny import MODEL_DIR

SCRIPT = Path(__file__).parents[2] / "benchmarks/simulate_ranks.py"


def test_the_plan_is_within_a_tenth_of_eight_simulated_ranks(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), f"{MODEL_DIR}:4:512", "--gpus", "8", "--out", str(tmp_path / "found.json")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = json.loads((tmp_path / "found.json").read_text())["rows"][0]["found_and_planned"]
    assert rows["total"][1] == pytest.approx(rows["total"][0], rel=0.1)
    for name in ("teacher", "student", "masters", "scales", "optimizer"):
        assert rows[name][1] == pytest.approx(rows[name][0], rel=0.01), name
