"""A prepared model is the plain model with decoded weights, and what is packed computes what it computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intaglio.errors import MismatchError, OutputError, RecipeError, WeightError
from intaglio.measure.simulate import decoded_model
from intaglio.numerics.grid import BlockGrid
from intaglio.packed.checkpoint import load_model
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import Plan
from intaglio.train.grid_optimizer import GridOptimizer
from intaglio.train.latent import BlockLatent
from intaglio.train.latents import Latents, prepare
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


def trained(latents: Latents, steps: int = 1, *, lr: float = 3e-3) -> Latents:
    """A few steps away from the fit, on an arbitrary loss, as in anyone's loop."""
    optimizer = GridOptimizer(latents, lr=lr)
    for _ in range(steps):
        latents.model(input_ids=IDS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return latents


def packed_of(latents: Latents, folder: Path) -> PackedModel:
    pack_model(latents, folder / "packed", assets=folder)
    return PackedModel.open(folder / "packed")


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_packed_computes_the_logits_of_the_training_forward(
    recipe: str, teacher: nn.Module, tmp_path: Path
) -> None:
    latents = trained(build_student(teacher, plan_of(recipe)))
    expected = logits_of(latents.model)
    assert not torch.equal(expected, logits_of(teacher))
    shipped = decoded_model(teacher, packed_of(latents, tmp_path))
    assert torch.equal(logits_of(shipped), expected)


def assert_packed_as_computed(packed: PackedModel, latents: Latents) -> None:
    """Every planned tensor, decoded as a runtime decodes it in the model's dtype, is the model's own."""
    state = latents.model.state_dict()
    for tensor in packed.plan:
        value, own = packed.read(tensor.name), state[tensor.name]
        decoded = value.to(own.dtype) if isinstance(value, Tensor) else value.decode(own.dtype)
        assert torch.equal(decoded, own), tensor.name


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_packed_decodes_to_the_bfloat16_weights_of_the_forward(
    recipe: str, teacher: nn.Module, tmp_path: Path
) -> None:
    latents = trained(build_student(teacher, plan_of(recipe), dtype=torch.bfloat16))
    assert latents.model.dtype == torch.bfloat16
    assert_packed_as_computed(packed_of(latents, tmp_path), latents)


@pytest.mark.parametrize("recipe", ["q4_0", "mobile"])
def test_frozen_codes_pack_the_logits_of_the_training_forward(recipe: str, teacher: nn.Module, tmp_path: Path) -> None:
    latents = trained(build_student(teacher, plan_of(recipe)))
    before = logits_of(latents.model)
    latents.freeze_codes()
    latents.decode()
    assert torch.equal(logits_of(latents.model), before)
    for latent in latents.blocks.values():
        if latent.scale_latent is not None:
            latent.scale_latent.data += 0.05
    latents.decode()
    expected = logits_of(latents.model)
    assert not torch.equal(expected, before)
    assert torch.equal(logits_of(decoded_model(teacher, packed_of(latents, tmp_path))), expected)


def test_training_moves_what_the_recipe_trains_and_nothing_else(teacher: nn.Module, tmp_path: Path) -> None:
    plan = plan_of("q4_0")
    first = packed_of(build_student(teacher, plan), tmp_path)
    (tmp_path / "later").mkdir()
    later = packed_of(trained(build_student(teacher, plan)), tmp_path / "later")
    moved = {tensor.name for tensor in plan if not torch.equal(first.decode(tensor.name), later.decode(tensor.name))}
    trainable = {tensor.name for tensor in plan if tensor.rule.trainable and "layer_scalar" not in tensor.name}
    still = {PLE} | {tensor.name for tensor in plan if "layer_scalar" in tensor.name}
    assert moved >= {name for name in trainable if "norm" not in name}
    assert not moved & still


# What stays


@pytest.mark.parametrize("recipe", ["q4_0", "mobile"])
def test_a_table_that_is_not_trained_is_decoded_once_and_kept_as_codes(recipe: str, teacher: nn.Module) -> None:
    before = teacher.get_parameter(PLE).clone()
    latents = build_student(teacher, plan_of(recipe))
    table = latents.model.get_parameter(PLE)
    assert not table.requires_grad
    assert PLE not in latents.trained and PLE not in dict(latents.named_parameters())
    assert torch.equal(latents.still[PLE].decode(), table)
    assert torch.equal(teacher.get_parameter(PLE), before)


def test_names_types_shapes_and_ties_stay(teacher: nn.Module) -> None:
    student = build_student(teacher, plan_of("everything learns")).model
    before, after = teacher.state_dict(), student.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {
        name: (t.shape, t.dtype) for name, t in after.items()
    }
    assert [type(m) for m in teacher.modules()] == [type(m) for m in student.modules()]
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_a_trained_model_saves_and_loads_as_any_other(teacher: nn.Module, tmp_path: Path) -> None:
    latents = trained(build_student(teacher, plan_of("q4_0")))
    latents.model.save_pretrained(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert torch.equal(logits_of(loaded), logits_of(latents.model))


def test_latents_and_their_model_can_be_copied(teacher: nn.Module) -> None:
    latents = build_student(teacher, plan_of("q4_0"))
    other = trained(copy.deepcopy(latents))
    assert not torch.equal(logits_of(other.model), logits_of(latents.model))
    assert torch.equal(logits_of(trained(latents).model), logits_of(other.model))


def test_the_teacher_stays_as_it_is(teacher: nn.Module) -> None:
    before, logits = copy.deepcopy(teacher.state_dict()), logits_of(teacher)
    trained(build_student(teacher, plan_of("q4_0")))
    assert torch.equal(logits_of(teacher), logits)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


# Gradients


def plain_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of an arbitrary loss by every weight."""
    model.zero_grad()
    model(input_ids=IDS).logits.sin().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", ["q4_0", "embeddings f16", "everything learns", "PLE of f16 learns"])
def test_gradients_of_a_grid_without_learned_scales_pass_straight_through(recipe: str, teacher: nn.Module) -> None:
    """Through the lookup and through the tied head, to norms, and to the PLE table."""
    plan = plan_of(recipe)
    latents = prepare(copy.deepcopy(teacher).requires_grad_(True), plan)
    expected = {name: grad.clone() for name, grad in plain_gradients(latents.model).items()}
    latents.pull()
    checked = [t for t in plan if t.grid.ggml_type != "Q4_0" and t.rule.trainable and t.name in expected]
    names = {tensor.name for tensor in checked}
    assert EMBEDDING in names and "model.norm.weight" in names
    assert (PLE in names) == plan[PLE].rule.trainable
    for tensor in checked:
        straight, latent = expected[tensor.name], latents.trained[tensor.name]
        if isinstance(latent, BlockLatent):
            _, step = latent.compute()
            position = (latent.grid.blocks(latent.latent.detach()) / step.unsqueeze(-1)).flatten(-2)
            inside = (position >= latent.grid.code_min) & (position <= latent.grid.code_max)
            straight = torch.where(inside, straight, 0.0)
        torch.testing.assert_close(latent.latent.grad, straight, rtol=1e-4, atol=1e-4)
        assert straight.abs().max() > 1e-2


def test_a_tied_embedding_learns_from_the_lookup_and_from_the_head(teacher: nn.Module) -> None:
    student = build_student(teacher, plan_of("q4_0")).model
    hidden = student.model(input_ids=IDS).last_hidden_state
    by_lookup = torch.autograd.grad(hidden.sin().sum(), student.model.embed_tokens.weight, retain_graph=True)[0]
    by_head = torch.autograd.grad(student.lm_head(hidden.detach()).sum(), student.lm_head.weight)[0]
    seen = torch.zeros(256, dtype=torch.bool).index_fill(0, IDS.unique(), True)
    assert by_lookup[seen].any() and not by_lookup[~seen].any()
    assert by_head[~seen].any()


def test_several_backwards_are_summed_before_the_step(teacher: nn.Module) -> None:
    def gradient(parts: int) -> Tensor:
        latents = build_student(teacher, plan_of("q4_0"))
        for ids in IDS.chunk(parts):
            latents.model(input_ids=ids).logits.sum().backward()
        latents.pull()
        return latents.blocks["model.layers.0.mlp.up_proj.weight"].latent.grad

    torch.testing.assert_close(gradient(2), gradient(1), rtol=1e-3, atol=1e-3)


def test_a_scale_that_became_nan_is_named_with_its_tensor(teacher: nn.Module, tmp_path: Path) -> None:
    latents = build_student(teacher, plan_of("mobile"))
    latents.blocks["model.layers.3.mlp.up_proj.weight"].scale_latent.data[7] = torch.nan
    latents.decode()
    with pytest.raises(WeightError, match=r"layers\.3\.mlp\.up_proj\.weight: 1 of .* scales .* at row 7, block 0"):
        packed_of(latents, tmp_path)
    assert not list(tmp_path.iterdir())


# Float leftovers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_leftovers_are_rounded_in_the_forward_and_stay_float32_behind_it(
    dtype: torch.dtype, teacher: nn.Module
) -> None:
    latents = build_student(teacher, plan_of("q4_0"), dtype=dtype)
    seen, before = latents.model.state_dict(), teacher.state_dict()
    for tensor in latents.plan:
        if isinstance(tensor.grid, BlockGrid):
            continue
        assert torch.equal(seen[tensor.name], tensor.grid.round(before[tensor.name]).to(dtype))
        if tensor.spec.role != "layer_scalar":
            assert torch.equal(latents.trained[tensor.name].latent, before[tensor.name])


# What was changed behind the latents


def test_a_plain_optimizer_over_the_model_is_refused_at_packing(teacher: nn.Module, tmp_path: Path) -> None:
    latents = build_student(teacher, plan_of("q4_0"))
    optimizer = torch.optim.AdamW([p for p in latents.model.parameters() if p.requires_grad])
    latents.model(input_ids=IDS).logits.sum().backward()
    optimizer.step()
    with pytest.raises(MismatchError, match="train it with GridOptimizer in the place of another optimizer"):
        packed_of(latents, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", EMBEDDING, PLE, "model.norm.weight"])
@pytest.mark.parametrize("recipe", ["q4_0", "mobile"])
def test_a_weight_that_was_changed_is_named(name: str, recipe: str, teacher: nn.Module, tmp_path: Path) -> None:
    latents = build_student(teacher, plan_of(recipe))
    latents.model.get_parameter(name).data[3:4] += 1
    with pytest.raises(MismatchError, match=name):
        packed_of(latents, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("recipe", ["q4_0", "q4_0-free", "mobile", "embeddings q8_0", "embeddings f32"])
def test_a_model_cast_after_prepare_packs_its_forward_or_is_refused(
    recipe: str, dtype: torch.dtype, teacher: nn.Module, tmp_path: Path
) -> None:
    latents = trained(build_student(teacher, plan_of(recipe)))
    latents.model.to(dtype)
    try:
        packed = packed_of(latents, tmp_path)
    except MismatchError as error:
        assert "cast" in str(error)
    else:
        assert_packed_as_computed(packed, latents)


def test_a_model_that_was_wrapped_is_prepared_and_packed(teacher: nn.Module, tmp_path: Path) -> None:
    wrapped = torch.compile(copy.deepcopy(teacher).requires_grad_(True), backend="eager")
    latents = prepare(wrapped, plan_of("q4_0"))
    latents.model = wrapped
    assert torch.equal(logits_of(latents.model), logits_of(build_student(teacher, plan_of("q4_0")).model))
    shipped = decoded_model(teacher, packed_of(trained(latents), tmp_path))
    assert torch.equal(logits_of(shipped), logits_of(latents.model))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_data_parallel_model_is_prepared_and_packed(depth: int, teacher: nn.Module, tmp_path: Path) -> None:
    model: Any = copy.deepcopy(teacher).requires_grad_(True)
    for _ in range(depth):
        model = nn.DataParallel(model)  # names its module as DistributedDataParallel does
    latents = trained(prepare(model, plan_of("q4_0")))
    shipped = decoded_model(teacher, packed_of(latents, tmp_path))
    assert torch.equal(logits_of(shipped), logits_of(latents.model))


# What cannot be prepared


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


def test_a_failed_pack_leaves_the_model_able_to_learn(teacher: nn.Module, tmp_path: Path) -> None:
    latents = build_student(teacher, plan_of("q4_0"))
    packed_of(latents, tmp_path)
    with pytest.raises(OutputError, match="already exists"):
        packed_of(latents, tmp_path)
    before = logits_of(latents.model)
    assert not torch.equal(logits_of(trained(latents).model), before)
