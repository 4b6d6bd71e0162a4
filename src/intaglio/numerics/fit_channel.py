"""First scales of channel grids: by the peak of a row, and by a search for the least squared error.

Shape suffixes as in `grid`: R rows, C columns, S steps in a row, K columns under one step.

With few bits and a long row, the step that reaches the peak leaves most codes unused: of a Gaussian
row, two bits keep 1 dB that way and 8 dB with the best step. So the search clips.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from intaglio.errors import WeightError
from intaglio.numerics.grid import EMPTY_STEP, BlockGrid
from intaglio.numerics.rounding import CHANNEL_STEP_LARGEST, FLOAT_SMALLEST, divide

CANDIDATES = 14
# The search begins to clip here, in root mean squares of the row, for one bit beside the sign and for
# each one more. The best clip of Gaussian rows grows so, from 1.1 at two bits to 4 at eight.
LOWEST_CLIP = 0.4
ROUNDS = 2  # of least squares after the search; a third one changes the error by less than 0.01 dB


def absmax_steps(values_RC: Tensor, grid: BlockGrid) -> Tensor:
    """The steps that put each block's largest magnitude on code_max, float32 [R, S]."""
    step = divide(grid.blocks(values_RC).abs().amax(-1), grid.code_max)
    if step.numel() and float(step.max()) > CHANNEL_STEP_LARGEST:
        raise WeightError(
            f"a weight of {float(values_RC.abs().max()):.3g} is beyond the reach of grid {grid.name}: "
            f"its scales end at {CHANNEL_STEP_LARGEST:.3g}"
        )
    return torch.where(step == 0, torch.full_like(step, EMPTY_STEP), grid.round_step(step))


def search_steps(values_RC: Tensor, grid: BlockGrid, importance_C: Tensor | None) -> Tensor:
    """Least-squares steps, float32 [R, S], for weights `importance_C` of the columns.

    Codes c explain `sum(c x)^2 / sum(c^2)` of the energy of a block x when their step is the best
    for them, `sum(c x) / sum(c^2)`; so few candidates do, from which the best codes are taken.
    """
    highest = absmax_steps(values_RC, grid)
    blocks = grid.blocks(values_RC) / highest.unsqueeze(-1)  # so that no square leaves the range of float32
    weight = None if importance_C is None else grid.blocks(importance_C.float())
    clip = LOWEST_CLIP * (1 + math.log2(grid.code_max)) / grid.code_max
    lowest = (clip * _root_mean_square(blocks, weight)).clamp(FLOAT_SMALLEST, 0.5)
    growth = lowest.log() / (CANDIDATES - 1)
    best_step, best_share = torch.ones_like(highest), torch.full_like(highest, -torch.inf)
    for i in range(CANDIDATES):
        best_step, best_share = _better(blocks, torch.exp(i * growth), grid, weight, best_step, best_share)
    for _ in range(ROUNDS):
        best_step, best_share = _better(blocks, best_step, grid, weight, best_step, best_share)
    return grid.round_step(best_step * highest)


def _root_mean_square(blocks_RSK: Tensor, weight_SK: Tensor | None) -> Tensor:
    if weight_SK is None:
        return blocks_RSK.square().mean(-1).sqrt_()
    total = weight_SK.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((blocks_RSK.square() * weight_SK).sum(-1) / total).sqrt_()


def _better(
    blocks_RSK: Tensor, step: Tensor, grid: BlockGrid, weight_SK: Tensor | None, best_step: Tensor, best_share: Tensor
) -> tuple[Tensor, Tensor]:
    """The best steps so far [R, S] and what they explain, or those of the codes nearest to x at `step`."""
    codes = (blocks_RSK / step.unsqueeze(-1)).round_().clamp_(grid.code_min, grid.code_max)
    weighted = codes if weight_SK is None else codes * weight_SK
    along_x, along_code = (weighted * blocks_RSK).sum(-1), (weighted * codes).sum(-1)
    found = along_x / along_code  # NaN where no code is other than zero, and then not better
    share = found * along_x
    better = share > best_share
    return torch.where(better, found, best_step), torch.where(better, share, best_share)
