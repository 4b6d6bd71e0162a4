"""Moments in bfloat16 and in 8 bits: they train as float32 ones do, and checkpoints and the plan know them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from intaglio.errors import InputError
from intaglio.plan.memory import training_memory
from intaglio.plan.recipe import Recipe
from intaglio.progress import StepInfo
from intaglio.train import checkpoint, fused
from intaglio.train.lean import MOMENTS, Bfloat16AdamW, GridAdamW8bit, plain
from intaglio.train.loop import train
from intaglio.train.optimizer import make_optimizer
from intaglio.train.options import Options
from intaglio.train.run_folder import read_losses
from intaglio.train.student import build_student
from tests.support.training import small_corpus, small_model, small_plan
from tests.unit.test_fused import IDS, trained

SCHEDULE = {
    "tokens": 8 * 64, "batch_size": 4, "sequence_length": 16, "lr": 1e-4, "scale_lr": 1e-2, "frozen_tail": 0.5,
}  # fmt: skip


class Killed(Exception):
    pass


def plan_of(moments: str, *more: str):
    return small_plan(
        *(f"schedule.{key}={value}" for key, value in SCHEDULE.items()), f"schedule.moments={moments}", *more
    )


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_lean_moments_train_as_float32_ones_do(moments: str) -> None:
    expected, _ = trained(small_plan(), torch.float32, is_fused=False)
    found, latents = trained(small_plan(f"schedule.moments={moments}"), torch.float32, is_fused=False)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-6)  # the first step divides a moment by its own root
    assert found == pytest.approx(expected, rel=2e-3) and found != expected
    for latent in latents.trained.values():
        latent.pack()


@pytest.mark.parametrize("offload", [False, True])
def test_the_fused_step_keeps_bfloat16_moments_as_the_plain_one(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """offload: with host memory in the place of pinned host memory."""
    monkeypatch.setattr(fused, "_kernel", lambda function, *tensors: function)
    if offload:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    plan = small_plan("schedule.moments=bfloat16", f"schedule.offload_moments={str(offload).lower()}")
    both = [trained(plan, torch.float32, is_fused=is_fused) for is_fused in (False, True)]
    assert both[0][0][:3] == pytest.approx(both[1][0][:3], rel=1e-5)
    assert both[0][0] == pytest.approx(both[1][0], rel=1e-3)  # a moment that is rounded otherwise flips a code or two
    assert both[0][0] != trained(small_plan(), torch.float32, is_fused=True)[0]


@pytest.mark.parametrize(
    ("moments", "tolerance", "death"), [("bfloat16", 0.0, 3), ("bfloat16", 0.0, 7), ("int8", 0.03, 7)]
)
def test_a_resumed_run_goes_on_with_its_moments(moments: str, tolerance: float, death: int, tmp_path: Path) -> None:
    options, model, corpus = Options(precision="no", compiled=False, checkpoint_every=2), small_model(), small_corpus()

    def die(info: StepInfo) -> None:
        if info.step == death:
            raise Killed

    whole = train(model, plan_of(moments), corpus, tmp_path / "whole", options=options)
    with pytest.raises(Killed):
        train(model, plan_of(moments), corpus, tmp_path / "cut", options=options, on_step=die)
    cut = train(model, plan_of(moments), corpus, tmp_path / "cut", options=options, resume=True)
    expected, found = ([row["loss"] for row in read_losses(tmp_path / name)] for name in ("whole", "cut"))
    assert found == pytest.approx(expected, rel=tolerance, abs=0)
    if moments == "bfloat16":
        assert all(torch.equal(value, cut.state()[name]) for name, value in whole.state().items())


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
def test_the_plan_counts_the_moments_that_are_kept(moments: str) -> None:
    plan = plan_of(moments)
    latents = build_student(small_model(), plan)
    optimizer = make_optimizer(latents, plan.recipe.schedule)
    latents.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    kept = [state[key] for state in optimizer.state.values() for key in MOMENTS]
    parts = [
        part
        for moment in kept
        for part in ((moment.codes, moment.scale, moment.qmap) if hasattr(moment, "qmap") else (moment,))
    ]
    assert training_memory(plan).optimizer == sum(part.numel() * part.element_size() for part in parts)


def test_lean_moments_take_less_in_the_plan() -> None:
    rows = {name: training_memory(plan_of(name)) for name in ("float32", "bfloat16", "int8")}
    assert rows["bfloat16"].optimizer * 2 == rows["float32"].optimizer
    assert rows["int8"].optimizer < 0.3 * rows["float32"].optimizer
    offloaded = training_memory(plan_of("float32", "schedule.offload_moments=true"))
    assert offloaded.optimizer == 0 and offloaded.gradients > rows["float32"].gradients


def test_eight_bit_moments_are_stored_as_values(tmp_path: Path) -> None:
    plan = plan_of("int8")
    latents, again = (build_student(small_model(), plan) for _ in range(2))
    optimizer, other = (make_optimizer(latent, plan.recipe.schedule) for latent in (latents, again))
    latents.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    checkpoint.load(checkpoint.save(tmp_path, 1, latents, optimizer), again, other)
    for (name, one), (_, two) in zip(latents.named_parameters(), again.named_parameters(), strict=True):
        for key in MOMENTS:
            before, after = optimizer.state[one][key], other.state[two][key]
            assert type(before) is type(after)
            largest = float(plain(before).abs().max())
            torch.testing.assert_close(plain(after), plain(before), rtol=0, atol=0.01 * largest, msg=f"{name} {key}")


def test_a_gradient_is_clipped_as_by_the_plain_step() -> None:
    """Adam's first step does not depend on the size of a gradient, so the moments are compared."""
    norms = []
    for moments in ("int8", "float32"):
        plan = plan_of(moments, "schedule.clip=0.01")
        latents = build_student(small_model(), plan)
        optimizer = make_optimizer(latents, plan.recipe.schedule)
        assert isinstance(optimizer, GridAdamW8bit) == (moments == "int8")
        latents.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        norms.append(sum(float(plain(s["exp_avg"]).square().sum()) for s in optimizer.state.values()) ** 0.5)
        assert all(latent.weight.grad is None for latent in latents.trained.values())
    assert norms[0] == pytest.approx(norms[1], rel=0.01) and norms[1] == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_without_torchao_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    plan = plan_of("int8")
    with pytest.raises(InputError, match=r"moments = 'int8' needs torchao .*pip install 'intaglio\[lean\]'"):
        make_optimizer(build_student(small_model(), plan), plan.recipe.schedule)


def test_bfloat16_moments_are_for_any_loop() -> None:
    """`Bfloat16AdamW` by itself: first moments of torch's AdamW, rounded."""
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 64)) for _ in range(2)]
    optimizers = Bfloat16AdamW(weights[:1], lr=0.1), torch.optim.AdamW(weights[1:], lr=0.1)
    for weight, optimizer in zip(weights, optimizers, strict=True):
        weight.square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)
    one, other = (o.state[w]["exp_avg"] for o, w in zip(optimizers, weights, strict=True))
    assert one.dtype == torch.bfloat16 and torch.equal(one, other.bfloat16())


@pytest.mark.parametrize(
    "changes", [["schedule.moments=int4"], ["schedule.moments=int8", "schedule.offload_moments=true"]]
)
def test_moments_that_are_not_there_are_refused(changes: list[str]) -> None:
    with pytest.raises(InputError, match=r"moments.*expected"):
        Recipe.load("q4_0", changes)
