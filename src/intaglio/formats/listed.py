"""Tensors of a folder of safetensors, as a format lists them; and the comparison of such a folder with the list.

A format's layout makes the list from a plan. Its writer fills the tensors, and its reader compares them, so that both
have the names, dtypes and shapes from one place, and each its own way to lay out and take apart codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from intaglio.formats.tally import Tally
from intaglio.numerics.grid import Quantized
from intaglio.packed.model import PackedModel
from intaglio.packed.shards import shards
from intaglio.packed.store import SAFETENSORS_DTYPES, SafetensorsReader, headers


@dataclass(frozen=True)
class Piece:
    """Some rows of one expert, of a tensor [E, R, C] of all experts: a linear of its own in formats for vLLM."""

    expert: int
    rows: slice

    def of(self, value: Quantized, first: int = 0) -> Quantized:
        """These rows, a matrix, of a value whose first expert is number `first`."""
        parts = (value.codes, value.scale, value.super_scale)
        mine = (None if part is None else part[self.expert - first, self.rows] for part in parts)
        return Quantized(value.grid, *mine)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ListedTensor:
    """One tensor of a folder.

    part: "codes", "scale", "bias" and "shape" of a planned tensor that stays on its grid, "values" of one that
    is written as floats, or a "static" scale. source: our name of the planned tensor or of the scale. A head that is
    tied to the embedding has the embedding's codes and scales.
    repeat: how many times in a row each scale of the grid stands. matrix: for a "shape", what it says.
    piece: which part of the planned tensor it is, if not all.
    """

    name: str
    part: Literal["codes", "scale", "bias", "shape", "values", "static"]
    source: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    repeat: int = 1
    matrix: tuple[int, int] | None = None
    piece: Piece | None = None


def codes_in_bytes(data: np.ndarray, bits: int) -> Tensor:
    """int8 codes [R, C] of stored bytes [R, C x bits / 8]: fields from the lowest bits on, each less half its range."""
    fields = data[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8((1 << bits) - 1)
    return torch.from_numpy((fields.astype(np.int16) - (1 << (bits - 1))).astype(np.int8).reshape(len(data), -1))


def compare_listed(
    packed: PackedModel, folder: Path, listed: list[ListedTensor], unpack: Callable[[Tensor, int], Tensor], tally: Tally
) -> None:
    """Count into `tally` what of a folder's tensors differs from the packed model.

    unpack: int8 codes [R, C] of stored rows and the bits of a code.
    """
    static = packed.read_static()
    for tensor, file in _found(folder, listed, tally):
        if tensor.part == "static":
            expected = torch.full(tensor.shape, static.get(tensor.source, 0.0))
            tally.compare("static_scales", expected, file.read(tensor.name))
        elif tensor.part == "shape":
            if file.read(tensor.name).tolist() != list(tensor.matrix or ()):
                tally.unlike.append(tensor.name)
        else:
            for rows, value in _pieces(packed, tensor):
                _compare_rows(tensor, value, file.read(tensor.name, rows), unpack, tally)


def _compare_rows(
    tensor: ListedTensor,
    value: Quantized | Tensor,
    data: Tensor,
    unpack: Callable[[Tensor, int], Tensor],
    tally: Tally,
) -> None:
    if not isinstance(value, Quantized):
        tally.compare("values", value.float(), data.float())
    elif tensor.part == "values":
        tally.compare("values", value.decode(), data.float())
    elif tensor.part == "codes":
        tally.compare("codes", value.codes, unpack(data, value.grid.code_bits))
    else:
        # a scale for each group, all groups of a block alike; a bias is that of the code in the middle
        factor = -(1 << (value.grid.code_bits - 1)) if tensor.part == "bias" else 1
        tally.compare("scales", (value.step * factor).repeat_interleave(tensor.repeat, dim=1), data.float())


def _pieces(packed: PackedModel, tensor: ListedTensor) -> Iterator[tuple[slice | None, Quantized | Tensor]]:
    """Expected values of a tensor of the folder, a few rows at a time."""
    if tensor.piece is None:
        yield from packed.chunks(tensor.source)
        return
    expert = tensor.piece.expert
    value = packed.read(tensor.source, slice(expert, expert + 1))
    assert isinstance(value, Quantized)
    yield None, tensor.piece.of(value, expert)


def _found(
    folder: Path, listed: Iterable[ListedTensor], tally: Tally
) -> Iterator[tuple[ListedTensor, SafetensorsReader]]:
    """Each listed tensor that the folder's safetensors hold in its dtype and shape, with the file it is in.

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
