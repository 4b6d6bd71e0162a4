"""A count of what was compared and of what differs."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor


class Tally:
    """Counts by kind: tensors, and codes, scales, static scales and values with those of other bits.

    facts: how many facts beside the weights were compared, by their group (see `formats/facts.py`). unlike_facts: a
    sentence for each that is another. unsaid: what the format has no place for, or its runtime adds by itself.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device  # where weights are decoded and compared
        self.counts: Counter[str] = Counter()
        self.differing: Counter[str] = Counter()
        self.missing: list[str] = []
        self.extra: list[str] = []
        self.unlike: list[str] = []
        self.facts: Counter[str] = Counter()
        self.unlike_facts: list[str] = []
        self.unsaid: list[str] = []

    def compare(self, kind: str, expected: Tensor, found: Tensor) -> None:
        """Count the elements of two tensors of one dtype and shape whose bits differ."""
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
        self.counts[kind] += expected.numel()
        self.differing[kind] += int((expected.contiguous().view(bits) != found.contiguous().view(bits)).sum())
