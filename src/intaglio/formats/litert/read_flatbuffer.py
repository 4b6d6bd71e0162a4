"""Reads flatbuffers: a table points at the list of its fields' places. Knows no schema."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
MOST_TABLES = 1 << 18  # of a file; a model of 42 layers with five signatures has about 50,000


class Budget:
    """Budget of tables and list entries that may still be read of a file.

    Pointers of a hostile flatbuffer repeat, so that a small file announces billions of them. An honest one has
    each entry read a few times, once for each signature, and an entry takes at least a byte.
    """

    def __init__(self, data: Bytes):
        self.tables, self.entries = MOST_TABLES, (1 << 20) + 2 * len(data)

    def spend(self, *, tables: int = 0, entries: int = 0) -> None:
        """ValueError when more is read than an honest file of this size holds."""
        self.tables -= tables
        self.entries -= entries
        if min(self.tables, self.entries) < 0:
            raise ValueError("its lists repeat: they have more entries than such a file holds")


@dataclass(frozen=True)
class Table:
    """One table of a flatbuffer: bytes, where it begins, and what may still be read of the file."""

    data: Bytes
    start: int
    budget: Budget

    def place(self, number: int) -> int | None:
        """The place of a field's value; None if it has its default."""
        vtable = self.start - self.integer(self.start, "<i")
        slot = 4 + 2 * number
        if slot >= self.integer(vtable, "<H"):
            return None
        offset = self.integer(vtable + slot, "<H")
        return self.start + offset if offset else None

    def integer(self, place: int, format: str) -> int:
        return int(struct.unpack_from(format, self.data.data, place)[0])

    def number(self, field: int, format: str) -> int:
        place = self.place(field)
        return 0 if place is None else self.integer(place, format)

    def follow(self, place: int) -> int:
        return place + self.integer(place, "<I")

    def table(self, field: int) -> Table | None:
        place = self.place(field)
        return None if place is None else Table(self.data, self.follow(place), self.budget)

    def vector(self, field: int, dtype: str) -> NDArray[Any]:
        """A list of numbers, without a copy; empty if the field has its default.

        Whoever goes through the entries tells the budget.
        """
        place = self.place(field)
        if place is None:
            return np.zeros(0, dtype)
        start = self.follow(place)
        end = start + 4 + self.integer(start, "<I") * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError(f"a list that ends at byte {end} of {len(self.data)}")
        return self.data[start + 4 : end].view(dtype)

    def text(self, field: int) -> str:
        found = self.vector(field, "u1")
        self.budget.spend(entries=len(found))
        return found.tobytes().decode("utf-8")

    def numbers(self, field: int) -> list[int]:
        """A list of int32."""
        found = self.vector(field, "<i4")
        self.budget.spend(entries=len(found))
        return [int(number) for number in found]

    def tables(self, field: int) -> list[Table]:
        """A list of tables; empty if the field has its default."""
        place = self.place(field)
        if place is None:
            return []
        first = self.follow(place) + 4
        count = self.integer(first - 4, "<I")
        self.budget.spend(tables=count)
        return [Table(self.data, self.follow(first + 4 * i), self.budget) for i in range(count)]


def root(data: Bytes) -> Table:
    """The table that a flatbuffer begins with, and the budget of all that is read through it."""
    budget = Budget(data)
    return Table(data, Table(data, 0, budget).follow(0), budget)
