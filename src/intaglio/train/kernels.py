"""The arithmetic of fake quantization: decoded values of blocks of latents, and their gradients.

Shape suffixes: R rows, C columns, S steps in a row; N blocks of K neighbouring columns.

Four modes say where a block's step comes from. `z` is the learned scale latent of a block.

    canonical  step = extremum / code_min x ratio(z), ratio in (0.6, 1]: clips, never widens, so
               the extremum keeps code_min and llama.cpp's quantizer finds the same grid again
    free       step = base x exp(z), from the base that the first fit gave; it keeps its sign
    fixed      step as fitted; only the codes follow the latents
    frozen     step = base x exp(z), and the codes stand still

Rounding passes gradients straight through (STE); clipping stops them, and what clipping stops
reaches the step instead, as in LSQ (Esser et al. 2020, arXiv:1902.08153). The backward recomputes
codes and steps from the latents: nothing but the latents themselves is kept between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from intaglio.numerics.grid import BlockGrid

LOWEST_RATIO = 0.6  # of the canonical step; a tighter clip would cost more than it gains
CHUNK_ELEMENTS = 1 << 17


def _extremum(blocks_NK: Tensor) -> Tensor:
    """Signed value of largest magnitude [N]. Of a tie in magnitude the positive value is taken:
    its opposite is clipped to code_max, so the decoded block has one extremum all the same."""
    highest, lowest = blocks_NK.amax(-1), blocks_NK.amin(-1)
    return torch.where(highest >= -lowest, highest, lowest)


class Scales(NamedTuple):
    """Figures of blocks apart from their elements, each float32 [N], or empty where a mode has none.

    step: as rounded for the file. divisor: the same, but 1 where it is zero. peak: the extremum that a
    canonical step follows. pull, slope: derivatives of the step by the peak and by z.
    """

    step: Tensor
    divisor: Tensor
    peak: Tensor
    pull: Tensor
    slope: Tensor


def features(mode: str, blocks: Tensor, z: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Peak, activation of z, and `given`: the part of `scales_of` that must see each weight alone.

    The last bits of an exponential depend on where in the tensor an element is; those of the rest do not.
    """
    none = z.new_empty(0)
    if mode == "fixed":
        return none, none, given
    if mode == "canonical":
        return _extremum(blocks), torch.sigmoid(z), none
    return none, torch.exp(z), given


def scales_of(mode: str, grid: BlockGrid, peak: Tensor, activation: Tensor, given: Tensor) -> Scales:
    """Steps and their derivatives. `given`: bases (free, frozen) or the steps themselves (fixed), float32."""
    pull = slope = given.new_empty(0)
    if mode == "fixed":
        step = given
    elif mode == "canonical":
        widest = peak / grid.code_min
        ratio = LOWEST_RATIO + (1 - LOWEST_RATIO) * activation
        step = grid.round_step(widest * ratio)
        pull, slope = ratio / grid.code_min, widest * ((1 - LOWEST_RATIO) * activation * (1 - activation))
    else:
        slope = given * activation
        step = grid.round_step(slope)
    return Scales(step, torch.where(step == 0, 1.0, step), peak, pull, slope)


# A comparison that makes booleans costs a CPU five times as much as arithmetic on floats, which is
# vectorized; so below, masks are floats, and clipping is told by the derivative of hardtanh. What is
# overwritten in place need not be fetched: a tensor [N, K] more takes as long as the arithmetic on it.


def _bounds(grid: BlockGrid) -> tuple[float, float]:
    """The float32 numbers next to the codes' range, outside of it. They round to the range's ends."""
    lowest, highest = grid.code_min, grid.code_max
    return lowest - 2.0 ** (math.frexp(lowest)[1] - 24), highest + 2.0 ** (math.frexp(highest)[1] - 24)


def forward(
    dtype: torch.dtype, mode: str, grid: BlockGrid, blocks: Tensor, frozen: Tensor, *scales: Tensor
) -> tuple[Tensor]:
    """Values [N, K] in `dtype`, as the runtime computes them."""
    step, divisor, *_ = scales
    if mode == "frozen":
        return (grid.product(frozen, step, dtype),)
    codes = (blocks / divisor.unsqueeze(-1)).round_().clamp_(grid.code_min, grid.code_max)
    return (grid.product(codes, step, dtype),)


def backward(
    mode: str, grid: BlockGrid, grad: Tensor, blocks: Tensor, frozen: Tensor, *scales: Tensor
) -> tuple[Tensor]:
    """Turn a gradient of the values [N, K] into that of z [N], and in its own place that of the latents.

    grad: float32, overwritten but in frozen mode, where latents have no gradient and any dtype will do.
    In fixed mode the result is empty.
    """
    step, divisor, peak, pull, slope = scales
    if mode == "frozen":
        return (frozen.float().mul_(grad).sum(-1) * step,)
    lowest, highest = _bounds(grid)
    # where between the codes; a step of zero decodes any code to zero
    position = (blocks / divisor.unsqueeze(-1)).clamp_(lowest, highest)
    if mode == "fixed":
        _zero_where_clipped(grad, position, lowest, highest)
        return (step.new_empty(0),)
    grad_step = position.round().mul_(grad)
    _zero_where_clipped(grad, position, lowest, highest)
    # of a step: code - position where that is within the range, the code where it is clipped
    grad_step = grad_step.addcmul_(grad, position, value=-1).sum(-1)
    if mode == "canonical":
        at_peak = position.copy_(blocks).eq_(peak.unsqueeze(-1))  # 1.0 or 0.0
        share = grad_step * pull / at_peak.sum(-1)  # of each, where several tie
        grad.addcmul_(at_peak, share.unsqueeze(-1))
    return (grad_step * slope,)


def _zero_where_clipped(grad: Tensor, position: Tensor, lowest: float, highest: float) -> None:
    """Zero gradients in place where the position is clipped: hardtanh's derivative is zero at its bounds too."""
    derivative = torch.ops.aten.hardtanh_backward
    if torch.compiler.is_compiling():
        grad.copy_(derivative(grad, position, lowest, highest))
    else:
        derivative.grad_input(grad, position, lowest, highest, grad_input=grad)


def expect_compilations(count: int) -> None:
    """Raise torch's limit for one function; beyond it the rest would run uncompiled, with a warning at most."""
    config = torch._dynamo.config
    config.recompile_limit = max(count, config.recompile_limit)
    config.accumulated_recompile_limit = max(count, config.accumulated_recompile_limit)


def in_chunks(kernel: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Run an elementwise kernel over runs of blocks whose temporaries stay in the processor's cache.

    On a CPU this takes a tenth of the time of one pass over a large weight. The first of `tensors` is
    [N, K], the others [N, K] or [N]; empty ones stand for arguments that the mode does not have.
    """
    count, width = tensors[0].shape
    size = max(1, CHUNK_ELEMENTS // width)
    if count <= size or tensors[0].is_cuda:
        return kernel(*tensors)
    outputs: tuple[Tensor, ...] = ()
    for start in range(0, count, size):
        at = slice(start, start + size)
        parts = kernel(*(t[at] if t.numel() else t for t in tensors))
        outputs = outputs or tuple(part.new_empty((count if len(part) else 0, *part.shape[1:])) for part in parts)
        for output, part in zip(outputs, parts, strict=True):
            output[at] = part
    return outputs
