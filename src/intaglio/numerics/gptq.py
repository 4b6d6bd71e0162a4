"""Codes that make up for each other's rounding: GPTQ (Frantar et al. 2022, arXiv:2210.17323).

Rounding to nearest ignores that the inputs of a linear are correlated. GPTQ rounds one input column
at a time and moves what was lost onto the columns still to come, by the second moments of the
inputs. Steps are given, and so fixed that columns may be taken in any order.

Shape suffixes: R rows, C columns of a weight (C: inputs); K columns rounded before the rest is updated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intaglio.numerics.grid import BlockGrid

DAMPING = 0.01  # of the mean second moment, added to every one: the paper's choice
COLUMNS_AT_ONCE = 128
# How far from its code a latent may start, in steps. At 0.5 the first update could undo the rounding.
CELL = 0.4


def _error_weights(moments_CC: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped second moments, float32 [C, C].

    In float64, and damped more where that does not suffice: one channel of a real model may be a
    million times as loud as its neighbours.
    """
    moments = moments_CC.double()
    diagonal = moments.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that is always zero: any code will do
    unit = torch.eye(len(moments), dtype=moments.dtype, device=moments.device) * diagonal.mean()
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        lower, failed = torch.linalg.cholesky_ex(moments + damping * unit)
        if not failed:
            break
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True).float()


def gptq_codes(weight_RC: Tensor, step_RC: Tensor, moments_CC: Tensor, grid: BlockGrid, keep_RC: Tensor) -> Tensor:
    """Codes [R, C], float32, that lower the error of the products instead of the weights'.

    weight_RC, step_RC: float32 weights and the step of each. moments_CC: X^T X of the inputs, float32.
    keep_RC: true where the code must be that of rounding to nearest.
    """
    order = moments_CC.diagonal().argsort(descending=True)  # what matters most is rounded while most can still help
    factor = _error_weights(moments_CC[order][:, order])
    left, step, keep = weight_RC[:, order], step_RC[:, order], keep_RC[:, order]
    nearest = _round(left, step, grid)
    codes = torch.empty_like(left)
    for start in range(0, left.shape[1], COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, left.shape[1])
        errors = torch.empty_like(left[:, start:stop])
        for j in range(start, stop):
            column = left[:, j]
            codes[:, j] = torch.where(keep[:, j], nearest[:, j], _round(column, step[:, j], grid))
            error = (column - codes[:, j] * step[:, j]) / factor[j, j]
            left[:, j:stop] -= error.unsqueeze(1) * factor[j, j:stop]
            errors[:, j - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes[:, order.argsort()]


def _round(values: Tensor, step: Tensor, grid: BlockGrid) -> Tensor:
    position = values / torch.where(step == 0, torch.ones_like(step), step)
    return position.round().clamp(grid.code_min, grid.code_max)


def gptq_latents(weight_RC: Tensor, step_RS: Tensor, moments_CC: Tensor, grid: BlockGrid) -> Tensor:
    """Latents [R, C] whose nearest codes are GPTQ's, as close to the weights as that allows.

    On a canonical grid the extremum of each block stays what it is, and with it the step.
    """
    blocks = grid.blocks(weight_RC)
    peak = blocks.abs().amax(-1, keepdim=True)
    keep = ((blocks.abs() == peak) & grid.canonical).reshape(weight_RC.shape)
    step = step_RS.repeat_interleave(grid.block_size, dim=-1)
    values = gptq_codes(weight_RC, step, moments_CC, grid, keep) * step
    room = CELL * step.abs()
    latents = torch.where(keep, weight_RC, values + (weight_RC - values).clamp(-room, room))
    if not grid.canonical:
        return latents
    peaks = peak.expand_as(blocks).reshape(weight_RC.shape)
    return latents.clamp(-peaks, peaks)
