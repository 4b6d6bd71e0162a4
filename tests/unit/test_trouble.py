"""No memory left in training, or processes that cannot train together: one message that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from intaglio import cli
from intaglio.errors import InputError, TrainingError
from intaglio.plan.bundled import bundled_config
from intaglio.plan.memory import training_memory
from intaglio.plan.plan import make_plan
from intaglio.train import sharding
from intaglio.train.grid_optimizer import GridOptimizer
from intaglio.train.loop import train
from intaglio.train.options import Options
from intaglio.train.signals import Stopped
from intaglio.train.trouble import fixes_of, memory_text
from tests.support.training import small_corpus, small_model, small_plan

PLAN = small_plan("schedule.tokens=512", "schedule.batch_size=4", "schedule.sequence_length=16")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), dist.DistBackendError("NCCL: peer left")]
)
def test_a_step_that_fails_names_the_last_checkpoint(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third step finds no memory, or no other process."""
    steps, step = [], GridOptimizer.step

    def failing(self: GridOptimizer) -> None:
        steps.append(None)
        if len(steps) == 3:
            raise error
        step(self)

    monkeypatch.setattr(GridOptimizer, "step", failing)
    options = Options(precision="no", compiled=False, checkpoint_every=2)
    with pytest.raises(TrainingError) as caught:
        train(small_model(), PLAN, small_corpus(), tmp_path / "run", options=options)
    said = str(caught.value)
    assert caught.value.exit_code == 2
    assert f"the last checkpoint is {tmp_path / 'run/checkpoints/step-00000002'}: --resume goes on" in said
    expected = "process 0: cpu has no memory left" if isinstance(error, torch.OutOfMemoryError) else "NCCL: peer left"
    assert expected in said


def test_the_message_names_the_row_and_three_settings_that_fit() -> None:
    plan = make_plan(bundled_config("gemma-4-e2b"), "q4_0")
    planned = training_memory(plan)
    said = memory_text(plan, 80_000_000_000, 1, False)
    assert f"counts {planned.total / 1e9:.3g} GB, and 80 GB are there; the largest part is activations" in said
    assert said.count(" GB)") == 2 and "--gradient-checkpointing (" in said and "schedule.micro_batch=1 (" in said
    for name, size in fixes_of(plan, 1, False):
        assert (f"{name} ({size / 1e9:.3g} GB)" in said) == (size <= 80_000_000_000), name
    assert memory_text(plan, 1_000_000_000, 1, False).count("still too much alone") == 3


def test_every_setting_that_is_offered_takes_less() -> None:
    plan = make_plan(bundled_config("gemma-4-e2b"), "q4_0")
    now = training_memory(plan).total
    names = [name for name, size in fixes_of(plan, 1, False) if size < now]
    assert names[:2] == ["--gradient-checkpointing", "--set schedule.micro_batch=1"] and "2 GPUs" in names
    assert "--gradient-checkpointing" not in [name for name, _ in fixes_of(plan, 1, True)]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU, and a second process of this host."""
    for name, value in (("is_available", True), ("device_count", 1), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_more_processes_than_gpus_are_refused(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match=r"process 1 of this host, and 1 GPUs: expected one GPU a process"):
        sharding.start_processes()


def test_a_torch_without_nccl_is_refused(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(InputError, match="no NCCL"):
        sharding.start_processes()


def test_processes_that_do_not_meet_are_refused(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise dist.DistNetworkError("connection refused\nmore")

    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", refuse)
    with pytest.raises(InputError, match=r"cannot meet \(connection refused\)"):
        sharding.start_processes()


@pytest.mark.parametrize("stopped", [True, False], ids=["the first has said it", "the first goes on"])
def test_other_processes_leave_a_message_to_the_first(
    stopped: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait(seconds: float) -> None:
        assert seconds == cli.UNTIL_STOPPED
        if stopped:
            raise Stopped(15)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "_run", lambda: (2, "the mistake"))
    monkeypatch.setattr(cli.time, "sleep", wait)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == (143 if stopped else 2)
    assert capsys.readouterr().err.strip() == ("" if stopped else "error: process 1: the mistake")
