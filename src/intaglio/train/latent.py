"""Float masters behind the weights of a model in training: how one weight is decoded, learns, freezes and is packed.

Shape suffixes: R rows, C columns, S steps in a row; N blocks of K neighbouring columns.

The model in training is the plain transformers model. Its weights hold what the grid decodes to, so forward and
backward know nothing of grids. Around the optimizer step, once, on the rows that this process owns:

    latent, scale latent (float32)  --decode-->  weight of the model, in the forward's dtype
                                    <--pull----  gradient of that weight (see `kernels` for the rules)

`BlockLatent` does this for a weight on a BlockGrid, `FloatLatent` for one that stays float and is only rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.errors import MismatchError
from intaglio.numerics.grid import BlockGrid, FloatGrid, Quantized
from intaglio.numerics.steps import from_steps
from intaglio.train.kernels import LOWEST_RATIO, Scales, backward, features, forward, in_chunks, scales_of
from intaglio.train.sharding import local

SCALE_SUFFIX = ".scale_latent"  # of the names of learned scales


def take_gradient(weight: nn.Parameter) -> Tensor | None:
    """This process's rows of a weight's gradient, which the weight then no longer has."""
    grad, weight.grad = weight.grad, None
    return None if grad is None else local(grad)


def check_unchanged(name: str, weight: Tensor, values: Tensor) -> None:
    """Raise MismatchError unless a weight of the model holds `values`, of this process's rows, cast to its dtype."""
    own = local(weight.detach())
    changed = int((values.to(own.dtype) != own).sum())
    if changed:
        raise MismatchError(
            f"{name}: {changed} of {own.numel()} values of the model ({own.dtype}) are not what its latents decode to: "
            "the weight was changed or cast behind them: train it with GridOptimizer in the place of another "
            "optimizer, load checkpoints before prepare(), and cast a model before it is prepared"
        )


class FloatLatent:
    """The float32 master [...] of a weight that stays float: the weight is the master, rounded to its grid."""

    def __init__(self, name: str, weight: nn.Parameter, grid: FloatGrid, values: Tensor):
        self.name, self.weight, self.grid = name, weight, grid
        self.latent = nn.Parameter(values.to(local(weight.detach()).device, torch.float32, copy=True))
        self.decode()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield self.name, self.latent

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold, by name."""
        return dict(self.named_parameters())

    @torch.no_grad()
    def decode(self) -> None:
        """Write the rounded master into the model's weight."""
        local(self.weight).copy_(self.grid.round(self.latent))

    @torch.no_grad()
    def pull(self) -> None:
        """Move the weight's gradient to the master: rounding passes it straight through."""
        grad = take_gradient(self.weight)
        self.latent.grad = None if grad is None else grad.float()

    def pack(self) -> Tensor:
        """float32 values as the forward has them, of this process's rows, on the CPU.

        Raises MismatchError if the model's weight holds others.
        """
        values = self.grid.round(self.latent.detach())
        check_unchanged(self.name, self.weight, values)
        return values.cpu()


class BlockLatent:
    """The float32 master [..., C] of a weight on a BlockGrid, and the learned part of its scales.

    name: of the weight in the model. weight: the model's parameter; it is overwritten with decoded values.
    values: the master's first values, of this process's rows. fitted: codes and scales to begin with, of the same rows.
    learned: whether scales are learned.

    mode: one of `kernels`. latent: float32 parameter [..., C]. scale_latent: float32 parameter [..., S], or None in
    fixed mode. scale, super_scale: the fitted scales, in fixed mode only. base: float32 [..., S], in free and
    frozen mode: the steps that learning began with. A scale latent of zero stands for just them, so that a
    model which was packed goes on from the very scales it has. codes: int8 [..., C], only once frozen.
    adapter: PEFT's LoRA layer around the weight; what is decoded is then latent + BA. learns_codes: whether the master
    itself is trained; in a model with adapters it is not.
    """

    def __init__(
        self, name: str, weight: nn.Parameter, grid: BlockGrid, values: Tensor, fitted: Quantized, *, learned: bool
    ):
        self.name, self.weight, self.grid = name, weight, grid
        device = local(weight.detach()).device
        parts = (fitted.scale, fitted.super_scale, fitted.step)
        scale, super_scale, step = (None if part is None else part.to(device) for part in parts)
        assert step is not None
        self.latent = nn.Parameter(values.to(device, torch.float32, copy=True))
        self.mode = "fixed" if not learned else "canonical" if grid.canonical else "free"
        self.scale, self.super_scale = (None, None) if learned else (scale, super_scale)
        self.base = step if self.mode == "free" else None
        self.codes: Tensor | None = None
        self.scale_latent: nn.Parameter | None = None
        if learned:
            first = _ratio_latent(grid, self.latent.detach(), step) if grid.canonical else torch.zeros_like(step)
            self.scale_latent = nn.Parameter(first)
        self.adapter: Any = None
        self.learns_codes = True
        self.step = step  # float32 [..., S], of the last decode
        self._scales: Scales | None = None  # of the last decode, for the pull that follows it, on a CPU

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that the optimizer trains, by name: the master while codes may move, and learned scales."""
        if self.mode != "frozen" and self.learns_codes:
            yield self.name, self.latent
        if self.scale_latent is not None:
            yield self.name + SCALE_SUFFIX, self.scale_latent

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold, by name."""
        parts = {".base": self.base, ".codes": self.codes, ".scale": self.scale, ".super_scale": self.super_scale}
        state = {self.name: self.latent} | {self.name + key: part for key, part in parts.items() if part is not None}
        return state | ({} if self.scale_latent is None else {self.name + SCALE_SUFFIX: self.scale_latent})

    def merged(self) -> Tensor:
        """The latent [..., C] that is decoded: the master, with the active adapters where there are any."""
        latent = self.latent.detach()
        return latent if self.adapter is None else latent + self.adapter.delta()

    def blocks_and_codes(self) -> tuple[Tensor, Tensor]:
        """Latents as blocks [N, K], and the codes they are frozen to, or empty."""
        size = self.grid.block_size
        frozen = _empty(self.latent.device) if self.codes is None else self.codes.reshape(-1, size)
        return self.merged().reshape(-1, size), frozen

    def z_and_given(self) -> tuple[Tensor, Tensor]:
        """Scale latents [N], and the bases (free, frozen) or steps (fixed) that are not learned; or empty."""
        given = self.base
        if self.mode == "fixed":
            assert self.scale is not None
            given = Quantized(self.grid, self.scale, self.scale, self.super_scale).step
        none = _empty(self.latent.device)
        z = none if self.scale_latent is None else self.scale_latent.detach().reshape(-1)
        return z, none if given is None else given.reshape(-1)

    @torch.no_grad()
    def compute(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Decoded values [..., C] in `dtype`, and float32 steps [..., S], of this process's rows."""
        blocks, frozen = self.blocks_and_codes()
        scales = scales_of(self.mode, self.grid, *features(self.mode, blocks, *self.z_and_given()))
        self._scales = scales if blocks.device.type == "cpu" else None
        (values,) = in_chunks(functools.partial(forward, dtype, self.mode, self.grid), blocks, frozen, *scales)
        return values.view(self.latent.shape), scales.step.view(*self.latent.shape[:-1], -1)

    @torch.no_grad()
    def decode(self) -> None:
        """Write the decoded values into the model's weight, and remember their steps."""
        own = local(self.weight)
        values, self.step = self.compute(own.dtype)
        own.copy_(values)  # in place: tied modules and FSDP2 hold this very tensor

    @torch.no_grad()
    def pull(self) -> None:
        """Turn the weight's gradient into those of master and scale latent, before either changes."""
        grad = take_gradient(self.weight)
        if grad is None:
            return
        grad_latent, grad_z = self.gradients(grad)
        if self.adapter is not None:
            self.adapter.pull(grad_latent)
        elif grad_latent is not None and self.learns_codes:
            self.latent.grad = grad_latent
        if self.scale_latent is not None and grad_z is not None:
            before = self.scale_latent.grad if self.adapter is not None else None  # an adapter's pull is per backward
            self.scale_latent.grad = grad_z if before is None else before + grad_z

    @torch.no_grad()
    def gradients(self, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the latent (None in frozen mode) and of the scale latent (None in fixed mode).

        grad: [..., C], of the decoded values, in any dtype; a float32 one may be overwritten.
        """
        blocks, frozen = self.blocks_and_codes()
        scales = self._scales
        if scales is None:
            scales = scales_of(self.mode, self.grid, *features(self.mode, blocks, *self.z_and_given()))
        grad = grad.contiguous() if self.mode == "frozen" else grad.float().contiguous()
        kernel = functools.partial(backward, self.mode, self.grid)
        (grad_z,) = in_chunks(kernel, grad.reshape(-1, self.grid.block_size), blocks, frozen, *scales)
        return (
            None if self.mode == "frozen" else grad.view(self.latent.shape),
            None if self.scale_latent is None else grad_z.view(self.scale_latent.shape),
        )

    @torch.no_grad()
    def set_steps(self, step: Tensor) -> None:
        """Begin with other steps than the fitted ones, float32 [..., S]; in free mode."""
        assert self.base is not None and self.mode == "free"
        self.base.copy_(step)

    @torch.no_grad()
    def freeze(self) -> None:
        """Fix the codes of the present forward; only the scales go on learning."""
        own = local(self.weight.detach())
        self.codes, self.base = self.grid.codes_of(own, self.step), self.step
        self.mode, self._scales = "frozen", None
        self.scale_latent = nn.Parameter(torch.zeros_like(self.step))  # zero: exp(0) x base is the step as it is

    @torch.no_grad()
    def pack(self) -> Quantized:
        """Codes and scales of the forward itself, of this process's rows, on the CPU: nothing is fitted anew.

        Codes are read off the model's weight, under the steps that it was decoded with: a compiled kernel may round a
        tie its own way. Raises MismatchError if they do not decode to the very values of the weight.
        """
        if self.adapter is not None:
            self.adapter.decode_if_switched()
        step, codes = self.step, self.grid.codes_of(local(self.weight.detach()), self.step)
        if self.mode == "fixed":
            assert self.scale is not None
            quantized = Quantized(self.grid, codes, self.scale, self.super_scale)
        else:
            step = torch.where(step == 0, torch.full_like(step, -0.0), step)  # as ggml writes empty blocks
            quantized = from_steps(self.grid, codes, step)
        check_unchanged(self.name, self.weight, quantized.decode(self.weight.dtype))
        if self.adapter is not None or self.latent.device.type == "cpu":  # else a compiled kernel decoded
            check_unchanged(self.name, self.weight, self.compute(self.weight.dtype)[0])
        parts = (quantized.codes, quantized.scale, quantized.super_scale)
        return Quantized(self.grid, *(None if part is None else part.cpu() for part in parts))  # type: ignore[arg-type]


@functools.cache
def _empty(device: torch.device) -> Tensor:
    """Empty float32 tensor for an argument that a mode does not use."""
    return torch.empty(0, device=device)


def _ratio_latent(grid: BlockGrid, latent: Tensor, step: Tensor) -> Tensor:
    """z whose canonical step is the fitted one; kept off the flat ends of the sigmoid."""
    peak = grid.blocks(latent).abs().amax(-1).clamp_min(1e-30)
    ratio = step.abs() * abs(grid.code_min) / peak
    share = ((ratio - LOWEST_RATIO) / (1 - LOWEST_RATIO)).clamp(0.02, 0.98)
    return torch.logit(share)
