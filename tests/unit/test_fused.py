"""The fused step computes what pull, AdamW and decode do one after the other."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from intaglio.plan.plan import Plan
from intaglio.train import fused
from intaglio.train.latents import Latents
from intaglio.train.optimizer import make_optimizer, set_lr
from intaglio.train.student import build_student
from tests.support.training import small_corpus, small_model, small_plan

IDS = torch.from_numpy(small_corpus().tokens).long()
FREEZE = 2  # the step before which codes are frozen


@pytest.fixture
def uncompiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_kernel", lambda function, *tensors: function)


def trained(plan: Plan, dtype: torch.dtype, *, is_fused: bool, steps: int = 4) -> tuple[list[float], Latents]:
    """Losses and latents of a few steps, the last ones with frozen codes."""
    latents = build_student(small_model(), plan, dtype=dtype)
    optimizer, losses = make_optimizer(latents, plan.recipe.schedule, fused=is_fused), []
    for step in range(steps):
        if step == FREEZE:
            latents.freeze_codes()
            optimizer = make_optimizer(latents, plan.recipe.schedule, optimizer, fused=is_fused)
        set_lr(optimizer, 1.0 - 0.2 * step)
        loss = latents.model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, latents


@pytest.mark.parametrize("recipe", ["q4_0", "q4_0-free", "mobile"])
@pytest.mark.parametrize("changes", [["schedule.clip=0.5"], ["schedule.clip=0", "schedule.weight_decay=0.1"]])
def test_the_fused_step_is_the_plain_one(recipe: str, changes: list[str], uncompiled_kernels: None) -> None:
    plan = small_plan(*changes, recipe=recipe)
    (expected, plain), (found, ours) = (trained(plan, torch.float32, is_fused=f) for f in (False, True))
    assert found == pytest.approx(expected, rel=1e-5)
    for name, latent in plain.trained.items():
        other = ours.trained[name]
        assert float((latent.latent - other.latent).abs().max()) < 1e-3, name
        other.pack()  # the weight holds what the latent decodes to
    differ = sum(int((a.pack().codes != b.pack().codes).sum()) for a, b in _pairs(plain, ours))
    assert differ <= 20


def _pairs(one: Latents, other: Latents) -> list:
    return list(zip(one.blocks.values(), other.blocks.values(), strict=True))


def test_a_compiled_kernel_decodes_what_is_packed() -> None:
    """The packed codes are the weight's own in bfloat16, whose casts a compiler may leave out."""
    plan = small_plan("weights.ple_embedding.trainable=true", recipe="mobile")
    losses, latents = trained(plan, torch.bfloat16, is_fused=True, steps=1)
    for latent in latents.trained.values():
        latent.pack()
    assert losses[0] > 0


def test_rows_of_any_width_share_a_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the norm and one of the step for each grid, and one for floats; rows here have three widths."""
    counter, compile_with = CompileCounter(), torch.compile
    monkeypatch.setattr(fused, "_compiled", {})
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_with(function, backend=counter, **how))
    plan = small_plan("fit=absmax", recipe="mobile")
    _, latents = trained(plan, torch.float32, is_fused=True, steps=1)
    grids = {(latent.grid.name, latent.grid.block_size) for latent in latents.blocks.values()}
    assert len({width for _, width in grids}) == 3
    assert counter.frame_count == 2 * len({name for name, _ in grids}) + 1


def test_moments_stay_where_checkpoints_look_for_them(uncompiled_kernels: None) -> None:
    plan = small_plan()
    latents = build_student(small_model(), plan)
    optimizer = make_optimizer(latents, plan.recipe.schedule, fused=True)
    latents.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    for name, parameter in latents.named_parameters():
        state = optimizer.state[parameter]
        assert state["exp_avg"].shape == parameter.shape and float(state["step"]) == 1, name
    assert any(state["exp_avg"].any() for state in optimizer.state.values())


def test_weights_share_buckets_of_bounded_size(uncompiled_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "BUCKET_VALUES", 200_000)
    latents = build_student(small_model(), small_plan())
    optimizer = make_optimizer(latents, small_plan().recipe.schedule, fused=True)
    buckets = fused.make_buckets(latents, optimizer)
    assert sum(len(bucket.latents) for bucket in buckets) == len(latents.trained)
    assert all(len(b.latents) == 1 or sum(x.latent.numel() for x in b.latents) <= 200_000 for b in buckets)
    assert any(len(bucket.latents) > 1 for bucket in buckets)
