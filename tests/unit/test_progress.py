"""Progress without a terminal: a line at each stage and in time, also in the run's folder, and none that ends a run."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from intaglio.progress import Lines, Progress, StepInfo
from intaglio.train.run_folder import claim
from tests.support.cli import wait_until

STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")


def info(step: int, seconds: float) -> StepInfo:
    return StepInfo(step, 100, 0.5 / step, step * 1000, seconds, "train")


def plain(lines: list[str]) -> list[str]:
    assert all(STAMP.match(line) for line in lines)
    return [STAMP.sub("", line) for line in lines]


def test_stages_and_steps_are_lines() -> None:
    said: list[str] = []
    lines = Lines(said.append, seconds=1000)
    progress = Progress(lines)
    progress.stage("Reading text")
    progress.part(3, 10, "tokens")
    progress.stage("Training")
    for step in (1, 2, 50, 100):
        progress.step(info(step, step * 2.0))
    lines.close()
    first, done, training, begins, ends = plain(said)
    assert (first, training) == ("Reading text", "Training")
    assert re.fullmatch(r"Reading text: done in 0\.\d s", done)
    assert re.fullmatch(r"Training: step 1 of 100, loss 0\.5000, \d+\.\d GB of memory", begins)
    assert ends.startswith("Training: step 100 of 100, loss 0.0050, 500 tokens/s, 0.0 s left, ")


def test_time_left_counts_from_the_first_step_seen() -> None:
    said: list[str] = []
    lines = Lines(said.append, seconds=0)
    lines.stage("Training")
    lines.step(info(51, 1000.0))
    lines.step(info(52, 1010.0))
    lines.close()
    assert any("100 tokens/s, 0:08:00 left" in line for line in said)


def test_a_line_comes_in_time_when_nothing_happens() -> None:
    said: list[str] = []
    beats: list[float] = []

    def write(line: str) -> None:
        said.append(line)
        beats.extend([lines.said_at] * ("Fitting 129 tensors: at it for " in line))

    lines = Lines(write, seconds=0.2)
    lines.stage("Fitting 129 tensors")
    wait_until(lambda: len(beats) >= 2)
    assert beats[1] - beats[0] >= 0.2  # not sooner
    lines.part(5, 129, "a tensor")
    wait_until(lambda: any("Fitting 129 tensors: 5 of 129, a tensor, " in text for text in said))
    lines.close()
    count = len(said)
    lines.say("on its way")
    assert len(said) == count


@pytest.mark.parametrize("error", [BrokenPipeError, OSError, ValueError])
def test_a_line_that_cannot_be_written_ends_nothing(error: type[Exception]) -> None:
    def write(line: str) -> None:
        raise error

    lines = Lines(write, seconds=0.05)
    lines.stage("Training")
    lines.step(info(1, 1.0))
    time.sleep(0.2)
    lines.close()


def test_the_run_folder_has_the_lines_once_it_is_the_runs(tmp_path: Path) -> None:
    progress = Progress()
    with progress.logged(tmp_path):
        progress.stage("Loading")
        assert not list(tmp_path.iterdir())  # what is not ours is left alone
        claim(tmp_path, {})
        progress.stage("Training")
    assert not progress.listeners
    with pytest.raises(ZeroDivisionError), progress.logged(tmp_path):
        raise ZeroDivisionError("once")
    texts = plain((tmp_path / "run.log").read_text().splitlines())
    assert texts[0].startswith("process ") and texts[1] == "Loading" and texts[3:] == ["Training", "done"]
