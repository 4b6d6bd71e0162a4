"""A count of what was compared and of what differs, and the walk through a folder's tensors that fills it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from intaglio.packed.shards import shards
from intaglio.packed.store import SAFETENSORS_DTYPES, SafetensorsReader, headers


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


class Listed(Protocol):
    """A tensor as a format lists it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


ListedTensor = TypeVar("ListedTensor", bound=Listed)


def stored_as_listed(
    folder: Path, listed: Iterable[ListedTensor], tally: Tally
) -> Iterator[tuple[ListedTensor, SafetensorsReader]]:
    """Each listed tensor that a folder's safetensors hold in its dtype and shape, with the file it is in.

    The others are counted into `tally`: missing, extra, or unlike what is listed.
    """
    expected = {tensor.name: tensor for tensor in listed}
    seen: set[str] = set()
    for shard in shards(folder):
        found = headers(shard)
        seen |= set(found)
        tally.extra += sorted(set(found) - set(expected))
        with SafetensorsReader(shard) as file:
            for name, kind in found.items():
                if name not in expected:
                    continue
                tally.counts["tensors"] += 1
                tensor = expected[name]
                if kind == (SAFETENSORS_DTYPES[tensor.dtype], tensor.shape):
                    yield tensor, file
                else:
                    tally.unlike.append(name)
    tally.missing += sorted(set(expected) - seen)
