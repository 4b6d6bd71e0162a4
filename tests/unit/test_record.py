"""What a run records: its losses, held-out text, changed codes, speed, and what trackers are told."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch._dynamo.testing import CompileCounter

from intaglio.errors import ConfigError, InputError
from intaglio.progress import Lines, Progress, StepInfo
from intaglio.train import code_changes, lesson, record, session, trackers
from intaglio.train.code_changes import CodeChanges, sampled
from intaglio.train.latents import Latents, prepare
from intaglio.train.loop import train
from intaglio.train.options import Options
from intaglio.train.run_folder import read_losses, read_speed
from tests.support.cli import intaglio
from tests.support.training import small_corpus, small_model, small_plan

CORPUS = small_corpus(sequences=8)
HELD_OUT = small_corpus(sequences=6, seed=1).tokens


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return small_model()


def run(teacher: nn.Module, folder: Path, steps: int = 4, *, resume: bool = False, **how: Any) -> Latents:
    options = {"precision": "no", "compiled": False} | {k: how.pop(k) for k in list(how) if k in FIELDS}
    schedule = {"tokens": steps * 64, "batch_size": 4, "sequence_length": 16, "lr": 1e-4, "scale_lr": 1e-2}
    schedule |= {k: how.pop(k) for k in list(how) if k in ("frozen_tail", "micro_batch", "loss")}
    plan = small_plan(*(f"schedule.{key}={value}" for key, value in schedule.items()))
    return train(teacher, plan, CORPUS, folder, options=Options(**options), resume=resume, **how)


FIELDS = ("checkpoint_every", "eval_every", "track")


def die_at(step: int) -> Callable[[StepInfo], None]:
    def callback(info: StepInfo) -> None:
        if info.step == step:
            raise RuntimeError("killed")

    return callback


# Held-out text and codes


def test_held_out_text_is_measured_every_so_often_and_changes_nothing(teacher: nn.Module, tmp_path: Path) -> None:
    run(teacher, tmp_path / "plain", 5)
    run(teacher, tmp_path / "measured", 5, eval_every=2, held_out=HELD_OUT)
    run(teacher, tmp_path / "cut in two", 5, eval_every=2, held_out=HELD_OUT, micro_batch=4)
    plain, measured, other = (read_losses(tmp_path / name) for name in ("plain", "measured", "cut in two"))
    found = {int(row["step"]): row.pop("held_out_loss") for row in measured if "held_out_loss" in row}
    assert measured == plain
    assert list(found) == [1, 3, 5]  # the first is of the model that training began with
    assert found[5] != found[3] != found[1] and 0.01 < found[5] < 1
    assert [row["held_out_loss"] for row in other[::2]] == pytest.approx(list(found.values()), rel=1e-4)


def test_the_measured_loss_is_the_training_loss_of_that_text(
    teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a batch that is itself the held-out text the two are one figure, for the KL and for cross-entropy."""
    monkeypatch.setattr(session, "HELD_OUT_TOKENS", 4 * 16)
    batch = small_corpus(sequences=4)
    batch.positions[:] = torch.arange(16).numpy()
    for loss in ("kl", "cross_entropy"):
        monkeypatch.setattr(sys.modules[__name__], "CORPUS", batch)
        run(teacher, tmp_path / loss, 1, eval_every=1, held_out=batch.tokens, loss=loss)
        (row,) = read_losses(tmp_path / loss)
        assert row["held_out_loss"] == pytest.approx(row["loss"], rel=1e-5)


def test_held_out_text_has_nothing_compiled(
    teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its shapes would cost a compilation of every layer."""
    counter, calls = CompileCounter(), []
    add = torch.compile(lambda x: x + 1, backend=counter, dynamic=False)
    plain = lesson.Teacher.__call__

    def teach(self: lesson.Teacher, *text: torch.Tensor) -> tuple[Any, ...]:
        calls.append(add(torch.zeros(len(calls) + 1)))
        return plain(self, *text)

    monkeypatch.setattr(lesson.Teacher, "__call__", teach)
    run(teacher, tmp_path, 2, eval_every=2, held_out=HELD_OUT)
    assert (len(calls), counter.frame_count) == (4, 2)  # two batches, and two of held-out text


def test_held_out_text_is_asked_for(teacher: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="eval_every is set, and there is no held-out text"):
        run(teacher, tmp_path, eval_every=1)
    with pytest.raises(InputError, match="eval_every = -1: expected 0 or more"):
        Options(eval_every=-1)


def test_shares_of_codes_are_those_of_all_codes(
    teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With samples that are the whole weights, against what the packed codes say."""
    first: dict[str, torch.Tensor] = {}

    def keep(latents: Latents) -> None:
        first.update({name: latent.pack().codes for name, latent in latents.blocks.items()})

    monkeypatch.setattr(code_changes, "SAMPLE", 1 << 30)
    latents = run(teacher, tmp_path, 4, on_start=keep)
    changed = torch.cat([(first[name] != b.pack().codes).flatten() for name, b in latents.blocks.items()])
    rows = read_losses(tmp_path)
    assert rows[-1]["codes_changed"] == pytest.approx(float(changed.float().mean()), rel=1e-5)
    assert rows[0]["codes_changed"] == rows[0]["codes_moved"] > 0
    assert all(0 < row["codes_moved"] < 1 for row in rows)
    monkeypatch.setattr(code_changes, "SAMPLE", 512)
    run(teacher, tmp_path / "sampled", 4)
    assert read_losses(tmp_path / "sampled")[-1]["codes_changed"] == pytest.approx(rows[-1]["codes_changed"], rel=0.3)


def test_codes_of_a_long_run_are_counted_a_hundred_times(
    teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "CODES_COUNTED", 3)
    run(teacher, tmp_path, 7)
    assert [int(row["step"]) for row in read_losses(tmp_path) if "codes_changed" in row] == [3, 6]


def test_no_code_is_said_to_move_in_the_tail(teacher: nn.Module, tmp_path: Path) -> None:
    run(teacher, tmp_path, 4, frozen_tail=0.5)
    moved = [row["codes_moved"] for row in read_losses(tmp_path)]
    assert min(moved[:2]) > 2 * max(moved[2:])  # of embeddings on a finer grid, which go on


def test_samples_of_shards_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any cut of the rows takes the same sample."""
    latents = prepare(small_model(), small_plan())
    latent = next(latent for latent in latents.blocks.values() if latent.weight.shape[0] == 256)
    monkeypatch.setattr(code_changes, "SAMPLE", 40 * latent.weight.shape[1])
    whole = sampled(latent)
    assert len(whole) == -(-256 // (256 // 40))
    for cuts in ((0, 128, 256), (0, 1, 100, 101, 256), (0, 256, 256)):
        parts = []
        for begin, end in itertools.pairwise(cuts):
            rows = SimpleNamespace(start=begin)
            monkeypatch.setattr(code_changes, "own_slice", lambda weight, rows=rows: rows)
            monkeypatch.setattr(code_changes, "local", lambda weight, b=begin, e=end: weight[b:e])
            part = SimpleNamespace(weight=latent.weight, grid=latent.grid, step=latent.step[begin:end])
            parts.append(sampled(part))  # type: ignore[arg-type]
        assert torch.equal(torch.cat(parts), whole)


def test_a_resumed_run_records_the_same(teacher: nn.Module, tmp_path: Path) -> None:
    how = {"eval_every": 2, "held_out": HELD_OUT, "checkpoint_every": 1, "frozen_tail": 0.5}
    run(teacher, tmp_path / "whole", 6, **how)
    for death in (2, 5):
        with pytest.raises(RuntimeError, match="killed"):
            run(teacher, tmp_path / "cut", 6, on_step=die_at(death), resume=death > 2, **how)
    run(teacher, tmp_path / "cut", 6, resume=True, **how)
    for name in ("losses.jsonl", "codes.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [row["step"] for row in read_speed(tmp_path / "cut")] == [1, 2, 2, 3, 4, 5, 5, 6]


def test_a_run_without_its_first_codes_is_not_resumed(teacher: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        run(teacher, tmp_path, checkpoint_every=1, on_step=die_at(3))
    (tmp_path / "codes.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"codes\.safetensors"):
        run(teacher, tmp_path, resume=True)


def test_a_model_without_grids_has_no_codes() -> None:
    changes = CodeChanges(SimpleNamespace(blocks={}))  # type: ignore[arg-type]
    changes.begin(Path("nowhere"), resumed=False)
    assert changes.sample() == {} and changes.shares({}) == {}


# Speed, and the log


def test_speed_is_beside_the_losses(teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With clocks on which a step takes half a second."""
    seconds, date = itertools.count(10.0, 0.5), itertools.count(1.8e9)
    clocks = SimpleNamespace(perf_counter=lambda: next(seconds), time=lambda: next(date))
    monkeypatch.setattr(record, "time", clocks)
    said: list[str] = []
    lines = Lines(said.append, seconds=1000)
    run(teacher, tmp_path, 3, eval_every=2, held_out=HELD_OUT, progress=Progress(lines))
    lines.close()
    rows = read_speed(tmp_path)
    assert [row["time"] for row in rows] == [1.8e9, 1.8e9 + 1, 1.8e9 + 2]
    assert [row["tokens_per_s"] for row in rows] == [128, 128, 128]
    assert all(1e8 < row["host_bytes"] < 1e12 for row in rows)
    measured = [row["held_out_loss"] for row in read_losses(tmp_path)[::2]]
    assert [line for line in said if "held-out" in line] == [
        line for line, loss in zip(said, measured, strict=False) if f", {loss:.4f} on held-out text" in line
    ]


@pytest.mark.parametrize("row", ['{"step": 1, "time": 1.0}', '{"step": 0, "time": 1.0, "tokens_per_s": 1}', "[1]"])
def test_a_damaged_log_of_speed_is_named(row: str, tmp_path: Path) -> None:
    (tmp_path / "speed.jsonl").write_text(row + "\n")
    with pytest.raises(ConfigError, match=r"speed\.jsonl:1: not a line of a run's log"):
        read_speed(tmp_path)


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    (tmp_path / "losses.jsonl").write_text('{"step": 1, "tokens": 2, "loss": 0.5}\n{"step": 2, "to')
    assert read_losses(tmp_path) == [{"step": 1, "tokens": 2, "loss": 0.5}]


# Trackers


def test_tensorboard_has_what_the_logs_have(teacher: nn.Module, tmp_path: Path) -> None:
    run(teacher, tmp_path, 3, eval_every=2, held_out=HELD_OUT, track=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows, speeds = read_losses(tmp_path), read_speed(tmp_path)
    for name in ("loss", "tokens", "lr", "codes_changed", "codes_moved", "held_out_loss"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(row["step"], pytest.approx(row[name])) for row in rows if name in row], name
    logged = [event.value for event in events.Scalars("tokens_per_s")]
    assert logged == [pytest.approx(row["tokens_per_s"]) for row in speeds]


class Kept(tracking.GeneralTracker):
    """A tracker that keeps what it is told, and may fail."""

    name, requires_logging_directory = "kept", False
    all: list[Any]
    fails = ""

    tracker = property(lambda self: None)

    def _told(self, what: str, *values: Any) -> None:
        self.all.append((what, *values))
        if what == self.fails:
            raise ConnectionError("no network\nat all")

    def start(self) -> None:
        self._told("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._told("config", values)

    def log(self, values: dict[str, Any], step: int | None = None, **rest: Any) -> None:
        self._told("log", step, values)

    def finish(self) -> None:
        self._told("finish")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> type[Kept]:
    monkeypatch.setattr(trackers, "make_tracker", lambda name, run_dir: Kept())
    monkeypatch.setattr(Kept, "all", [], raising=False)
    monkeypatch.setattr(Kept, "fails", "")
    return Kept


def test_a_tracker_is_told_recipe_and_steps(kept: type[Kept], teacher: nn.Module, tmp_path: Path) -> None:
    run(teacher, tmp_path, 2, track=("tensorboard", "tensorboard"))
    (_, (_, config), (_, one, first), (_, two, _), end) = kept.all
    assert config["schedule.lr"] == 1e-4 and config["schedule.betas"] == "[0.9, 0.95]" and len(config["plan"]) == 64
    assert (one, two, end) == (1, 2, ("finish",))
    assert first["loss"] == read_losses(tmp_path)[0]["loss"] and first["host_bytes"] > 0
    assert not [value for value in config.values() if str(tmp_path) in str(value)]


def test_a_tracker_ends_with_a_run_that_is_cut(kept: type[Kept], teacher: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        run(teacher, tmp_path, on_step=die_at(2), track=("tensorboard",))
    assert [told[0] for told in kept.all] == ["start", "config", "log", "log", "finish"]


@pytest.mark.parametrize("fails", ["start", "config"])
def test_a_tracker_that_does_not_start_stops_the_run_before_its_first_step(
    fails: str, kept: type[Kept], teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "fails", fails)
    with pytest.raises(InputError, match="tracker 'tensorboard' does not start: ConnectionError: no network at all"):
        run(teacher, tmp_path, track=("tensorboard",))
    assert not read_losses(tmp_path)
    assert [told[0] for told in kept.all] == {"start": ["start"], "config": ["start", "config", "finish"]}[fails]


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_tracker_that_fails_later_ends_nothing(
    fails: str, kept: type[Kept], teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "fails", fails)
    said: list[str] = []
    lines = Lines(said.append, seconds=1000)
    run(teacher, tmp_path, 3, track=("tensorboard",), progress=Progress(lines))
    lines.close()
    assert len(read_losses(tmp_path)) == 3
    notes = [line.partition(" tracker ")[2] for line in said if " tracker " in line]
    assert notes == ["'tensorboard' failed, and is told no more of this run: ConnectionError: no network at all"]
    assert sum(told[0] == "log" for told in kept.all) == (1 if fails == "log" else 3)


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_each_tracker_is_made_as_accelerate_has_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their packages are stood in for. What was run with the real ones is in docs/training.md."""
    told: dict[str, Any] = {}

    def init(**how: Any) -> SimpleNamespace:
        told.update(how)
        return SimpleNamespace(finish=lambda: None, log=lambda *a, **k: None)

    module: Any = ModuleType(name)
    module.init, module.config = init, SimpleNamespace(update=lambda *a, **k: None)
    if name not in ("tensorboard", "mlflow"):
        monkeypatch.setitem(sys.modules, name, module)
        with trackers.Trackers((name,), tmp_path / "my run", {"a": [1]}, print) as running:
            running.log({"loss": 1.0}, 1)
        assert told["project"] == "intaglio" and told["name"] == "my run"
    else:
        tracker = trackers.make_tracker(name, tmp_path / "my run")
        assert tracker.run_name == {"tensorboard": "tensorboard", "mlflow": "my run"}[name]


@pytest.mark.parametrize(
    ("track", "message"),
    [
        ("nonsense", "tracker 'nonsense': expected one of wandb, trackio, tensorboard, mlflow"),
        ("tensorboard,wandb", r"tracker 'wandb': its package is not installed: pip install 'intaglio\[wandb\]'"),
    ],
)
def test_a_tracker_that_cannot_be_is_refused_first_of_all(
    track: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: name == "tensorboard" or None)
    with pytest.raises(InputError, match=message):
        Options(track=tuple(track.split(",")))
    outcome = intaglio("train", tmp_path / "nowhere", "--out", tmp_path / "run", "--track", track)
    assert outcome.code == 2 and "tracker" in outcome.error
    assert not (tmp_path / "run").exists()


def test_rows_are_json_with_the_documented_keys(teacher: nn.Module, tmp_path: Path) -> None:
    run(teacher, tmp_path, 1, eval_every=1, held_out=HELD_OUT)
    row = json.loads((tmp_path / "losses.jsonl").read_text())
    assert list(row) == ["step", "tokens", "loss", "lr", "held_out_loss", "codes_changed", "codes_moved"]
