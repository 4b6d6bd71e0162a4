"""The arithmetic of fake quantization: decoded values of blocks of latents, and their gradients.

Shape suffixes: R rows, C columns, S steps in a row; N blocks of K neighbouring columns.

Four modes say where a block's step comes from. `z` is the learned scale latent of a block.

    canonical  step = extremum / code_min x ratio(z), ratio in (0.6, 1]: clips, never widens, so
               the extremum keeps code_min and llama.cpp's quantizer finds the same grid again
    free       step = sign x exp(z), sign fixed by the first fit; on channel grids always positive
    fixed      step as fitted; only the codes follow the latents
    frozen     step = sign x exp(z), and the codes stand still

Rounding passes gradients straight through (STE); clipping stops them, and what clipping stops
reaches the step instead, as in LSQ (Esser et al. 2020, arXiv:1902.08153). The backward recomputes
codes and steps from the latents: nothing but the latents themselves is kept between the two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from intaglio.numerics.grid import FLOAT_SMALLEST, BlockGrid

Modes = tuple[tuple[str, BlockGrid], ...]

LOWEST_RATIO = 0.6  # of the canonical step; a tighter clip would cost more than it gains
CHUNK_ELEMENTS = 1 << 17
SMALLEST_LOG_STEP = -28.0  # exp(-28) rounds to zero on every grid of float16 scales: an empty block
SMALLEST_LOG_CHANNEL_STEP = math.log(FLOAT_SMALLEST)


def ratio_of(z: Tensor) -> Tensor:
    """The learned ratio of a canonical step to the one that clips nothing, in (LOWEST_RATIO, 1)."""
    return LOWEST_RATIO + (1 - LOWEST_RATIO) * torch.sigmoid(z)


def _extremum(blocks_NK: Tensor) -> Tensor:
    """Signed value of largest magnitude [N]. Of a tie in magnitude the positive value is taken:
    its opposite is clipped to code_max, so the decoded block has one extremum all the same."""
    highest, lowest = blocks_NK.amax(-1), blocks_NK.amin(-1)
    return torch.where(highest >= -lowest, highest, lowest)


def _step(mode: str, grid: BlockGrid, blocks: Tensor, z: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded steps [N], and the extrema that canonical ones follow; empty in other modes.

    `given`: signs (free, frozen) or the steps themselves (fixed), float32.
    """
    if mode == "fixed":
        return given, z.new_empty(0)
    if mode == "canonical":
        peak = _extremum(blocks)
        return grid.round_step(peak / grid.code_min * ratio_of(z)), peak
    return grid.round_step(given * torch.exp(z)), z.new_empty(0)


# A comparison that makes booleans costs a CPU five times as much as arithmetic on floats, which is
# vectorized; so below, masks are floats, and clipping is told by the derivative of hardtanh. What is
# overwritten in place need not be fetched: a tensor [N, K] more takes as long as the arithmetic on it.


def _position(blocks: Tensor, step: Tensor) -> Tensor:
    """Where the latents lie between the codes, float32 [N, K]. A step of zero decodes any code to zero."""
    return blocks / torch.where(step == 0, 1.0, step).unsqueeze(-1)


@functools.cache
def _bounds(grid: BlockGrid) -> tuple[float, float]:
    """The float32 numbers next to the codes' range, outside: hardtanh's derivative is zero at its bounds too."""
    ends = ((grid.code_min, -np.inf), (grid.code_max, np.inf))
    lowest, highest = (float(np.nextafter(np.float32(end), np.float32(beyond))) for end, beyond in ends)
    return lowest, highest


def forward(
    dtype: torch.dtype, mode: str, grid: BlockGrid, blocks: Tensor, z: Tensor, given: Tensor, frozen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Values [N, K] in `dtype`, as the runtime computes them, steps [N], float32, and extrema: see `_step`."""
    step, peak = _step(mode, grid, blocks, z, given)
    if mode == "frozen":
        return grid.product(frozen, step, dtype), step, peak
    codes = _position(blocks, step).round_().clamp_(grid.code_min, grid.code_max)
    return grid.product(codes, step, dtype), step, peak


def backward(
    mode: str, grid: BlockGrid, grad: Tensor, blocks: Tensor, z: Tensor, given: Tensor, frozen: Tensor,
    step: Tensor, peak: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the latents [N, K] and of z [N] for a gradient of the values [N, K].

    step, peak: of the forward, if it kept them, or empty. In frozen mode that of the latents is empty.
    """
    if not step.numel():
        step, peak = _step(mode, grid, blocks, z, given)
    if mode == "frozen":
        return step.new_empty(0), frozen.float().mul_(grad).sum(-1) * step
    grad = grad.float()
    position = _position(blocks, step)
    grad_latent = torch.ops.aten.hardtanh_backward(grad, position, *_bounds(grid))  # zero where clipped
    if mode == "fixed":
        return grad_latent, torch.zeros_like(z)
    position.clamp_(grid.code_min, grid.code_max)
    # code - position where that is inside of the range, code where it is clipped
    grad_step = position.round().mul_(grad).addcmul_(grad_latent, position, value=-1).sum(-1)
    if mode == "free":
        return grad_latent, grad_step * given * torch.exp(z)
    at_peak = position.copy_(blocks).eq_(peak.unsqueeze(-1))  # 1.0 or 0.0
    sigmoid = torch.sigmoid(z)
    grad_step = grad_step / grid.code_min
    share = grad_step * ratio_of(z) / at_peak.sum(-1)  # of each, where several tie
    grad_latent.addcmul_(at_peak, share.unsqueeze(-1))
    return grad_latent, grad_step * peak * (1 - LOWEST_RATIO) * sigmoid * (1 - sigmoid)


def forward_group(modes: Modes, dtype: torch.dtype, arguments: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """What `forward` gives for several weights: one compiled call for all of a decoder layer."""
    return [forward(dtype, *mode, *args) for mode, args in zip(modes, arguments, strict=True)]


def backward_group(
    modes: Modes, grads: list[Tensor], arguments: list[tuple[Tensor, ...]], dtypes: list[torch.dtype]
) -> list[tuple[Tensor, Tensor]]:
    """Gradients of latents, in `dtypes`, and of z for the gradients of several weights, likewise in one call."""
    results = []
    for mode, grad, args, dtype in zip(modes, grads, arguments, dtypes, strict=True):
        unknown = args[0].new_empty(0)  # steps: computing them again costs a GPU less than reading them
        grad_latent, grad_z = backward(*mode, grad, *args, unknown, unknown)
        results.append((grad_latent.to(dtype), grad_z))
    return results


@functools.cache
def compile_for(function: Callable, modes: Modes) -> Callable:
    """Compiled for fixed shapes: a model has few kinds of layers, and each gets its own kernels."""
    # more kinds than torch expects of one function; beyond the limit it would run uncompiled
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(functools.partial(function, modes), dynamic=False)


def in_chunks(kernel: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
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
