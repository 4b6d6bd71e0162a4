"""Codes that make up for each other's rounding: GPTQ (Frantar et al. 2022, arXiv:2210.17323).

Rounding to nearest ignores that the inputs of a linear are correlated. GPTQ rounds one input column
at a time and moves what was lost onto the columns still to come, by the second moments of the
inputs. Steps are given, and so fixed that columns may be taken in any order.

The inputs are those that a linear gets behind layers that are quantized already. What it should make of
them is what the original makes of its own (asymmetric calibration: GPTAQ, Li et al. 2025, arXiv:2504.02692); here the
weights that come closest to that, by ridge regression, are found first and rounded then.

Shape suffixes: R rows, C columns of a weight (C: inputs); K columns rounded before the rest is updated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intaglio.numerics.grid import BlockGrid

DAMPING = 0.01  # of the mean second moment, added to every one: the paper's choice
COLUMNS_AT_ONCE = 128
# A latent may start this far from its code, in steps. At 0.5 the first update could undo the rounding.
CELL = 0.4


def _error_weights(moments_CC: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped second moments, float32 [C, C].

    In float64, and damped more where that does not suffice: one channel of a real model may be a
    million times as loud as its neighbours.
    """
    moments = moments_CC.double()
    diagonal = moments.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that is always zero: any code will do
    plain, unit = diagonal.clone(), diagonal.mean()
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        diagonal.copy_(plain + damping * unit)
        lower, failed = torch.linalg.cholesky_ex(moments)
        if not failed:
            break
    del moments, diagonal  # 2 GB each for the widest linears
    inverse = torch.cholesky_inverse(lower)
    del lower
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def gptq_codes(weight_RC: Tensor, step_RC: Tensor, moments_CC: Tensor, grid: BlockGrid, keep_RC: Tensor) -> Tensor:
    """Codes [R, C], float32, that lower the error of the products instead of the weights'.

    weight_RC, step_RC: float32 weights and the step of each. moments_CC: X^T X of the inputs, float32.
    keep_RC: true where the code must be that of rounding to nearest.
    """
    order = moments_CC.diagonal().argsort(descending=True)  # what matters most is rounded while most can still help
    factor = _error_weights(moments_CC[order][:, order])
    left, step, keep = weight_RC[:, order], step_RC[:, order], keep_RC[:, order]
    divisor = torch.where(step == 0, torch.ones_like(step), step)
    nearest = _round(left, divisor, grid)
    codes = torch.empty_like(left)
    for start in range(0, left.shape[1], COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, left.shape[1])
        errors = torch.empty_like(left[:, start:stop])
        for j in range(start, stop):
            column = left[:, j]
            codes[:, j] = torch.where(keep[:, j], nearest[:, j], _round(column, divisor[:, j], grid))
            error = (column - codes[:, j] * step[:, j]) / factor[j, j]
            left[:, j:stop] -= error.unsqueeze(1) * factor[j, j:stop]
            errors[:, j - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes[:, order.argsort()]


def _round(values: Tensor, divisor: Tensor, grid: BlockGrid) -> Tensor:
    return (values / divisor).round_().clamp_(grid.code_min, grid.code_max)


def ridge_of(columns: int, tokens: int) -> float:
    """Ridge that holds corrected weights where they were, in mean second moments of the inputs.

    The more weights have to be found from a token, the more: else the sample's noise is fitted. Tried on the bundled
    model with 2 to 64 thousand tokens (docs/experiments.md).
    """
    return 0.3 + 20 * columns / tokens


def corrected_weight(weight_RC: Tensor, cross_CC: Tensor, moments_CC: Tensor, tokens: int) -> Tensor:
    """Weights [R, C], float32, whose products with a linear's inputs X come closest to the original's.

    cross_CC: X^T Y of the inputs X [tokens, C] and those that the original gets, Y; moments_CC: X^T X. Minimizes
    |X W'^T - Y W^T|^2 + lambda |W' - W|^2, with lambda by `ridge_of`.
    """
    moments, cross = moments_CC.double(), cross_CC.double()
    ridge = ridge_of(len(moments), tokens) * moments.diagonal().mean()
    if ridge == 0:  # no input but zeros
        return weight_RC
    moments.diagonal().add_(ridge)
    cross.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(moments)
    del moments
    return torch.cholesky_solve(cross @ weight_RC.T.double(), factor).T.float()


def gptq_latents(weight_RC: Tensor, wanted_RC: Tensor, step_RS: Tensor, moments_CC: Tensor, grid: BlockGrid) -> Tensor:
    """Latents [R, C] whose nearest codes are GPTQ's for the wanted weights, as close to these as that allows.

    On a canonical grid the extremum of each block stays what it is in weight_RC, and with it the step.
    """
    blocks = grid.blocks(weight_RC)
    peak = blocks.abs().amax(-1, keepdim=True)
    keep = ((blocks.abs() == peak) & grid.canonical).reshape(weight_RC.shape)
    step = step_RS.repeat_interleave(grid.block_size, dim=-1)
    wanted = torch.where(keep, weight_RC, wanted_RC)
    values = gptq_codes(wanted, step, moments_CC, grid, keep) * step
    room = CELL * step.abs()
    latents = torch.where(keep, weight_RC, values + (wanted - values).clamp(-room, room))
    if not grid.canonical:
        return latents
    peaks = peak.expand_as(blocks).reshape(weight_RC.shape)
    return latents.clamp(-peaks, peaks)
