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

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from intaglio.numerics.grid import BlockGrid

Modes = tuple[tuple[str, BlockGrid], ...]

LOWEST_RATIO = 0.6  # of the canonical step; a tighter clip would cost more than it gains
CHUNK_ELEMENTS = 1 << 18


def ratio_of(z: Tensor) -> Tensor:
    """The learned ratio of a canonical step to the one that clips nothing, in (LOWEST_RATIO, 1)."""
    return LOWEST_RATIO + (1 - LOWEST_RATIO) * torch.sigmoid(z)


def _extremum(blocks_NK: Tensor) -> Tensor:
    """Signed value of largest magnitude [N]. Of a tie in magnitude the positive value is taken:
    its opposite is clipped to code_max, so the decoded block has one extremum all the same."""
    highest, lowest = blocks_NK.amax(-1), blocks_NK.amin(-1)
    return torch.where(highest >= -lowest, highest, lowest)


def _step(mode: str, grid: BlockGrid, blocks: Tensor, z: Tensor, given: Tensor) -> Tensor:
    """Rounded steps [N]. `given`: bases (free, frozen) or the steps themselves (fixed), float32."""
    if mode == "fixed":
        return given
    if mode == "canonical":
        return grid.round_step(_extremum(blocks) / grid.code_min * ratio_of(z))
    return grid.round_step(given * torch.exp(z))


# A comparison that makes booleans costs a CPU five times as much as arithmetic on floats, which is
# vectorized; so below, masks are floats, and clipping is told by the derivative of hardtanh.


def _position(blocks: Tensor, step: Tensor) -> Tensor:
    """Where the latents lie between the codes, float32 [N, K]. A step of zero decodes any code to zero."""
    return blocks / torch.where(step == 0, torch.ones_like(step), step).unsqueeze(-1)


def _codes(grid: BlockGrid, position: Tensor) -> Tensor:
    return position.round().clamp_(grid.code_min, grid.code_max)


def _where_inside(grid: BlockGrid, values: Tensor, position: Tensor) -> Tensor:
    """`values`, and zero where `position` is clipped."""
    lowest, highest = (
        float(np.nextafter(np.float32(end), np.float32(beyond)))
        for end, beyond in ((grid.code_min, -np.inf), (grid.code_max, np.inf))
    )
    return torch.ops.aten.hardtanh_backward(values, position, lowest, highest)  # zero at the bounds too


def backward(mode: str, grid: BlockGrid, grad: Tensor, blocks: Tensor, z: Tensor, given: Tensor, frozen: Tensor):
    """Gradients of the latents [N, K] and of z [N] for a gradient of the values [N, K]."""
    grad = grad.float()
    step = _step(mode, grid, blocks, z, given)
    if mode == "frozen":
        grad_z = (grad * frozen.float()).sum(-1) * step
        return torch.zeros_like(grad), grad_z
    position = _position(blocks, step)
    grad_latent = _where_inside(grid, grad, position)
    if mode == "fixed":
        return grad_latent, torch.zeros_like(z)
    change = _codes(grid, position).sub_(_where_inside(grid, position, position))
    grad_step = change.mul_(grad).sum(-1)
    if mode == "free":
        return grad_latent, grad_step * given * torch.exp(z)
    peak, ratio = _extremum(blocks), ratio_of(z)
    at_peak = position.copy_(blocks).eq_(peak.unsqueeze(-1))  # 1.0 or 0.0
    share = 1.0 / at_peak.sum(-1) * (grad_step * ratio / grid.code_min)  # of each, where several tie
    grad_latent.addcmul_(at_peak, share.unsqueeze(-1))
    sigmoid = torch.sigmoid(z)
    grad_z = grad_step * peak / grid.code_min * (1 - LOWEST_RATIO) * sigmoid * (1 - sigmoid)
    return grad_latent, grad_z


def forward(
    dtype: torch.dtype, mode: str, grid: BlockGrid, blocks: Tensor, z: Tensor, given: Tensor, frozen: Tensor
) -> tuple[Tensor, Tensor]:
    """Values [N, K] in `dtype`, as the runtime computes them, and steps [N], float32."""
    step = _step(mode, grid, blocks, z, given)
    codes = frozen if mode == "frozen" else _codes(grid, _position(blocks, step))
    return grid.product(codes, step, dtype), step


def forward_group(modes: Modes, dtype: torch.dtype, arguments: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, Tensor]]:
    """Values in `dtype` and steps of several weights: one compiled call for all of a decoder layer."""
    return [forward(dtype, *mode, *args) for mode, args in zip(modes, arguments, strict=True)]


def backward_group(
    modes: Modes, grads: list[Tensor], arguments: list[tuple[Tensor, ...]], dtypes: list[torch.dtype]
) -> list[tuple[Tensor, Tensor]]:
    """Gradients of latents, in `dtypes`, and of z for the gradients of several weights, likewise in one call."""
    results = []
    for mode, grad, args, dtype in zip(modes, grads, arguments, dtypes, strict=True):
        grad_latent, grad_z = backward(*mode, grad, *args)
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
