"""Tables of formats: their stock references, and the files that CONTRIBUTING.md names for a new grid or format."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from intaglio.cli.ship import TARGETS
from intaglio.errors import RecipeError
from intaglio.formats.table import EXPORTERS, GGUF, format_of
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.quantize import quantize
from tests.support.tiny import GEMMA4, GEMMA4_DENSE, make_checkpoint

ROOT = Path(__file__).parents[2]
PLE = "model.embed_tokens_per_layer.weight"
NARROW = GEMMA4 | {"hidden_size_per_layer_input": 32}  # rows of 128, which Q6_K cannot hold


def test_the_stock_reference_of_the_preset_is_the_preset() -> None:
    made, preset = GGUF.stock_recipe(Recipe.load("q4_0")), Recipe.load("q4_0-stock")
    assert (made.name, made.summary, made.fit, made.rules) == (preset.name, preset.summary, preset.fit, preset.rules)


@pytest.mark.parametrize(
    ("override", "grid"),
    [
        ("ple_embedding.grid=q8_0", "q8_0-free"),
        ("ple_embedding.grid=q4_0", "q4_0-free"),
        ("ple_embedding.grid=f16", "f16"),
    ],
)
def test_it_follows_what_the_recipe_puts_elsewhere(override: str, grid: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not fit grid q6_k"):
        make_plan(NARROW, "q4_0")
    plan = make_plan(NARROW, Recipe.load("q4_0", [f"weights.{override}"]))
    stock = make_plan(NARROW, format_of(plan).stock_recipe(plan.recipe))
    assert stock[PLE].grid.name == grid
    assert stock[PLE].grid.ggml_type == plan[PLE].grid.ggml_type
    quantize(make_checkpoint(tmp_path / "model", NARROW), stock, tmp_path / "stock")


@pytest.mark.parametrize("recipe", ["q4_0", "q4_0-free", "q4_0-stock", "q2_0", "mobile", "q4_0-litert"])
def test_a_recipe_that_can_be_planned_has_a_reference(recipe: str) -> None:
    for config in (GEMMA4, GEMMA4_DENSE, GEMMA4 | {"tie_word_embeddings": False}):
        plan = make_plan(config, recipe)
        stock = make_plan(config, format_of(plan).stock_recipe(plan.recipe))
        assert [tensor.grid.ggml_type for tensor in stock] == [tensor.grid.ggml_type for tensor in plan]
        assert Recipe.from_toml(stock.recipe.to_toml()) == stock.recipe


def files_to_add(title: str) -> dict[str, str]:
    """Text of each file in the table of a section of CONTRIBUTING.md."""
    section = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([\w/.]+)` \| (.+) \|$", section, re.MULTILINE))


@pytest.mark.parametrize("title", ["Add a grid", "Add a format"])
def test_a_file_to_add_to_has_the_tables_that_are_named(title: str) -> None:
    files = files_to_add(title)
    assert len(files) == 6
    for path, row in files.items():
        if "NAME" not in path:
            text = (ROOT / path).read_text("utf-8")
            assert all(re.search(rf"\b{name}\b", text) for name in re.findall(r"`(\w*[A-Z_]\w*)`", row)), path


def test_no_other_file_knows_the_name_of_a_grid() -> None:
    texts = {path: path.read_text("utf-8") for kind in ("py", "toml") for path in (ROOT / "src").rglob(f"*.{kind}")}
    known = {
        path.relative_to(ROOT).as_posix() for path, text in texts.items() if re.search(r"\bq2_0", text, re.IGNORECASE)
    }
    assert known == set(files_to_add("Add a grid"))


def test_every_target_of_export_is_in_its_help() -> None:
    assert re.findall(r"(?:^|, )([\w-]+)", TARGETS) == [name for name in sorted(EXPORTERS, key=TARGETS.index)]
