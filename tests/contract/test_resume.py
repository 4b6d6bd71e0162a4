"""A run that is killed and resumed, in processes of their own, repeats the uninterrupted run bit for bit.

One story: killed before its tail, resumed, killed in the tail, resumed, stopped with Ctrl-C, resumed.
"""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.cli import Outcome, contents, intaglio, started
from tests.support.tiny import GEMMA4, make_checkpoint

STEPS, TAIL, EVERY = 96, 72, 3
SCHEDULE = {"tokens": STEPS * 64, "batch_size": 2, "sequence_length": 32, "lr": 1e-4, "scale_lr": 1e-2}
SCHEDULE |= {"frozen_tail": 1 - TAIL / STEPS}
SENTENCE = "On day {i} the captain of ship {n} saw {k} whales, and wrote their number down.\n"


@dataclass(frozen=True)
class Story:
    """Folders of the whole run and of the interrupted one, and how the latter ended each time."""

    model: Path
    text: Path
    whole: Path
    cut: Path
    stopped: Outcome


def arguments(model: Path, text: Path, out: Path, *more: object, **changes: object) -> list[object]:
    schedule = [f"--set=schedule.{key}={value}" for key, value in (SCHEDULE | changes).items()]
    rest = ["--eval-tokens=64", f"--checkpoint-every={EVERY}", "--precision=no", "--no-compile"]
    return ["train", model, f"--out={out}", f"--data={text}", *rest, *schedule, *more]


def stop(process: subprocess.Popen[str], how: signal.Signals) -> Outcome:
    """Send a signal, and wait for the end."""
    process.send_signal(how)
    out, err = process.communicate(timeout=600)
    return Outcome(process.returncode, out, err)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("resume")
    model, text, whole, cut = (folder / name for name in ("model", "text.txt", "whole", "cut"))
    make_checkpoint(model, GEMMA4)
    text.write_text("".join(SENTENCE.format(i=i, n=i % 7, k=i * i % 31) for i in range(60)), "utf-8")
    assert intaglio(*arguments(model, text, whole)).code == 0

    # after steps that no checkpoint holds, once before the tail and once in it
    with started(*arguments(model, text, cut), hold_at=EVERY + 1) as process:
        assert stop(process, signal.SIGKILL).code == -signal.SIGKILL
    with started(*arguments(model, text, cut, "--resume"), hold_at=TAIL + EVERY + 1) as process:
        assert stop(process, signal.SIGKILL).code == -signal.SIGKILL
    with started(*arguments(model, text, cut, "--resume"), hold_at=TAIL + 2 * EVERY + 1) as process:
        stopped = stop(process, signal.SIGINT)
    assert not (cut / "packed").exists()
    done = intaglio(*arguments(model, text, cut, "--resume"))
    assert done.code == 0, done.err
    return Story(model, text, whole, cut, stopped)


def test_losses_repeat_bit_for_bit(story: Story) -> None:
    losses = (story.whole / "losses.jsonl").read_bytes()
    assert (story.cut / "losses.jsonl").read_bytes() == losses
    rows = [json.loads(line) for line in losses.splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_what_is_packed_and_exported_is_equal(story: Story) -> None:
    one, other = (load_file(run / "packed/packed.safetensors") for run in (story.whole, story.cut))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)
    for file in ("packed/packed.safetensors", "hf/model.safetensors", "stock.gguf", "model.gguf"):
        assert (story.cut / file).read_bytes() == (story.whole / file).read_bytes(), file


def test_training_moved_the_codes(story: Story) -> None:
    trained, fitted = (load_file(story.whole / kind / "packed.safetensors") for kind in ("packed", "fitted"))
    assert any(not torch.equal(trained[name], fitted[name]) for name in trained if name.endswith(".codes"))


def test_ctrl_c_is_one_line_and_an_exit_code(story: Story) -> None:
    assert story.stopped.code == 130
    assert story.stopped.error == "stopped; a training run continues from its last checkpoint with --resume"


def test_nothing_temporary_is_left_behind(story: Story) -> None:
    assert not [path for path in contents(story.cut) if "partial" in path]
    assert contents(story.cut).keys() == contents(story.whole).keys()


@pytest.mark.parametrize(
    ("more", "changes", "message"),
    [
        ([], {}, "holds another run: choose another folder, or continue it with --resume"),
        (["--resume"], {"lr": 5e-4}, "cannot resume: schedule.lr is 0.0005, and the run there began with 0.0001"),
        (["--resume", "--recipe=q4_0-free"], {}, "cannot resume: name is q4_0-free, and the run there began with q4_0"),
        (["--resume", "--precision=bf16"], {}, "cannot resume: precision is bf16, and the run there began with no"),
        (["--resume", "--data={other}"], {}, "cannot resume: corpus is "),
    ],
    ids=["without --resume", "another schedule", "another recipe", "another precision", "other data"],
)
def test_a_folder_of_another_run_is_refused(
    more: list[str], changes: dict[str, object], message: str, story: Story, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(story.text.read_text().replace("captain", "cook"))
    before = contents(story.whole)
    options = [option.format(other=other) for option in more]
    outcome = intaglio(*arguments(story.model, story.text, story.whole, *options, **changes))
    assert outcome.code == 2
    assert str(story.whole) in outcome.error and message in outcome.error
    assert contents(story.whole) == before
