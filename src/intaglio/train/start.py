"""Training that goes on from a packed model: its codes and scales are those of the first forward, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.errors import InputError, RecipeError
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import Plan, PlannedTensor, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.modules import quantizers_of


def plan_to_go_on(packed: PackedModel, overrides: tuple[str, ...] | list[str] = ()) -> Plan:
    """The plan of a packed model's text, with overrides of its recipe. RecipeError for grids that do not hold it."""
    recipe = Recipe.from_toml(packed.plan.recipe.to_toml(), source="recipe of the packed model", overrides=overrides)
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


@torch.no_grad()
def begin_with(start: PackedModel, tensor: PlannedTensor, latent: Tensor) -> Callable[[Tensor, BlockGrid], Quantized]:
    """Give the latent its packed values, and return the fit that says how they are packed."""
    value = start.read(tensor.name)
    latent.data.copy_(value.decode() if isinstance(value, Quantized) else value.float())

    def fit(values: Tensor, grid: BlockGrid) -> Quantized:
        assert isinstance(value, Quantized)
        return Quantized(grid, value.codes, value.scale, value.super_scale)

    return fit


@torch.no_grad()
def check_begins(start: PackedModel, tensor: PlannedTensor, module: nn.Module, attribute: str) -> None:
    """Raise InputError unless the first forward has the packed codes and scales."""
    quantizer = quantizers_of(module).get(attribute)
    if quantizer is None:
        return
    latent = module._parameters[attribute]
    assert latent is not None
    stored, found = start.read(tensor.name), quantizer.pack(latent)
    assert isinstance(stored, Quantized)
    same = (stored.codes == found.codes).reshape(-1, quantizer.grid.block_size).all(-1)
    same &= (stored.step == found.step).flatten()
    if not bool(same.all()):
        raise InputError(
            f"{tensor.name}: {int((~same).sum())} of {same.numel()} blocks are not what training on grid "
            f"{quantizer.grid.name} begins with: on a canonical grid every block has code "
            f"{quantizer.grid.code_min}, and a scale of zero has codes of zero; "
            "choose the free grid of the same codes, for example --set "
            f"weights.{tensor.rule.name}.grid=q4_0-free"
        )
