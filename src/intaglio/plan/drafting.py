"""Training of a drafter: the table [drafter] of a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from intaglio.plan.checks import Rule, one_of


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """Settings of a drafter's training.

    step_weights: weight of the loss of each draft step; as many steps are unrolled. clusters: whether the centroids
        of a clustered head are trained, or kept as they are; a head without clusters has none.
    """

    step_weights: tuple[float, ...] = (1.0, 0.8, 0.6)
    clusters: str = "train"


def _are_weights(value: Any) -> bool:
    numbers = isinstance(value, list) and all(type(w) in (int, float) and 0 <= w < math.inf for w in value)
    return numbers and 1 <= len(value) <= 8 and sum(value) > 0


DRAFTING_RULES = {
    "step_weights": Rule(_are_weights, "one to eight numbers, not all zero", any_type=True),
    "clusters": one_of(("train", "keep"), any_type=True),
}
