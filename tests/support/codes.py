"""A runtime's int8 codes put into the training forward: does each operation, given the same codes, give the same codes?

Left to itself, a model with static int8 activations parts from any other computation of it at the first code that lies
at a border and falls to the other side; all that follows differs then. So here the forward computes every operation
on what the runtime had: it rounds its own input or output of each linear, its own keys and values, compares these
codes with the runtime's, and goes on with the runtime's. What is compared is thus everything between one rounding and
the next, and at the end the logits, in exact terms.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from intaglio.numerics.activation import encode
from intaglio.plan.plan import Plan


class Comparison:
    """Counts codes and those that differ, by the static scale that owns theirs, and how far the furthest is off.

    logits: float32 [B, T, V] of the forward on the runtime's codes.
    """

    def __init__(self, model: Any, plan: Plan, codes: dict[str, np.ndarray], ids_BT: np.ndarray):
        """codes: int8, by the names of scales, shaped as the forward has what they scale."""
        self.codes, self.furthest = codes, 0
        self.counts, self.differing = Counter[str](), Counter[str]()
        self.names = {module: name for name, module in model.named_modules()}
        self.owners = {(scale.module, scale.kind): scale.owner for scale in plan.static_scales}
        forced = patch("intaglio.train.static.static", self._force), patch("intaglio.train.kv.static", self._force)
        with forced[0], forced[1], torch.no_grad():
            self.logits: np.ndarray = model(input_ids=torch.from_numpy(ids_BT).long(), use_cache=False).logits.numpy()

    @property
    def equal_share(self) -> float:
        return 1 - self.differing.total() / self.counts.total()

    def __str__(self) -> str:
        total = f"{self.differing.total()} of {self.counts.total():,} codes differ, by {self.furthest} at most"
        return f"{total}; most for {self.differing.most_common(2)}"

    def _force(self, module: Any, kind: str, x: Tensor) -> Tensor:
        scales = getattr(module, "static", None)
        if scales is None or kind not in scales.fixed:
            return x
        name, scale = self.owners[self.names[module], kind], scales.fixed[kind]
        theirs = torch.from_numpy(self.codes[name])
        off = (encode(x, scale).int() - theirs.int()).abs()
        self.counts[name] += off.numel()
        self.differing[name] += int(off.count_nonzero())
        self.furthest = max(self.furthest, int(off.max()))
        return theirs.to(x.dtype) * scale
