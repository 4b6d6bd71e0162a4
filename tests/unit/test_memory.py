"""Memory of a training step: exact for weights, close for what autograd keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from intaglio.errors import InputError
from intaglio.plan.activations import activation_bytes, layer_bytes
from intaglio.plan.bundled import bundled_config
from intaglio.plan.family import text_config
from intaglio.plan.memory import training_memory
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.latents import Latents
from intaglio.train.optimizer import make_optimizer
from intaglio.train.student import build_student, cast_weights
from tests.support.tiny import GEMMA2, GEMMA3, GEMMA4, GEMMA4_DENSE, build, fill

CONFIGS = {"gemma4": GEMMA4, "dense": GEMMA4_DENSE, "gemma3": GEMMA3, "gemma2": GEMMA2}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def models(plan: Plan) -> tuple[Any, Latents]:
    teacher = build(plan.model.config)
    fill(teacher, 0)
    cast_weights(teacher, torch.bfloat16)
    return teacher, build_student(teacher, plan)


def stored(model: Any) -> list[torch.Tensor]:
    """Weights, and the buffers that a checkpoint holds; not static scales."""
    return [t for name, t in model.state_dict().items() if not name.endswith("_scale_latent")]


def held_bytes(*tensors: torch.Tensor) -> int:
    """Bytes of the storages behind these tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    ("config", "recipe"),
    [(c, "q4_0") for c in CONFIGS.values()] + [(c, r) for c in (GEMMA4, GEMMA4_DENSE) for r in ("q4_0-free", "mobile")],
)
def test_weights_gradients_and_moments_take_what_is_planned(config: dict[str, Any], recipe: str) -> None:
    plan = make_plan(config, Recipe.load(recipe, ["schedule.batch_size=2", "schedule.sequence_length=8"]))
    teacher, latents = models(plan)
    planned = training_memory(plan)
    assert planned.teacher == held_bytes(*stored(teacher))
    assert planned.student == held_bytes(*stored(latents.model))
    state = {name: tensor for name, tensor in latents.state().items() if "_scale_latent" not in name}
    masters = [latent.latent for latent in latents.trained.values()]
    assert planned.masters == held_bytes(*masters)
    steps = [latent.step for latent in latents.blocks.values()]
    assert planned.scales == held_bytes(*state.values(), *steps) - planned.masters
    optimizer = make_optimizer(latents, plan.recipe.schedule)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in (*trained, *(latent.weight for latent in latents.trained.values())):
        parameter.grad = torch.zeros_like(parameter)
    weights = [latent.weight for latent in latents.trained.values()]
    bucket = sum(weight.numel() for weight in weights)  # small enough for one; its gradients again, and decoded values
    assert planned.gradients == held_bytes(*(weight.grad for weight in weights)) + 4 * bucket
    optimizer.inner.step()
    moments = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    assert planned.optimizer == held_bytes(*moments)


@each_config
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointed"])
def test_activations_are_about_what_autograd_keeps(config: dict[str, Any], checkpointing: bool) -> None:
    plan = make_plan(config, "q4_0")
    _, latents = models(plan)
    student = latents.model
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    known = {tensor.untyped_storage().data_ptr() for tensor in [*student.parameters(), *student.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids, layers = torch.randint(0, config["vocab_size"], (1, 256)), range(config["num_hidden_layers"])
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        student.model(input_ids=ids, use_cache=False)
    found = held_bytes(*kept.values())
    if checkpointing:  # the layer in full comes when the backward computes it again
        found += ids.numel() * max(layer_bytes(plan.model, layer, ids.shape[1]) for layer in layers)
    assert activation_bytes(plan.model, ids.numel(), ids.shape[1], checkpointing) == pytest.approx(found, rel=0.08)


def test_the_loss_takes_what_was_measured_on_a_gpu() -> None:
    """8192 tokens, E2B's head: 1.0234 GiB above the base with a frozen head, 1.7734 with a trained one."""
    schedule = ["schedule.batch_size=4", "schedule.sequence_length=2048"]
    config = bundled_config("gemma-4-e2b")
    for trainable, gib in ((False, 1.0234), (True, 1.7734)):
        flag = f"weights.token_embedding.trainable={str(trainable).lower()}"
        plan = make_plan(config, Recipe.load("q4_0", [*schedule, flag]))
        assert training_memory(plan).loss / 2**30 == pytest.approx(gib, abs=1e-4)


def test_sharding_divides_weights_and_not_activations() -> None:
    plan = make_plan(bundled_config("gemma-4-26b-a4b"), "q4_0")
    one, eight = training_memory(plan), training_memory(plan, gpus=8)
    assert one.student == 2 * sum(t.spec.numel for t in plan)
    for name in ("teacher", "student", "masters", "optimizer"):
        assert getattr(eight, name) == -(-getattr(one, name) // 8)
    assert eight.gathered > 0 == one.gathered
    kept = replace(plan, recipe=plan.recipe.with_schedule(gathered=True))
    assert training_memory(kept, gpus=8).gathered > 2 * one.student > training_memory(kept).gathered
    assert eight.activations * 8 == one.activations  # its share of the batch
    checkpointed = training_memory(plan, gpus=8, gradient_checkpointing=True)
    assert checkpointed.activations < eight.activations / 3
    fixed = sum(v for name, v in checkpointed.rows.items() if name not in ("gradients", "activations", "loss"))
    assert checkpointed.total - fixed == max(checkpointed.activations + checkpointed.loss, checkpointed.gradients)


@pytest.mark.parametrize(
    ("model", "sequences", "gpus", "checkpointing", "compiled", "moments", "peak_gb"),
    [
        ("e2b", 4, 1, False, False, "float32", 102.7),
        ("e2b", 1, 1, False, False, "float32", 62.4),
        ("e2b", 8, 2, False, False, "float32", 85.6),
        ("e2b", 8, 1, True, False, "float32", 57.4),
        ("e2b", 8, 1, True, True, "float32", 67.3),
        ("e4b", 4, 1, True, False, "float32", 101.1),
        ("e4b", 8, 1, True, False, "float32", 105.3),
        ("e4b", 8, 2, True, False, "float32", 62.8),
        ("12b", 8, 2, True, False, "float32", 124.4),
        ("12b", 8, 2, True, False, "bfloat16", 99.9),
    ],
)
def test_the_plan_is_within_a_tenth_of_measured_peaks(
    model: str, sequences: int, gpus: int, checkpointing: bool, compiled: bool, moments: str, peak_gb: float
) -> None:
    """On one H200 and two, sequences of 2048 tokens (benchmarks/scale_step.py; docs/scale.md)."""
    schedule = [f"schedule.batch_size={sequences}", "schedule.sequence_length=2048", f"schedule.moments={moments}"]
    plan = make_plan(text_config(bundled_config(f"gemma-4-{model}")), Recipe.load("q4_0", schedule))
    planned = training_memory(plan, gpus=gpus, gradient_checkpointing=checkpointing, compiled=compiled)
    assert planned.total / 1e9 == pytest.approx(peak_gb, rel=0.1)


@pytest.mark.parametrize("gpus", [0, -1, 1000])
def test_more_gpus_than_sequences_are_refused(gpus: int) -> None:
    with pytest.raises(InputError, match=rf"{gpus} GPUs: expected 1 to 32, the sequences of a batch"):
        training_memory(make_plan(GEMMA4, "q4_0"), gpus=gpus)
