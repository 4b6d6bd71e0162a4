"""Tensors of a file as they are stored, whatever the file: safetensors, GGUF, codes of other formats.

Only headers are read to open one, and a few rows at a time after that. Nothing in a file is executed:
safetensors and gguf-py parse headers, and what they say is checked against the size of the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from intaglio.errors import ConfigError
from intaglio.formats.gguf.read import read_gguf
from intaglio.numerics.grid import GGUF_GRIDS, Quantized
from intaglio.numerics.layout import from_blocks
from intaglio.packed.store import FLOATS

# Types of GGUF without a grid here, which gguf-py decodes.
DEQUANTIZED = ("Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "IQ4_NL", "IQ4_XS")
PIECE_ELEMENTS = 1 << 22  # of a tensor that is in memory at once, and several times that of temporaries
SAMPLE_ELEMENTS = 1 << 17
SAMPLE_ROWS = 64
MOST_LAYERS = 1024  # longer lists of a GGUF, such as its tokens, are none of its metadata here


class Reader(Protocol):
    """An open file: a tensor of it by name, whole or these of its rows (of the first dimension)."""

    def read(self, name: str, rows: slice | None = None) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Stored:
    """One tensor. kind: as the file spells its type. bits: of codes, None for floats and whatever else."""

    name: str
    kind: str
    shape: tuple[int, ...]
    size_bytes: int
    reader: Reader
    bits: int | None = None

    @property
    def is_float(self) -> bool:
        return self.kind in FLOATS

    @property
    def is_matrix(self) -> bool:
        """Whether the last dimension can be cut into blocks; experts, a stack of matrices, are one."""
        return len(self.shape) >= 2 and math.prod(self.shape) > 0

    def pieces(self) -> Iterator[tuple[slice, Any]]:
        """All of it, a few rows at a time: [rows, columns], however many dimensions it has; or its Quantized."""
        for rows in row_pieces(self.shape):
            yield rows, as_matrix(self.reader.read(self.name, rows))

    def sample(self) -> Tensor:
        """Rows from all over a float tensor: [rows, columns]."""
        count = self.shape[0]
        wanted = min(count, max(1, min(SAMPLE_ROWS, SAMPLE_ELEMENTS // math.prod(self.shape[1:]))))
        starts = sorted({i * (count - 1) // max(1, wanted - 1) for i in range(wanted)})
        rows = torch.cat([as_matrix(self.reader.read(self.name, slice(i, i + 1))) for i in starts])
        return rows[:: max(1, rows.numel() // SAMPLE_ELEMENTS)]


def as_matrix(value: Any) -> Any:
    """[..., C] as [R, C]; a Quantized as it is."""
    return value.reshape(-1, value.shape[-1]) if isinstance(value, Tensor) else value


def row_pieces(shape: tuple[int, ...]) -> list[slice]:
    """Slices of the first dimension with about `PIECE_ELEMENTS` each."""
    step = max(1, PIECE_ELEMENTS // max(1, math.prod(shape[1:])))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


@dataclass(frozen=True)
class Source:
    """An opened source. kind: "floats", "mobile", "w4a16", "gguf" or "packed". config: config.json, or None;
    metadata: of a GGUF, as far as it is short.
    """

    path: Path
    kind: str
    tensors: tuple[Stored, ...]
    config: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None

    def __getitem__(self, name: str) -> Stored:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def __iter__(self) -> Iterator[Stored]:
        """Each tensor in turn. A file is closed when the next begins: pages that were read count as memory."""
        last: Reader | None = None
        try:
            for tensor in self.tensors:
                if last is not None and last is not tensor.reader:
                    last.close()
                last = tensor.reader
                yield tensor
        finally:
            if last is not None:
                last.close()


class GgufFile:
    """Tensors of a GGUF, read with plain reads; a mapping's pages would count as memory of the process."""

    def __init__(self, path: Path):
        self.path = path
        self.at: dict[str, tuple[str, tuple[int, ...], int, int]] = {}  # type, shape, offset, bytes

    def read(self, name: str, rows: slice | None = None) -> Any:
        """float tensor, or the Quantized of a type that we have a grid for."""
        kind, shape, offset, size = self.at[name]
        row_bytes = size // shape[0] if shape else size
        first, last = (rows.start, rows.stop) if rows else (0, shape[0] if shape else 1)
        data = np.fromfile(self.path, np.uint8, (last - first) * row_bytes, offset=offset + first * row_bytes)
        part = ((last - first), *shape[1:]) if shape else ()
        if kind in GGUF_GRIDS:
            (_, free), rows_of_part = GGUF_GRIDS[kind], math.prod(part[:-1])
            return from_blocks(free, data.reshape(rows_of_part, -1))
        if kind in DEQUANTIZED:
            rows_of_part = math.prod(part[:-1])
            decoded = dequantize(data.reshape(rows_of_part, -1), GGMLQuantizationType[kind])
            return torch.from_numpy(decoded).reshape(part)
        return torch.from_numpy(data).view(FLOATS[kind]).reshape(part)

    def close(self) -> None:
        """Nothing stays open."""


def open_gguf(path: Path) -> Source:
    """A GGUF's tensors and its metadata. ConfigError for a damaged one and for a wrong number of layers."""
    reader = read_gguf(path)
    file, tensors = GgufFile(path), []
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        kind = tensor.tensor_type.name
        file.at[tensor.name] = (kind, shape, int(tensor.data_offset), int(tensor.n_bytes))
        bits = GGUF_GRIDS[kind][0].code_bits if kind in GGUF_GRIDS else None
        tensors.append(Stored(tensor.name, kind, shape, int(tensor.n_bytes), file, bits))
    try:
        short = {name: f.contents() for name, f in reader.fields.items() if len(f.data) <= MOST_LAYERS}
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path}: not a valid GGUF file ({error}): download or export it again") from error
    _check_layers(path, short, [tensor.name for tensor in tensors])
    return Source(path, "gguf", tuple(tensors), metadata=short)


def _check_layers(path: Path, metadata: dict[str, Any], names: list[str]) -> None:
    parts = metadata.get("split.count", 0)
    if parts > 1:
        raise ConfigError(
            f"{path}: is one of {parts} parts: join them with `llama-gguf-split --merge FIRST OUT`, of llama.cpp"
        )
    key = f"{metadata.get('general.architecture')}.block_count"
    numbers = [int(part) for name in names if name.startswith("blk.") and (part := name.split(".")[1]).isdigit()]
    if key in metadata and numbers and metadata[key] != max(numbers) + 1:
        raise ConfigError(
            f"{path}: {key} = {metadata[key]!r}, but its tensors are those of {max(numbers) + 1} layers: "
            "the file is damaged or incomplete: download or export it again"
        )


def codes_of(value: Quantized) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and float32 steps [N] of every block."""
    grid = value.grid
    return value.codes.reshape(-1, grid.block_size), value.step.reshape(-1)
