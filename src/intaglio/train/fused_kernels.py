"""The arithmetic of the fused step: gradients of latents, their norm, AdamW and decoding, for flat buffers of blocks.

Every function is compiled as a whole, so that a step reads and writes each buffer once.

Shape suffixes: N blocks of K neighbouring columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intaglio.numerics.grid import BlockGrid, FloatGrid
from intaglio.train.kernels import backward, features, forward, scales_of


def _adam(value: Tensor, grad: Tensor, mean: Tensor, square: Tensor, hyper: Tensor) -> Tensor:
    """AdamW's step (Loshchilov and Hutter 2019, arXiv:1711.05101) on one tensor, in place, as torch computes it.

    hyper: float32 [8], in the order below.
    """
    lr, beta1, beta2, eps, decay, bias1, bias2, clip = hyper.unbind()
    grad = grad * clip
    new_mean = mean + (grad - mean) * (1 - beta1)  # float32, also where the moments are kept in bfloat16
    new_square = square * beta2 + grad * grad * (1 - beta2)
    mean.copy_(new_mean)
    square.copy_(new_square)
    value.copy_(value * (1 - lr * decay) - lr / bias1 * new_mean / ((new_square / bias2).sqrt() + eps))
    return value


def _pulled(
    mode: str, grid: BlockGrid, grad: Tensor, latent: Tensor, codes: Tensor, z: Tensor, given: Tensor
) -> tuple[Tensor, Tensor]:
    """float32 gradients of latents [N, K] and of z [N], the latter empty where there is none."""
    scales = scales_of(mode, grid, *features(mode, latent, z, given))
    grad = grad.float().clone()
    (grad_z,) = backward(mode, grid, grad, latent, codes, *scales)
    return grad, grad_z


def block_squares(mode: str, grid: BlockGrid, *tensors: Tensor) -> Tensor:
    """Squared norm of each block's gradients, of its latents and its scale latent, float32 [N].

    The sum over blocks is left to torch: inductor would give the last sum of this kernel to one processor of the card.
    """
    grad, grad_z = _pulled(mode, grid, *tensors)
    if mode == "frozen":
        return grad_z.square()
    squares = grad.square().sum(-1)
    return squares + grad_z.square() if grad_z.numel() else squares


def block_step(
    mode: str,
    grid: BlockGrid,
    dtype: torch.dtype,
    tensors: tuple[Tensor, ...],
    moments: list[Tensor],
    hyper: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Step latents and scale latents in place; return decoded values [N, K] in `dtype` and their steps [N]."""
    _, latent, codes, z, given = tensors
    grad, grad_z = _pulled(mode, grid, *tensors)
    if mode != "frozen":
        latent = _adam(latent, grad, moments[0], moments[1], hyper[0])
    if grad_z.numel():
        z = _adam(z, grad_z, moments[2], moments[3], hyper[1])
    scales = scales_of(mode, grid, *features(mode, latent, z, given))
    return forward(dtype, mode, grid, latent, codes, *scales)[0], scales.step


def float_step(
    grid: FloatGrid, dtype: torch.dtype, grad: Tensor, latent: Tensor, moments: list[Tensor], hyper: Tensor
) -> Tensor:
    """Step latents of floats in place; return them rounded to their grid, in `dtype`."""
    return grid.round(_adam(latent, grad.float(), moments[0], moments[1], hyper)).to(dtype)
