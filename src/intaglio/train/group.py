"""Weights that are decoded by one call, and differentiated by one: those of a decoder layer.

Several hundred calls a step would cost a GPU's processor more than their arithmetic costs the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


class Part:
    """Weights of a group that compiled kernels take as one: of one mode, grid and dtype.

    Their latents, and what else they have for each block, lie side by side in memory until `close`: each
    tensor is a view of one that all share. For what a call costs grows with the number of its tensors.
    """

    def __init__(self, quantizers: list[WeightQuantizer], latents: list[Tensor]):
        self.quantizers, self.latents = quantizers, latents
        first = quantizers[0]
        self.mode, self.grid, self.dtype = first.mode, first.grid, latents[0].dtype
        self.counts = [latent.numel() // self.grid.block_size for latent in latents]
        several = [q.arguments(w) for q, w in zip(quantizers, latents, strict=True)]
        owners = (latents, *([getattr(q, name) for q in quantizers] for name in ("codes", "scale_latent", "base")))
        self.owners = [owner for same in owners for owner in same if owner is not None] if len(latents) > 1 else []
        self.arguments = tuple(map(_side_by_side, owners, map(list, zip(*several, strict=True))))

    def close(self) -> None:
        """Give each weight memory of its own again."""
        for owner in self.owners:
            owner.data = owner.data.clone()

    def split(self, values: Tensor, steps: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What is known of all blocks, weight by weight: [N, K] in the latents' shapes, and [N]."""
        pairs = zip(values.split(self.counts), steps.split(self.counts), self.latents, strict=True)
        return [(mine.view(latent.shape), step) for mine, step, latent in pairs]

    def join(self, grads: list[Tensor]) -> Tensor:
        """Gradients of the values as blocks [N, K]."""
        blocks = [grad.reshape(-1, self.grid.block_size) for grad in grads]
        return blocks[0].contiguous() if len(blocks) == 1 else torch.cat(blocks)


def _side_by_side(owners: list[Any], parts: list[Tensor]) -> Tensor:
    """`parts` as one tensor, of which their owners, if they have any, become views."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    for owner, part in zip(owners, whole.split([len(part) for part in parts]), strict=True):
        if owner is not None:
            owner.data = part.view(owner.shape)
    return whole


class WeightGroup:
    """Quantizers with their latents [R, C], or [E, R, C] of experts."""

    def __init__(self, quantizers: list[WeightQuantizer], latents: list[Tensor]):
        self.quantizers, self.latents = quantizers, latents
        self.compiled = quantizers[0].compiled
        self.parts: list[Part] = []
        if not self.compiled:
            return
        alike: dict[Any, list[tuple[WeightQuantizer, Tensor]]] = {}
        for quantizer, latent in zip(quantizers, latents, strict=True):
            alike.setdefault((quantizer.mode, quantizer.grid, latent.dtype), []).append((quantizer, latent))
        self.parts = [Part(*map(list, zip(*same, strict=True))) for same in alike.values()]
        self.modes: Modes = tuple((part.mode, part.grid) for part in self.parts)

    @torch.no_grad()
    def decode(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Values in `dtype`, in the latents' shapes, and steps [N]."""
        if not self.compiled:
            return [q.compute(w, dtype=dtype) for q, w in zip(self.quantizers, self.latents, strict=True)]
        results = compile_for(forward_group, self.modes)(dtype, [part.arguments for part in self.parts])
        found: dict[WeightQuantizer, tuple[Tensor, Tensor]] = {}
        for part, result in zip(self.parts, results, strict=True):
            found.update(zip(part.quantizers, part.split(*result), strict=True))
        return [found[quantizer] for quantizer in self.quantizers]

    @torch.no_grad()
    def gradients(self, grads: Sequence[Tensor]) -> list[tuple[Tensor | None, Tensor | None]]:
        """Of the latents and of the scale latents, for gradients of the values; as `WeightQuantizer.gradients`."""
        weights = list(zip(self.quantizers, self.latents, grads, strict=True))
        if not self.compiled:
            return [q.gradients(grad.contiguous(), w) for q, w, grad in weights]
        by_quantizer = dict(zip(self.quantizers, grads, strict=True))
        joined = [part.join([by_quantizer[q] for q in part.quantizers]) for part in self.parts]
        kernel = compile_for(backward_group, self.modes)
        results = kernel(joined, [part.arguments for part in self.parts], [part.dtype for part in self.parts])
        found: dict[WeightQuantizer, tuple[Tensor, Tensor]] = {}
        for part, (grad, grad_z) in zip(self.parts, results, strict=True):
            pieces = part.split(grad, grad_z) if grad_z.numel() else [(g, grad_z) for g in grad.split(part.counts)]
            found.update(zip(part.quantizers, pieces, strict=True))
        return [q.shaped(*found[q], w) for q, w, _ in weights]

    def cache(self, dtype: torch.dtype) -> None:
        """Decode once for the step: the quantizers keep values and steps."""
        for quantizer, (values, steps) in zip(self.quantizers, self.decode(dtype), strict=True):
            vars(quantizer).update(values=values, steps=steps)  # a module's own way takes ten times as long

    def drop(self) -> None:
        """Forget what was decoded."""
        for quantizer in self.quantizers:
            quantizer.drop()

    def close(self) -> None:
        """Leave each weight in memory of its own, as it was found."""
        for part in self.parts:
            part.close()


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
