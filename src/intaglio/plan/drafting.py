"""Training of a drafter: the table [drafter] of a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from intaglio.errors import RecipeError
from intaglio.plan.checks import check_keys

CLUSTERS = ("train", "keep")


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """Settings of a drafter's training.

    step_weights: weight of the loss of each draft step; as many steps are unrolled. clusters: whether the centroids
        of a clustered head are trained, or kept as they are; a head without clusters has none.
    """

    step_weights: tuple[float, ...] = (1.0, 0.8, 0.6)
    clusters: str = "train"


def parse_drafting(body: Any, source: str) -> Drafting | None:
    """The table [drafter] of a recipe, if it has one."""
    if body is None:
        return None
    where = f"{source}: [drafter]"
    if not isinstance(body, dict):
        raise RecipeError(f"{where}: expected a table, got {body!r}")
    check_keys(body, {"step_weights", "clusters"}, where)
    weights = body.get("step_weights", list(Drafting.step_weights))
    numbers = isinstance(weights, list) and all(type(w) in (int, float) and 0 <= w < math.inf for w in weights)
    if not numbers or not 1 <= len(weights) <= 8 or not sum(weights):
        raise RecipeError(f"{where}: step_weights = {weights!r}: expected one to eight numbers, not all zero")
    clusters = body.get("clusters", "train")
    if clusters not in CLUSTERS:
        raise RecipeError(f"{where}: clusters = {clusters!r}: expected one of {', '.join(CLUSTERS)}")
    return Drafting(step_weights=tuple(float(w) for w in weights), clusters=clusters)
