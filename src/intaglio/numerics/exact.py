"""Values that lie on a portable grid of Q6_K or Q8_0, solved for the codes and steps that gave them.

A portable grid's values are exact in every float format, so a block is integers times a power of two. Its step divides
their greatest common divisor. Of the steps that do, and that the grid has, the finest that keeps all codes in range is
taken: a fit leaves no code range unused. Shape suffixes as in `grid`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intaglio.errors import WeightError
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.numerics.rounding import round_significant
from intaglio.numerics.steps import from_steps

# Times the power of two that makes a block's extremum 1 to 2, every value of 24 significant bits and at least 1/128 of
# the extremum is an integer.
UNITS = 2.0**40
FIRST_ROWS = 8  # looked at before all others: latent values fail at once


def solve(values_RC: Tensor, grid: BlockGrid) -> Quantized | None:
    """Codes and scales that decode to just these values; None if a block has none, or the grid is not portable.

    Zeros keep their signs too: a code of zero has that of its step.
    """
    if not grid.portable or grid.positive or values_RC.shape[-1] % grid.column_multiple:
        return None
    if len(values_RC) > FIRST_ROWS and solve(values_RC[:FIRST_ROWS], grid) is None:
        return None
    step_RS = _steps(grid.blocks(values_RC).double(), grid)
    if not bool(torch.isfinite(step_RS).all()):
        return None
    try:
        found = from_steps(grid, grid.encode(values_RC.float(), step_RS), step_RS)
    except WeightError:  # steps of a super-block that share no multiplier
        return None
    return found if torch.equal(found.decode(), values_RC.float()) else None


def _steps(blocks_RSK: Tensor, grid: BlockGrid) -> Tensor:
    """The step of each block, float32 [R, S]: NaN where there is none, -0.0 for a block of zeros."""
    top = blocks_RSK.abs().amax(-1)
    usable = (top > 0) & torch.isfinite(top)
    _, exponent = torch.frexp(torch.where(usable, top, 1.0))
    scaled = torch.ldexp(blocks_RSK, (1 - exponent).unsqueeze(-1)) * UNITS
    whole = scaled.round()
    usable &= (whole == scaled).all(-1)
    integers = torch.where(usable.unsqueeze(-1), whole, 0.0).long()
    divisor = torch.zeros_like(integers[..., 0])
    for column in integers.unbind(-1):
        divisor = torch.gcd(divisor, column)
    divisor.clamp_(min=1)
    sign = _signs(blocks_RSK)
    ends = torch.stack([integers.amin(-1), integers.amax(-1)]) // divisor * sign.long()
    lowest, highest = ends.amin(0), ends.amax(0)  # codes, if the divisor is the step
    unit = torch.ldexp(torch.ones_like(top), exponent - 1) / UNITS
    step = torch.full(top.shape, torch.nan, dtype=torch.float32)
    for finer in range(1, -grid.code_min + 1):
        fits = usable & (lowest * finer >= grid.code_min) & (highest * finer <= grid.code_max)
        if not bool(fits.any()):
            break
        candidate = (divisor.double() / finer) * unit
        narrow = round_significant(candidate.float(), grid.step_bits)
        exact = fits & (narrow.double() * finer == divisor.double() * unit)
        step = torch.where(exact, narrow, step)
    return torch.where(top == 0, 0.0, step).copysign(sign)


def _signs(blocks_RSK: Tensor) -> Tensor:
    """The sign of each block's step, 1 or -1: that of its zeros, or without any the one that makes the extremum's code
    negative, as where a fit begins."""
    low, high = blocks_RSK.amin(-1), blocks_RSK.amax(-1)
    free = torch.where(high >= -low, -1.0, 1.0)
    zero = blocks_RSK == 0
    below = (zero & blocks_RSK.signbit()).any(-1)
    return torch.where(zero.any(-1), torch.where(below, -1.0, 1.0), free)
