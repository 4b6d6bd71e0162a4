"""Memory of a training step: exact for weights, close for what autograd keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from intaglio.train.decode import StepWeights
from torch.autograd.graph import saved_tensors_hooks

from intaglio.errors import InputError
from intaglio.plan.bundled import bundled_config
from intaglio.plan.memory import activation_bytes, layer_bytes, training_memory
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.optimizer import make_optimizer
from intaglio.train.student import build_student
from tests.support.tiny import GEMMA3, GEMMA4, GEMMA4_DENSE, build, fill

CONFIGS = {"gemma4": GEMMA4, "dense": GEMMA4_DENSE, "gemma3": GEMMA3}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def models(plan: Plan) -> tuple[Any, Any]:
    teacher = build(plan.model.config)
    fill(teacher, 0)
    return teacher, build_student(teacher, plan)


def held_bytes(*tensors: torch.Tensor) -> int:
    """Of the storages behind these tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    ("config", "recipe"),
    [(c, r) for c in CONFIGS.values() for r in ("q4_0", "q4_0-free", "mobile") if c is not GEMMA3 or r != "mobile"],
)
def test_weights_gradients_and_moments_take_what_is_planned(config: dict[str, Any], recipe: str) -> None:
    plan = make_plan(config, Recipe.load(recipe, ["schedule.batch_size=2", "schedule.sequence_length=8"]))
    teacher, student = models(plan)
    planned = training_memory(plan)
    head = teacher.get_output_embeddings().weight
    own = {name: b for name, b in teacher.named_buffers() if name.endswith("layer_scalar")}
    assert planned.teacher == held_bytes(*teacher.parameters(), *own.values()) + 2 * head.numel()
    latents = [p for name, p in student.named_parameters() if not name.endswith("scale_latent")]
    table = [b for name, b in student.named_buffers() if name.endswith("frozen.codes")]
    scalars = [b for name, b in student.named_buffers() if name.endswith("layer_scalar")]
    assert planned.masters == held_bytes(*latents, *table, *scalars)
    scales = [p for name, p in student.named_parameters() if name.endswith("scale_latent")]
    scales += [b for n, b in student.named_buffers() if n.split(".")[-1] in ("scale", "super_scale", "base")]
    assert planned.scales == held_bytes(*scales)
    optimizer = make_optimizer(student, plan.recipe.schedule)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert planned.gradients == 4 * sum(p.numel() for p in trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    assert planned.optimizer == held_bytes(*moments)
    StepWeights(student).decode(torch.bfloat16)
    decoded = [t for q in StepWeights(student).quantizers for t in (q.values, q.steps)]
    assert planned.decoded == held_bytes(*decoded)


@each_config
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointed"])
def test_activations_are_about_what_autograd_keeps(config: dict[str, Any], checkpointing: bool) -> None:
    plan = make_plan(config, "q4_0")
    _, student = models(plan)
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    StepWeights(student).decode(torch.bfloat16)
    held = [*student.parameters(), *student.buffers(), *(q.values for q in StepWeights(student).quantizers)]
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.randint(0, config["vocab_size"], (2, 64))
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        student.model(input_ids=ids, use_cache=False)
    found = held_bytes(*kept.values())
    if checkpointing:  # the layer in full comes when the backward computes it again
        found += ids.numel() * max(layer_bytes(plan.model, layer) for layer in range(config["num_hidden_layers"]))
    assert activation_bytes(plan.model, ids.numel(), checkpointing) == pytest.approx(found, rel=0.12)


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
    assert one.masters == 4 * sum(t.spec.numel for t in plan)
    for name in ("masters", "gradients", "optimizer", "decoded"):
        assert getattr(eight, name) == -(-getattr(one, name) // 8)
    assert eight.gathered > 0 == one.gathered
    assert eight.activations * 8 == one.activations  # its share of the batch
    checkpointed = training_memory(plan, gpus=8, gradient_checkpointing=True)
    assert checkpointed.activations < eight.activations / 3
    assert checkpointed.total == sum(checkpointed.rows.values())


@pytest.mark.parametrize("gpus", [0, -1, 1000])
def test_more_gpus_than_sequences_are_refused(gpus: int) -> None:
    with pytest.raises(InputError, match=rf"{gpus} GPUs: expected 1 to 32, the sequences of a batch"):
        training_memory(make_plan(GEMMA4, "q4_0"), gpus=gpus)
