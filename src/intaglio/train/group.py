"""Weights that are decoded by one call, and differentiated by one: those of a decoder layer.

Several hundred calls a step would cost a GPU's processor more than their arithmetic costs the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intaglio.numerics.grid import FloatGrid
from intaglio.train.fakequant import WeightQuantizer
from intaglio.train.kernels import (
    Modes,
    Scales,
    backward_group,
    compile_for,
    features,
    forward_group,
    scales_of,
)


class WeightGroup:
    """Quantizers with their latents [R, C], or [E, R, C] of experts."""

    def __init__(self, quantizers: list[WeightQuantizer], latents: list[Tensor]):
        self.quantizers, self.latents = quantizers, latents
        self.kept: list[tuple[Tensor, ...]] | None = None  # arguments of the kernels, once for a step

    @property
    def compiled(self) -> bool:
        return self.quantizers[0].compiled

    def modes(self) -> Modes:
        """What kernels are compiled for."""
        return tuple((q.mode, q.grid) for q in self.quantizers)

    def arguments(self) -> list[tuple[Tensor, ...]]:
        """What compiled kernels take of each weight: views of its latents and scales."""
        if self.kept is not None:
            return self.kept
        return [q.arguments(latent) for q, latent in zip(self.quantizers, self.latents, strict=True)]

    @torch.no_grad()
    def decode(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Values in `dtype`, in the latents' shapes, and steps [N]."""
        if not self.compiled:
            return [q.compute(w, dtype=dtype) for q, w in zip(self.quantizers, self.latents, strict=True)]
        pairs = compile_for(forward_group, self.modes())(dtype, self.arguments())
        return [(values.view(w.shape), step) for (values, step), w in zip(pairs, self.latents, strict=True)]

    @torch.no_grad()
    def gradients(self, grads: Sequence[Tensor]) -> list[tuple[Tensor | None, Tensor | None]]:
        """Of the latents and of the scale latents, for gradients of the values; as `WeightQuantizer.gradients`."""
        weights = list(zip(self.quantizers, self.latents, grads, strict=True))
        if not self.compiled:
            return [q.gradients(grad.contiguous(), w) for q, w, grad in weights]
        blocks = [q.blocks_of(grad.contiguous()) for q, _, grad in weights]
        kernel = compile_for(backward_group, self.modes())
        pairs = kernel(blocks, self.arguments(), [w.dtype for w in self.latents])
        return [q.shaped(*pair, w) for (q, w, _), pair in zip(weights, pairs, strict=True)]

    def cache(self, dtype: torch.dtype) -> None:
        """Decode once for the step: the quantizers keep values and steps."""
        if self.compiled:
            self.kept = self.arguments()
        for quantizer, (values, steps) in zip(self.quantizers, self.decode(dtype), strict=True):
            vars(quantizer).update(values=values, steps=steps)  # a module's own way takes ten times as long

    def drop(self) -> None:
        """Forget all of it."""
        self.kept = None
        for quantizer in self.quantizers:
            quantizer.drop()


@torch.no_grad()
def find_scales(quantizers: list[WeightQuantizer], latents: list[Tensor]) -> list[Scales]:
    """Scales of whole weights of one mode and grid, all at once: on so few numbers each operation has its price."""
    mode, grid = quantizers[0].mode, quantizers[0].grid
    parts = []
    for quantizer, latent in zip(quantizers, latents, strict=True):
        parts.append(features(mode, quantizer.blocks_of(latent.detach()).float(), *quantizer.z_and_given(latent)))
    counts = [max(map(len, part)) for part in parts]
    return scales_of(mode, grid, *(torch.cat(same) for same in zip(*parts, strict=True))).split(counts)


@torch.no_grad()
def round_together(grid: FloatGrid, latents: Sequence[Tensor]) -> list[Tensor]:
    """Float leftovers on their grid, all at once, since one by one these many small vectors take their time."""
    rounded = grid.round(torch.cat([latent.detach().flatten() for latent in latents]))
    parts = rounded.split([latent.numel() for latent in latents])
    return [part.view(latent.shape).to(latent.dtype) for part, latent in zip(parts, latents, strict=True)]


class FakeQuantizeGroup(torch.autograd.Function):
    """Latents and z of a group, in this order -> decoded weights, as cached if they are."""

    @staticmethod
    def forward(ctx, group, dtype, *tensors):
        ctx.group = group
        ctx.save_for_backward(*tensors)  # parameters; so autograd notices if they change before the backward
        cached = [q.values for q in group.quantizers]
        if any(value is None for value in cached):
            return tuple(values for values, _ in group.decode(dtype))
        return tuple(value.view_as(value) for value in cached)

    @staticmethod
    def backward(ctx, *grads):
        _ = ctx.saved_tensors
        pairs = ctx.group.gradients(grads)
        return None, None, *(latent for latent, _ in pairs), *(z for _, z in pairs)


class RoundStraightThroughGroup(torch.autograd.Function):
    """Float leftovers of a grid -> rounded, as cached if they are; identity backward."""

    @staticmethod
    def forward(ctx, grid, cached, *latents):
        ctx.set_materialize_grads(False)  # a weight that was not used has no gradient, not zeros
        if any(value is None for value in cached):
            return tuple(round_together(grid, latents))
        return tuple(value.view_as(value) for value in cached)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *grads
