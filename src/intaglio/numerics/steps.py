"""Steps of a grid as a file stores them: exact, or refused."""

from __future__ import annotations

import torch
from torch import Tensor

from intaglio.errors import WeightError
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.numerics.rounding import HALF_LARGEST, is_normal_positive, power_of_two_below


def check_steps(quantized: Quantized, first_row: int = 0) -> None:
    """Raise WeightError if the grid wants normal positive steps and has another one.

    first_row: where in the whole tensor these rows begin, for the message.
    """
    bad = ~is_normal_positive(quantized.step) if quantized.grid.positive else None
    if bad is None or not bool(bad.any()):
        return
    row, block = (int(i) for i in bad.nonzero()[0])
    raise WeightError(
        f"{int(bad.sum())} of {bad.numel()} scales of grid {quantized.grid.name} are zero, subnormal, negative or "
        f"not finite, the first is {float(quantized.step[row, block])!r} at row {first_row + row}, block {block}: "
        "expected normal positive float32 numbers; look for weights or gradients that are not finite"
    )


def from_steps(grid: BlockGrid, codes_RC: Tensor, step_RS: Tensor) -> Quantized:
    """Store codes and float32 steps in the file's scale types; exact, or WeightError."""
    if grid.super_block is None:
        quantized = Quantized(grid, codes_RC, step_RS.to(grid.scale_dtype))
    else:
        scale, super_scale = split_super_scale(grid, step_RS)
        quantized = Quantized(grid, codes_RC, scale, super_scale)
    check_steps(quantized)
    if not torch.equal(quantized.step, step_RS):
        bad = (quantized.step != step_RS).sum().item()
        raise WeightError(
            f"{bad} of {step_RS.numel()} steps of grid {grid.name} are not representable in the file: "
            f"largest is {step_RS.abs().max().item():.3g}, float16 ends at {HALF_LARGEST:.0f}"
        )
    return quantized


def split_super_scale(grid: BlockGrid, step_RS: Tensor) -> tuple[Tensor, Tensor]:
    """Split portable Q6_K steps into int8 scales [R, S] and power-of-two float16 [R, C / 256].

    The power of two puts the largest scale of a super-block into 64..127.
    """
    assert grid.super_block is not None
    per_super = grid.super_block // grid.block_size
    largest = step_RS.abs().unflatten(-1, (-1, per_super)).amax(-1)
    super_scale = power_of_two_below(largest) * 2.0**-6
    super_scale = super_scale.clamp_min(2.0**-24)
    scale = step_RS / super_scale.repeat_interleave(per_super, dim=-1)
    return scale.round().clamp(-128, 127).to(torch.int8), super_scale.to(torch.float16)
