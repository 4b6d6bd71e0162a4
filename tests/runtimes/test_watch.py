"""A training that is watched in Chromium from its second step to its end, and until the server is stopped."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.runners.start import ENVIRONMENTS
from tests.support.browser import chromium
from tests.support.cases import Case
from tests.support.cli import started

pytestmark = pytest.mark.environment

MODULES = ENVIRONMENTS / "transformersjs" / "node_modules"
SHORT = ("tokens=256", "batch_size=2", "sequence_length=32")


def test_a_person_can_watch_a_training(gemma4: Case, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [f"--set=schedule.{setting}" for setting in SHORT]
    how = ("--eval-every=1", "--eval-tokens=64", "--references=none", "--precision=no", "--no-compile", *settings)
    serving = [sys.executable, "-m", "intaglio", "watch", str(run), "--port=0"]
    with started("train", gemma4.checkpoint, "--out", run, "--data", text, *how, hold_at=2) as training:
        with subprocess.Popen(serving, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            url = re.search(r"http://localhost:\d+", server.stdout.readline())[0]  # type: ignore[index]
            command = ["node", Path(__file__).with_name("watch.mjs"), MODULES, chromium(), url, tmp_path]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as person:
                assert person.stdout is not None
                assert person.stdout.readline() == "open\n"
                training.send_signal(signal.SIGUSR1)
                assert person.stdout.readline() == "done\n"
                server.send_signal(signal.SIGINT)
                seen = json.loads(person.stdout.readline())
            assert server.wait(60) == 0
        assert training.wait(600) == 0
    assert (seen["first"], seen["last"]) == ("Step 2 of 4", "Finished after 4 steps")
    assert seen["charts"] == 5 and seen["log"] == "done" and seen["title"] == "Finished after 4 steps: run"
    assert not (seen["overflow"] or seen["notice"] or seen["elsewhere"] or seen["errors"])
    assert seen["lost"]
