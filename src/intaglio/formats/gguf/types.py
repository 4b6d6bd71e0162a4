"""Tensor types of GGUF files, and the one that holds each planned tensor."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from intaglio.errors import WeightError
from intaglio.numerics.grid import BF16, F16, F32, GGUF_GRIDS, BlockGrid, Grid, Quantized
from intaglio.numerics.rounding import HALF_SIGNIFICANT_BITS
from intaglio.plan.plan import PlannedTensor


class GgmlType(IntEnum):
    """Types that we write, by their number in a file (ggml.h: enum ggml_type)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q8_0 = 8
    Q6_K = 14
    BF16 = 30
    Q2_0 = 42


# The number of a file most of whose matrices have this type (llama.h: enum llama_ftype).
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q6_K": 18, "BF16": 32, "Q2_0": 41}
# Types whose blocks have codes of as many bits as the rows of a channel grid.
CHANNEL_TYPES = {2: "Q2_0", 4: "Q4_0", 8: "Q8_0"}


def stored_grid(tensor: PlannedTensor) -> Grid | None:
    """The grid of the type that holds every value of a planned tensor; None if GGUF has no such type.

    Its own, or for a row with one scale the type of as many bits, in each of whose blocks that scale stands, if float16
    can hold it. Vectors are float32, which llama.cpp wants of norm gains and layer scalars.
    """
    grid = tensor.grid
    if not isinstance(grid, BlockGrid):
        return F32 if len(tensor.spec.shape) < 2 else grid if grid in (F32, F16, BF16) else None
    if grid.ggml_type in GGUF_GRIDS:
        return grid
    _, blocks = GGUF_GRIDS[CHANNEL_TYPES[grid.code_bits]]
    fits = grid.step_bits <= HALF_SIGNIFICANT_BITS and grid.block_size % blocks.block_size == 0
    return blocks if fits else None


def type_of(tensor: PlannedTensor) -> GgmlType:
    """The type that a planned tensor is stored as; there must be one."""
    grid = stored_grid(tensor)
    assert grid is not None
    return GgmlType[grid.ggml_type or grid.name.upper()]


def stored_value(tensor: PlannedTensor, value: Quantized | Tensor) -> Quantized | Tensor:
    """Codes and scales as the type's blocks have them: the same codes, and a row's scale once for each block.

    Raises WeightError for a scale that float16 does not hold. Floats are returned as they are.
    """
    grid = stored_grid(tensor)
    if not isinstance(value, Quantized) or not isinstance(grid, BlockGrid) or grid == value.grid:
        return value
    half = value.scale.to(torch.float16)
    if not torch.equal(half.float(), value.scale):
        bad = value.scale[half.float() != value.scale]
        raise WeightError(
            f"{tensor.name}: {len(bad)} of {value.scale.numel()} scales are beyond float16, in which type "
            f"{grid.ggml_type} keeps them, the first is {float(bad[0])!r}: export it to gemma-mobile or mlx"
        )
    return Quantized(grid, value.codes, half.repeat_interleave(value.grid.block_size // grid.block_size, dim=-1))
