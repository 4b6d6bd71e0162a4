"""Attached to a model, quantizers change what it computes to the grid's values and nothing else about it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from intaglio.errors import InputError, OutputError, RecipeError, WeightError
from intaglio.measure.simulate import decoded_model
from intaglio.numerics.grid import BlockGrid, FloatGrid
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import Plan
from intaglio.train.attach import prepare
from intaglio.train.decode import StepWeights, freeze_codes
from intaglio.train.modules import QuantEmbedding, QuantLinear
from intaglio.train.pack import pack_model
from intaglio.train.student import build_student
from tests.support.tiny import GEMMA4_DENSE
from tests.support.training import SMALL, small_model, small_plan

RECIPES = {
    "q4_0": ("q4_0", []),
    "q4_0-free": ("q4_0-free", []),
    "q4_0-stock": ("q4_0-stock", []),
    **{
        f"embeddings {grid}": ("q4_0", [f"weights.token_embedding.grid={grid}", f"weights.ple_embedding.grid={grid}"])
        for grid in ("q4_0", "q4_0-free", "q8_0", "f16", "f32")
    },
    "everything learns": ("q4_0", ["weights.ple_embedding.trainable=true"]),
    "PLE of q4_0 learns": ("q4_0", ["weights.ple_embedding.grid=q4_0", "weights.ple_embedding.trainable=true"]),
    "PLE of f16 learns": ("q4_0", ["weights.ple_embedding.grid=f16", "weights.ple_embedding.trainable=true"]),
    "embedding stands still": ("q4_0", ["weights.token_embedding.trainable=false"]),
    "f16 embedding stands still": (
        "q4_0",
        ["weights.token_embedding.trainable=false", "weights.token_embedding.grid=f16"],
    ),
    "mobile": ("mobile", []),
    "mobile, PLE learns": ("mobile", ["weights.ple_embedding.trainable=true"]),
    "mobile stands still": ("mobile", [f"weights.{r}.trainable=false" for r in ("attention", "token_embedding")]),
    "linears stand still": ("q4_0", ["weights.linear.trainable=false"]),
}
EMBEDDING = "model.embed_tokens.weight"
PLE = "model.embed_tokens_per_layer.weight"
IDS = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return small_model()


def plan_of(recipe: str) -> Plan:
    name, overrides = RECIPES[recipe]
    return small_plan(*overrides, recipe=name)


def trained(model: nn.Module, steps: int = 1, *, lr: float = 3e-3) -> nn.Module:
    """A few steps away from the fit, on an arbitrary loss; plain torch, as anyone's trainer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(input_ids=IDS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def packed_of(student: nn.Module, plan: Plan, folder: Path) -> PackedModel:
    pack_model(student, plan, folder / "packed", assets=folder)
    return PackedModel.open(folder / "packed")


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_packed_computes_the_logits_of_the_training_forward(
    recipe: str, teacher: nn.Module, tmp_path: Path
) -> None:
    plan = plan_of(recipe)
    student = trained(build_student(teacher, plan))
    expected = logits_of(student)
    assert not torch.equal(expected, logits_of(teacher))
    shipped = decoded_model(teacher, packed_of(student, plan, tmp_path))
    assert torch.equal(logits_of(shipped), expected)


@pytest.mark.parametrize("recipe", ["q4_0", "mobile"])
def test_frozen_codes_pack_the_logits_of_the_training_forward(recipe: str, teacher: nn.Module, tmp_path: Path) -> None:
    plan = plan_of(recipe)
    student = trained(build_student(teacher, plan))
    before = logits_of(student)
    freeze_codes(student)
    assert torch.equal(logits_of(student), before)
    for quantizer in StepWeights(student).quantizers:
        if quantizer.scale_latent is not None:
            quantizer.scale_latent.data += 0.05
    expected = logits_of(student)
    assert not torch.equal(expected, before)
    assert torch.equal(logits_of(decoded_model(teacher, packed_of(student, plan, tmp_path))), expected)


def test_training_moves_what_the_recipe_trains_and_nothing_else(teacher: nn.Module, tmp_path: Path) -> None:
    plan = plan_of("q4_0")
    first = packed_of(build_student(teacher, plan), plan, tmp_path)
    (tmp_path / "later").mkdir()
    later = packed_of(trained(build_student(teacher, plan)), plan, tmp_path / "later")
    moved = {tensor.name for tensor in plan if not torch.equal(first.decode(tensor.name), later.decode(tensor.name))}
    trainable = {tensor.name for tensor in plan if tensor.rule.trainable and "layer_scalar" not in tensor.name}
    still = {PLE} | {tensor.name for tensor in plan if "layer_scalar" in tensor.name}
    assert moved >= {name for name in trainable if "norm" not in name}
    assert not moved & still


# What stays


@pytest.mark.parametrize("recipe", ["q4_0", "mobile"])
def test_a_table_that_is_not_trained_is_kept_as_codes(recipe: str, teacher: nn.Module) -> None:
    """No float copy of it, the teacher's own is left alone, and the logits are those of the ordinary way."""
    before = teacher.get_submodule(PLE.removesuffix(".weight")).weight.clone()
    plan = plan_of(recipe)
    student = build_student(teacher, plan)
    module = student.get_submodule(PLE.removesuffix(".weight"))
    assert {t.dtype for t in module.buffers() if t.shape == before.shape} == {torch.int8}
    assert not any(t.shape == before.shape for t in module.parameters())
    assert torch.equal(teacher.get_submodule(PLE.removesuffix(".weight")).weight, before)
    assert torch.equal(logits_of(student), logits_of(prepare(copy.deepcopy(teacher), plan)))


def test_names_types_and_shapes_stay(teacher: nn.Module) -> None:
    student = build_student(teacher, plan_of("everything learns"))
    before, after = teacher.state_dict(), student.state_dict()
    added = set(after) - set(before)
    assert set(before) <= set(after)
    assert added and all(".quantizer." in name for name in added)
    assert all(before[name].shape == after[name].shape for name in before)
    for old, new in zip(
        teacher.modules(), [m for n, m in student.named_modules() if "quantizer" not in n], strict=True
    ):
        assert isinstance(new, type(old)) or (type(old) is nn.Linear and isinstance(new, QuantLinear))
    missing = student.load_state_dict(before, strict=False)
    assert not missing.unexpected_keys
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_a_prepared_model_can_be_copied(teacher: nn.Module) -> None:
    student = build_student(teacher, plan_of("q4_0"))
    other = copy.deepcopy(student)
    assert torch.equal(logits_of(other), logits_of(student))
    trained(other)
    assert not torch.equal(logits_of(other), logits_of(student))


def test_the_teacher_stays_as_it_is(teacher: nn.Module) -> None:
    before, logits = copy.deepcopy(teacher.state_dict()), logits_of(teacher)
    trained(build_student(teacher, plan_of("q4_0")))
    assert torch.equal(logits_of(teacher), logits)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not any(isinstance(m, QuantLinear | QuantEmbedding) for m in teacher.modules())


# Gradients


def plain_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of an arbitrary loss by every weight."""
    model.zero_grad()
    model(input_ids=IDS).logits.sin().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "quantizer" not in name}


@pytest.mark.parametrize("recipe", ["q4_0", "embeddings f16", "everything learns", "PLE of f16 learns"])
def test_gradients_of_a_grid_without_learned_scales_pass_straight_through(recipe: str, teacher: nn.Module) -> None:
    """Through the lookup and through the tied head, to norms, and to gathered rows of the PLE table."""
    plan = plan_of(recipe)
    student = prepare(copy.deepcopy(teacher).requires_grad_(True), plan)
    decoded = copy.deepcopy(teacher).requires_grad_(True)
    parameters = dict(decoded.named_parameters()) | dict(decoded.named_buffers())
    inside: dict[str, Tensor] = {}
    for tensor in plan:
        latent = parameters[tensor.name].data.clone()
        if isinstance(tensor.grid, FloatGrid):
            parameters[tensor.name].data.copy_(tensor.grid.round(latent))
            continue
        module = student.get_submodule(tensor.name.removesuffix(".weight"))
        values, step = module.quantizer.compute(latent)
        parameters[tensor.name].data.copy_(values)
        position = (tensor.grid.blocks(latent) / step.view(*latent.shape[:-1], -1, 1)).flatten(-2)
        inside[tensor.name] = (position >= tensor.grid.code_min) & (position <= tensor.grid.code_max)
    ours, expected = plain_gradients(student), plain_gradients(decoded)
    checked = [t.name for t in plan if t.grid.ggml_type != "Q4_0" and t.rule.trainable and t.name in expected]
    assert EMBEDDING in checked and "model.norm.weight" in checked
    assert (PLE in checked) == plan[PLE].rule.trainable
    for name in checked:
        straight = torch.where(inside[name], expected[name], 0.0) if name in inside else expected[name]
        torch.testing.assert_close(ours[name], straight, rtol=1e-4, atol=1e-4)
        assert straight.abs().max() > 1e-2


def test_a_tied_embedding_learns_from_the_lookup_and_from_the_head(teacher: nn.Module) -> None:
    student = build_student(teacher, plan_of("q4_0"))
    hidden = student.model(input_ids=IDS).last_hidden_state
    by_lookup = torch.autograd.grad(hidden.sin().sum(), student.model.embed_tokens.weight, retain_graph=True)[0]
    by_head = torch.autograd.grad(student.lm_head(hidden.detach()).sum(), student.lm_head.weight)[0]
    seen = torch.zeros(256, dtype=torch.bool).index_fill(0, IDS.unique(), True)
    assert by_lookup[seen].any() and not by_lookup[~seen].any()
    assert by_head[~seen].any()


@pytest.mark.parametrize("recipe", ["everything learns", "PLE of q4_0 learns", "mobile, PLE learns"])
def test_rows_of_the_ple_table_are_gathered_before_they_are_decoded(
    recipe: str, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = build_student(teacher, plan_of(recipe))
    table = student.get_submodule(PLE.removesuffix(".weight"))
    sizes: list[int] = []
    compute = table.quantizer.compute

    def watched(latent: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        sizes.append(latent.numel())
        return compute(latent, rows)

    monkeypatch.setattr(table.quantizer, "compute", watched)
    student(input_ids=IDS).logits.sum().backward()
    assert sizes == [IDS.numel() * table.weight.shape[1]]
    seen = torch.zeros(256, dtype=torch.bool).index_fill(0, IDS.unique(), True)
    assert table.weight.grad[seen].any(-1).all()
    assert not table.weight.grad[~seen].any()


def test_a_scale_that_became_nan_is_named_with_its_tensor(teacher: nn.Module, tmp_path: Path) -> None:
    plan = plan_of("mobile")
    student = build_student(teacher, plan)
    student.model.layers[3].mlp.up_proj.quantizer.scale_latent.data[7] = torch.nan
    with pytest.raises(WeightError, match=r"layers\.3\.mlp\.up_proj\.weight: 1 of .* scales .* at row 7, block 0"):
        packed_of(student, plan, tmp_path)
    assert not list(tmp_path.iterdir())


# Float leftovers


def test_float_leftovers_are_rounded_in_the_forward_and_stay_float32_behind_it(teacher: nn.Module) -> None:
    plan = plan_of("q4_0")
    student = build_student(teacher, plan)
    for tensor in plan:
        if isinstance(tensor.grid, BlockGrid):
            continue
        path, _, attribute = tensor.name.rpartition(".")
        module = student.get_submodule(path)
        seen = getattr(module, attribute)
        assert torch.equal(seen, tensor.grid.round(teacher.state_dict()[tensor.name]))
        if tensor.spec.role != "layer_scalar":
            assert torch.equal(module._parameters["weight"], teacher.state_dict()[tensor.name])
            assert not torch.equal(module._parameters["weight"], seen)


# What cannot be attached


def test_weights_that_are_not_finite_are_named(teacher: nn.Module) -> None:
    broken = copy.deepcopy(teacher)
    broken.model.layers[2].mlp.up_proj.weight.data[3, 5] = torch.inf
    with pytest.raises(WeightError, match=r"layers\.2\.mlp\.up_proj\.weight: 1 values are NaN or Inf.*\(3, 5\)"):
        prepare(broken, plan_of("q4_0"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GEMMA4_DENSE | {"vocab_size": 256}, r"per_layer_input_gate\.weight: planned, but not in this model"),
        (
            SMALL | {"intermediate_size": 512},
            r"gate_proj\.weight: planned as \[256, 256\], but \[512, 256\] in this model",
        ),
    ],
    ids=["no PLE", "wider MLP"],
)
def test_a_plan_of_another_model_is_refused(config: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        prepare(small_model(config), plan_of("q4_0"))


@pytest.mark.parametrize("recipe", ["q4_0", "embeddings f16"])
def test_preparing_twice_is_refused(recipe: str, teacher: nn.Module) -> None:
    student = build_student(teacher, plan_of(recipe))
    with pytest.raises(InputError, match="prepared already"):
        prepare(student, plan_of(recipe))


def test_a_failed_pack_leaves_the_model_able_to_learn(teacher: nn.Module, tmp_path: Path) -> None:
    plan = plan_of("q4_0")
    student = build_student(teacher, plan)
    packed_of(student, plan, tmp_path)
    with pytest.raises(OutputError, match="already exists"):
        packed_of(student, plan, tmp_path)
    assert all(quantizer.values is None for quantizer in StepWeights(student).quantizers)
