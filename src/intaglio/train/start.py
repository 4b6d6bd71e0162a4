"""Training that goes on from a packed model: its codes and scales are those of the first forward, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from intaglio.errors import InputError, RecipeError
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import Plan, PlannedTensor, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.latent import BlockLatent


def plan_to_go_on(packed: PackedModel, overrides: tuple[str, ...] | list[str] = ()) -> Plan:
    """The plan of a packed model's text, with overrides of its recipe. RecipeError for grids that do not hold it.

    The stage "layers" of its own recipe is behind it; one that the overrides ask for is a RecipeError too.
    """
    packed_by = packed.plan.recipe
    stages = tuple(stage for stage in packed_by.schedule.stages if stage != "layers") or ("model",)
    text = packed_by.with_schedule(stages=stages).to_toml()
    recipe = Recipe.from_toml(text, source="recipe of the packed model", overrides=overrides)
    if "layers" in recipe.schedule.stages:
        raise RecipeError("schedule.stages: the stage 'layers' begins with a checkpoint of floats, not a packed model")
    whole = make_plan(packed.plan.model, recipe)
    for tensor in whole.everything:
        before = packed.plan[tensor.name].grid
        if not _holds(tensor.grid, before):
            raise RecipeError(
                f"{tensor.name}: is on grid {before.name} in {packed.path}, and cannot go on on {tensor.grid.name}: "
                "expected the same grid, or the free one of the same codes"
            )
    return replace(whole.text_only(), carried=())


def _holds(grid: Any, before: Any) -> bool:
    if grid == before:
        return True
    if not isinstance(grid, BlockGrid) or not isinstance(before, BlockGrid):
        return False
    free = replace(before, name=grid.name, step_bits=grid.step_bits, canonical=grid.canonical)
    return grid == free and grid.step_bits >= before.step_bits and not grid.canonical


def check_begins(stored: Quantized, latent: BlockLatent, tensor: PlannedTensor) -> None:
    """Raise InputError unless the first forward has the packed codes and scales."""
    found = latent.pack()
    same = (stored.codes == found.codes).unflatten(-1, (-1, latent.grid.block_size)).all(-1)
    same &= stored.step == found.step
    if not bool(same.all()):
        raise InputError(
            f"{tensor.name}: {int((~same).sum())} of {same.numel()} blocks are not what training on grid "
            f"{latent.grid.name} begins with: on a canonical grid every block has code "
            f"{latent.grid.code_min}, and a scale of zero has codes of zero; "
            "choose the free grid of the same codes, for example --set "
            f"weights.{tensor.rule.name}.grid=q4_0-free"
        )
