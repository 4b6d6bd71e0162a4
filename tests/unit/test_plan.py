"""Plans: every tensor, its grid and its bytes, from the config alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from gguf import GGUFReader

from intaglio.errors import ConfigError, RecipeError
from intaglio.formats.gguf.names import GGUF_ROPE_FACTORS, gguf_name
from intaglio.plan.family import describe
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from tests.support.cases import Case
from tests.support.tiny import GEMMA3, GEMMA4, GEMMA4_DENSE

# The shape of Gemma 4 E2B: five billion parameters that no test could allocate.
E2B = GEMMA4 | {
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 20,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
}


def test_a_plan_needs_nothing_but_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(E2B), "utf-8")
    plan = make_plan(tmp_path, "q4_0")
    assert plan["model.embed_tokens_per_layer.weight"].spec.shape == (262144, 35 * 256)
    assert plan["model.embed_tokens_per_layer.weight"].size_bytes == 262144 * 35 * 210
    assert plan["model.layers.20.mlp.down_proj.weight"].spec.shape == (1536, 2 * 6144)
    assert plan["model.layers.20.mlp.down_proj.weight"].size_bytes == 1536 * 2 * 6144 // 32 * 18
    assert plan.size_bytes == sum(t.size_bytes for t in plan) > 3e9
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_its_config_and_a_multimodal_config_give_one_plan(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA4), "utf-8")
    nested = {"model_type": "gemma4", "text_config": GEMMA4, "vision_config": {"hidden_size": 3}}
    ways = (tmp_path, str(tmp_path), tmp_path / "config.json", GEMMA4, nested, describe(GEMMA4))
    assert len({make_plan(way, "q4_0").digest for way in ways}) == 1


@pytest.mark.parametrize("config", [GEMMA4, GEMMA4_DENSE, GEMMA3], ids=["gemma4", "dense", "gemma3"])
def test_which_grid_each_role_gets(config: dict) -> None:
    expected = {
        "attention": "q4_0",
        "mlp": "q4_0",
        "ple_linear": "q4_0",
        "token_embedding": "q6_k",
        "ple_embedding": "q6_k",
        "ple_model_projection": "f16",
        "norm": "f32",
        "layer_scalar": "f32",
    }
    plan = make_plan(config, "q4_0")
    assert all(tensor.grid.name == expected[tensor.spec.role] for tensor in plan)
    roles = {tensor.spec.role for tensor in plan}
    assert roles >= {"attention", "mlp", "token_embedding", "norm"}
    assert ("ple_embedding" in roles) == bool(config.get("hidden_size_per_layer_input"))
    assert plan.portable
    assert not make_plan(config, "q4_0-free").portable


@pytest.mark.parametrize("grid", ["q4_0", "q8_0", "f16"])
def test_embeddings_have_options(grid: str) -> None:
    overrides = [f"weights.token_embedding.grid={grid}", f"weights.ple_embedding.grid={grid}"]
    plan = make_plan(GEMMA4, Recipe.load("q4_0", overrides))
    assert {t.grid.name for t in plan if "embed_tokens" in t.name} == {grid}


def test_a_tied_head_is_planned_once_and_an_untied_one_needs_a_rule() -> None:
    assert "lm_head.weight" not in {tensor.name for tensor in make_plan(GEMMA4, "q4_0")}
    untied = GEMMA4 | {"tie_word_embeddings": False}
    with pytest.raises(RecipeError, match=r'no rule covers lm_head\.weight \[4096, 256\].*roles = \["head"\]'):
        make_plan(untied, Recipe.load("q4_0", alone := ["weights.token_embedding.roles=['token_embedding']"]))
    head = [*alone, "weights.head.roles=['head']", "weights.head.grid=q6_k"]
    assert make_plan(untied, Recipe.load("q4_0", head))["lm_head.weight"].grid.name == "q6_k"


# The digest


def test_equal_plans_have_equal_digests() -> None:
    again = Recipe.from_toml(Recipe.load("q4_0").to_toml())
    reordered = dict(reversed(GEMMA4.items()))
    assert make_plan(GEMMA4, "q4_0").digest == make_plan(reordered, again).digest


@pytest.mark.parametrize(
    "override",
    [
        "weights.token_embedding.grid=q8_0",
        "weights.ple_embedding.trainable=true",
        "schedule.lr=2e-4",
        "schedule.seed=1",
        "fit=mse",
    ],
)
def test_the_digest_follows_the_recipe(override: str) -> None:
    plain, changed = make_plan(GEMMA4, "q4_0"), make_plan(GEMMA4, Recipe.load("q4_0", [override]))
    assert (plain.digest == changed.digest) == (override == "fit=mse")  # which is what the preset says


def test_the_digest_follows_the_config() -> None:
    configs = (GEMMA4, GEMMA4_DENSE, GEMMA4 | {"final_logit_softcapping": None})
    assert len({make_plan(config, "q4_0").digest for config in configs}) == 3


# What a recipe cannot do


def test_a_rule_that_matches_nothing_is_named() -> None:
    text = Recipe.load("q4_0").to_toml() + '\n[weights.experts]\nmatch = "experts"\ngrid = "q4_0"\n'
    with pytest.raises(RecipeError, match=r"\[weights\.experts\] matches no tensor.*optional = true"):
        make_plan(GEMMA4, Recipe.from_toml(text))
    make_plan(GEMMA4, Recipe.from_toml(text + "optional = true\n"))


def test_a_rule_that_is_always_too_late_is_named() -> None:
    text = Recipe.load("q4_0").to_toml() + '\n[weights.late]\nroles = ["mlp"]\ngrid = "f16"\n'
    with pytest.raises(RecipeError, match=r"\[weights\.late\] matches no tensor"):
        make_plan(GEMMA4, Recipe.from_toml(text))


def follow_the_advice(recipe: Recipe, message: str) -> Recipe:
    """Do to the recipe what an error suggests."""
    if override := re.search(r"--set (\S+)$", message):
        return Recipe.from_toml(recipe.to_toml(), overrides=[override[1]])
    before = re.search(r"before (\[weights\.\w+\])", message)[1]
    table, *lines = re.search(r"(\[weights\.\w+\]) with (match = \S+) and (grid = \S+)$", message).groups()
    return Recipe.from_toml(recipe.to_toml().replace(before, "\n".join([table, *lines, "", before])))


@pytest.mark.parametrize(
    ("config", "grid", "tensors", "multiple"),
    [
        # the double-wide MLPs of layers 2 and 3 fit
        (GEMMA4 | {"intermediate_size": 272}, "q4_0", r"model\.layers\.[01]\.mlp\.down_proj\.weight", 32),
        (GEMMA3 | {"hidden_size": 272}, "q4_0", r"model\.layers\.\d\..*(q|k|v|gate|up)_proj\.weight", 32),
        (GEMMA4 | {"hidden_size": 288}, "q6_k", r"model\.embed_tokens\.weight", 256),
        (GEMMA4 | {"hidden_size_per_layer_input": 32}, "q6_k", r"model\.embed_tokens_per_layer\.weight", 256),
    ],
    ids=["some", "several kinds", "all of a rule", "ple"],
)
def test_columns_that_do_not_fit_are_named_with_a_rule_that_works(
    config: dict, grid: str, tensors: str, multiple: int
) -> None:
    recipe = Recipe.load("q4_0", [] if config["hidden_size"] != 272 else ["weights.token_embedding.grid=f16"])
    expected = rf"^{tensors}: shape \[\d+, \d+\] does not fit grid {grid} .* multiple of {multiple}[,:] "
    with pytest.raises(RecipeError, match=expected) as caught:
        make_plan(config, recipe)
    plan = make_plan(config, follow_the_advice(recipe, str(caught.value)))
    moved = {tensor.name for tensor in plan if re.fullmatch(tensors, tensor.name)}
    assert moved == {t.name for t in plan if t.grid.name == "f16" and t.rule.name != "ple_model_projection"} - (
        {"model.embed_tokens.weight"} if config["hidden_size"] == 272 else set()
    )


def test_a_vector_is_no_matrix() -> None:
    recipe = Recipe.load("q4_0", ["weights.float.grid=q4_0"])
    with pytest.raises(RecipeError, match=r"norm\.weight: shape \[\d+\] does not fit grid q4_0") as caught:
        make_plan(GEMMA4, recipe)
    assert make_plan(GEMMA4, follow_the_advice(recipe, str(caught.value))).digest == make_plan(GEMMA4, "q4_0").digest


def test_a_vector_takes_four_bytes_a_value_in_the_file_on_any_float_grid() -> None:
    plan = make_plan(GEMMA4, Recipe.load("q4_0", ["weights.float.grid=f16"]))
    assert plan["model.norm.weight"].size_bytes == 4 * 256


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}), "utf-8")
    with pytest.raises(
        ConfigError, match=r"model_type 'llama': expected one of gemma2, gemma3, gemma3_text, gemma4, .*gemma4_text"
    ):
        make_plan(tmp_path, "q4_0")


def test_a_tensor_of_unknown_role_is_named() -> None:
    with pytest.raises(ConfigError, match=r"q_proj\.bias: a tensor of unknown role"):
        make_plan(GEMMA4 | {"attention_bias": True}, "q4_0")


def test_sliding_layers_need_a_window() -> None:
    with pytest.raises(ConfigError, match="sliding_window = None: expected a number of tokens"):
        make_plan(GEMMA3 | {"sliding_window": None}, "q4_0")


# The plan and the file


def test_bytes_are_those_of_the_gguf(case: Case) -> None:
    stored = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(case.gguf).tensors}
    stored.pop(GGUF_ROPE_FACTORS, None)
    assert {gguf_name(tensor.name): tensor.size_bytes for tensor in case.packed.plan} == stored


def test_rows_are_ready_for_json() -> None:
    plan: Plan = make_plan(GEMMA4, "q4_0")
    rows = json.loads(json.dumps(plan.rows()))
    assert [row["tensor"] for row in rows] == [tensor.name for tensor in plan]
    assert rows[0] == {
        "tensor": "model.embed_tokens.weight",
        "role": "token_embedding",
        "shape": [4096, 256],
        "grid": "q6_k",
        "bytes": 4096 * 210,
        "rule": "token_embedding",
    }
