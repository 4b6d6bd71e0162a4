"""A recipe for grids that were found, tensor by tensor, in something that others made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from intaglio.errors import RecipeError
from intaglio.numerics.grid import Grid
from intaglio.plan.family import TOWER_ROLES, ModelSpec, TensorSpec
from intaglio.plan.plan import expression, make_plan
from intaglio.plan.recipe import Recipe, WeightRule


def recipe_for(model: ModelSpec, grids: dict[str, Grid], presets: Sequence[str], otherwise: Recipe) -> Recipe:
    """The first of these presets that puts every tensor on its grid; else `otherwise` with rules that do.

    grids: of all tensors of the model and of what is carried, as rules name them.
    """
    for name in presets:
        try:
            plan = make_plan(model, name)
        except RecipeError:
            continue
        if all(tensor.rule.grid == grids[tensor.name] for tensor in plan.everything):
            return plan.recipe
    groups: dict[tuple[str, str], list[TensorSpec]] = {}
    for tensor in (*model.tensors, *model.carried):
        groups.setdefault((tensor.role, grids[tensor.name].name), []).append(tensor)
    rules = [
        WeightRule(
            name=f"{role}_{grid.replace('-', '_')}",
            grid=grids[tensors[0].name],
            roles=(role,),
            match=expression(tensors),
            trainable=role not in (*TOWER_ROLES, "ple_embedding"),
        )
        for (role, grid), tensors in groups.items()
    ]
    return replace(otherwise, families=(model.family.model_type,), rules=tuple(rules))
