"""Plans of the mobile recipes: Google's own bits, the names of static scales, and models that do not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from intaglio.errors import RecipeError
from intaglio.numerics.grid import BlockGrid
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from tests.support.tiny import GEMMA3, GEMMA4, GEMMA4_DENSE

GOLDEN = Path(__file__).parents[1] / "golden/mobile"
MODELS = ("E2B", "E4B")
each_model = pytest.mark.parametrize("model", MODELS)


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))


def official_bits(module: str, config: dict[str, Any]) -> int | None:
    """Bits of a linear or an embedding by the rules of transformers' reader; None where it stays float."""
    if not should_convert_module(module, config["modules_to_not_convert"]):
        return None
    patterns = config["module_quant_configs"]
    joined = "|".join(f"(?P<g{i}>{pattern})" for i, pattern in enumerate(patterns))
    found = re.search(joined, module)
    if found is None:
        return config["num_bits"]
    group = next(i for i in range(len(patterns)) if found[f"g{i}"] is not None)
    return list(patterns.values())[group]["num_bits"]


def plan_of(model: str) -> Plan:
    return make_plan(golden(f"{model}.config"), f"mobile-{model.lower()}")


@each_model
def test_the_bits_of_the_text_model_are_googles(model: str) -> None:
    quantization, plan = golden(f"{model}.quantization_config"), plan_of(model)
    for tensor in plan:
        if len(tensor.spec.shape) < 2:
            assert tensor.grid.name == "bf16"
            continue
        module = tensor.name.removesuffix(".weight").replace("model.", "model.language_model.", 1)
        bits = tensor.grid.code_bits if isinstance(tensor.grid, BlockGrid) else None
        assert bits == official_bits(module, quantization), module
    assert official_bits("lm_head", quantization) == plan["model.embed_tokens.weight"].grid.code_bits


TOWER_LINEARS = (
    "vision_tower.patch_embedder.input_proj",
    "vision_tower.encoder.layers.3.self_attn.q_proj.linear",
    "vision_tower.encoder.layers.3.mlp.down_proj.linear",
    "audio_tower.subsample_conv_projection.input_proj_linear",
    "audio_tower.layers.0.feed_forward1.ffw_layer_1.linear",
    "audio_tower.layers.0.self_attn.post.linear",
    "audio_tower.layers.0.self_attn.relative_k_proj",
    "audio_tower.layers.11.lconv1d.linear_start.linear",
    "audio_tower.layers.11.lconv1d.linear_end.linear",
    "audio_tower.output_proj",
    "embed_vision.embedding_projection",
    "embed_audio.embedding_projection",
)


@each_model
@pytest.mark.parametrize("module", TOWER_LINEARS)
def test_the_bits_of_towers_are_googles(model: str, module: str) -> None:
    rule = Recipe.load(f"mobile-{model.lower()}").rule_for(f"model.{module}.weight", "tower_linear")
    expected = official_bits(f"model.{module}", golden(f"{model}.quantization_config"))
    assert expected == (rule.grid.code_bits if isinstance(rule.grid, BlockGrid) else None)
    assert not rule.trainable


@each_model
def test_scales_stand_for_rows_and_for_slices_of_the_ple_table(model: str) -> None:
    plan = plan_of(model)
    for tensor in plan:
        if isinstance(tensor.grid, BlockGrid):
            width = 256 if tensor.spec.role == "ple_embedding" else tensor.spec.shape[1]
            assert tensor.grid.block_size == width


def test_bytes_of_e2b() -> None:
    plan = plan_of("E2B")
    table = plan["model.embed_tokens_per_layer.weight"]
    assert table.size_bytes == 262144 * 35 * (256 // 2 + 4)
    assert plan["model.embed_tokens.weight"].size_bytes == 262144 * (1536 // 4 + 4)
    assert plan["model.layers.20.mlp.down_proj.weight"].size_bytes == 1536 * (2 * 6144 // 4 + 4)
    assert plan["model.norm.weight"].size_bytes == 2 * 1536


# mobile, for any Gemma 4


@pytest.mark.parametrize(("config", "late"), [(GEMMA4, 2), (GEMMA4_DENSE, 2), (GEMMA4_DENSE | {"num_hidden_layers": 5,
    "layer_types": ["sliding_attention"] * 4 + ["full_attention"]}, 3)], ids=["shared", "dense", "odd"])  # fmt: skip
def test_late_mlps_have_two_bits(config: dict, late: int) -> None:
    plan = make_plan(config, "mobile")
    for layer in range(config["num_hidden_layers"]):
        for linear in ("gate", "up", "down"):
            grid = plan[f"model.layers.{layer}.mlp.{linear}_proj.weight"].grid
            assert grid.name == ("int2" if layer >= late else "int4")


def test_mobile_agrees_with_e2b() -> None:
    config = golden("E2B.config")
    grids = [[tensor.grid for tensor in make_plan(config, recipe)] for recipe in ("mobile", "mobile-e2b")]
    assert grids[0] == grids[1]


def test_an_untied_head_has_its_rule() -> None:
    plan = make_plan(GEMMA4 | {"tie_word_embeddings": False}, "mobile")
    assert plan["lm_head.weight"].grid.name == "int2"
    assert not [scale for scale in plan.static_scales if "lm_head" in scale.name]


@pytest.mark.parametrize("recipe", ["mobile", "mobile-e2b"])
def test_another_family_is_refused(recipe: str) -> None:
    with pytest.raises(RecipeError, match=rf"recipe {recipe} is for gemma4_text, this model is gemma3_text: choose"):
        make_plan(GEMMA3, recipe)


def test_a_tied_head_with_other_bits_than_its_embedding_is_refused() -> None:
    recipe = Recipe.load("mobile", ["weights.head.grid=int4"])
    message = r"\[weights\.head\] puts lm_head\.weight on int4, but .* tied to model\.embed_tokens\.weight, .* on int2"
    with pytest.raises(RecipeError, match=message) as caught:
        make_plan(GEMMA4, recipe)
    advice = re.search(r"--set (\S+)$", str(caught.value))[1]
    make_plan(GEMMA4, Recipe.from_toml(recipe.to_toml(), overrides=[advice]))
    make_plan(GEMMA4 | {"tie_word_embeddings": False}, recipe)


def test_a_rule_for_anything_says_nothing_of_a_tied_head() -> None:
    text = Recipe.load("q4_0").to_toml() + '\n[weights.others]\nmatch = "weight"\ngrid = "f16"\noptional = true\n'
    assert make_plan(GEMMA4, Recipe.from_toml(text))["model.embed_tokens.weight"].grid.name == "q6_k"


@pytest.mark.parametrize(
    ("config", "tensor", "multiple"),
    [
        (GEMMA4 | {"hidden_size": 258}, r"model\.layers\.2\.mlp\.gate_proj\.weight", 4),
        (GEMMA4 | {"hidden_size_per_layer_input": 33}, r"model\.embed_tokens_per_layer\.weight", 2),
    ],
    ids=["rows", "slices"],
)
def test_rows_that_end_within_a_byte_are_refused(config: dict, tensor: str, multiple: int) -> None:
    with pytest.raises(RecipeError, match=rf"{tensor}: shape .* columns that are a multiple of {multiple}[,:] "):
        make_plan(config, "mobile")


# Static scales


def test_names_and_owners_of_static_scales() -> None:
    plan = plan_of("E2B")
    scales = {scale.name: scale for scale in plan.static_scales}
    linears = 15 * 4 + 20 * 2 + 35 * 3 + 35 * 2
    assert len(scales) == len(plan.static_scales) == 2 * linears + 2 * 35
    own, shared = "model.layers.7.", "model.layers.30."

    def owner(name: str) -> str:
        return scales[name].owner

    for linear in ("q", "k", "v"):
        name = f"{own}self_attn.{linear}_proj.input_activation_scale"
        assert owner(name) == f"{own}self_attn.q_proj.input_activation_scale"
    for linear in ("gate", "up"):
        name = f"{own}mlp.{linear}_proj.input_activation_scale"
        assert owner(name) == f"{own}mlp.gate_proj.input_activation_scale"
    alone = ["mlp.down_proj", "self_attn.o_proj", "per_layer_input_gate", "per_layer_projection"]
    assert all(scales[f"{own}{module}.input_activation_scale"].owned for module in alone)
    assert all(scale.owned for scale in plan.static_scales if scale.kind == "output")
    # layer 30 is sliding, layer 34 full; the last of their kind with keys of their own are 13 and 14
    assert owner(f"{shared}self_attn.k_cache_scale") == "model.layers.13.self_attn.k_cache_scale"
    assert owner("model.layers.34.self_attn.v_cache_scale") == "model.layers.14.self_attn.v_cache_scale"
    assert scales[f"{own}self_attn.k_cache_scale"].owned
    assert scales[f"{own}self_attn.k_cache_scale"].module == f"{own}self_attn"
    assert f"{shared}self_attn.k_proj.input_activation_scale" not in scales


def test_every_owner_is_a_scale_that_owns_itself() -> None:
    for config in (GEMMA4, GEMMA4_DENSE):
        scales = {scale.name: scale for scale in make_plan(config, "mobile").static_scales}
        assert all(scales[scale.owner].owned and scales[scale.owner].kind == scale.kind for scale in scales.values())


def test_static_scales_follow_the_recipe() -> None:
    assert not make_plan(GEMMA4, "q4_0").static_scales
    some = make_plan(GEMMA4, Recipe.load("mobile", ["activations.roles=['mlp']", "weights.mlp_early.grid=f16"]))
    modules = {scale.module for scale in some.static_scales if scale.kind == "input"}
    assert modules == {f"model.layers.{i}.mlp.{p}_proj" for i in (2, 3) for p in ("gate", "up", "down")}
    assert {scale.kind for scale in some.static_scales} == {"input", "output", "k_cache", "v_cache"}


def test_the_digest_follows_activations_and_cache() -> None:
    text = Recipe.load("mobile").to_toml()
    without = re.sub(r"\[kv_cache\]\nbits = 8\n", "", text)
    dropping = Recipe.load("mobile", ["activations.dropout=0.5"])
    recipes = (Recipe.from_toml(text), Recipe.from_toml(without), dropping)
    assert len({make_plan(GEMMA4, recipe).digest for recipe in recipes}) == 3
