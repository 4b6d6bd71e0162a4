"""Fake quantization: the training forward sees `code x step`, the latents behind it stay float32.

Shape suffixes: R rows, C columns, S steps in a row; N blocks of K neighbouring columns.

A `WeightQuantizer` has the learned part of a weight's scales; autograd functions decode with it. They
save nothing but their own inputs, which are parameters, and compute codes and steps again in the
backward: see `kernels` for the arithmetic of its modes.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.errors import MismatchError
from intaglio.numerics.grid import BlockGrid, Quantized, from_steps
from intaglio.train.kernels import LOWEST_RATIO, Scales, backward, features, forward, in_chunks, scales_of
from intaglio.train.static import quantize_static, static_gradients


class WeightQuantizer(nn.Module):
    """The grid of one weight: how to decode its latents, and the learned part of its scales.

    scale_latent: float32 parameter [R, S], or None in fixed mode.
    scale, super_scale: the fitted scales, in fixed mode only.
    base: float32 buffer [R, S], in free and frozen mode: the steps that learning began with. A latent of
        zero stands for just them, so that a model which was packed goes on from the very scales it has.
    codes: int8 buffer [R, C], only once frozen.
    compiled: decode and differentiate whole groups of weights through torch.compile.
    """

    scale: Tensor
    super_scale: Tensor | None
    base: Tensor | None
    codes: Tensor | None

    def __init__(self, grid: BlockGrid, latent: Tensor, fitted: Quantized, *, learned: bool, compiled: bool = False):
        super().__init__()
        self.grid = grid
        self.compiled = compiled
        self.mode = "fixed" if not learned else "canonical" if grid.canonical else "free"
        fitted = _to_device(fitted, latent.device)
        self.register_buffer("scale", None if learned else fitted.scale)
        self.register_buffer("super_scale", None if learned else fitted.super_scale)
        self.register_buffer("base", fitted.step if self.mode == "free" else None)
        self.register_buffer("codes", None)
        scale_latent = None
        if learned:
            step = fitted.step
            scale_latent = _ratio_latent(grid, latent, step) if grid.canonical else torch.zeros_like(step)
        self.scale_latent = None if scale_latent is None else nn.Parameter(scale_latent)
        self.values: Tensor | None = None  # decoded once for the optimizer step; see `StepWeights`
        self.steps: Tensor | None = None  # of those values
        self.scales: Scales | None = None  # the same with what the backward needs of them, if not compiled
        self.decoded: Tensor | None = None  # the same with its place in the autograd graph

    def blocks_of(self, tensor: Tensor) -> Tensor:
        """[..., C] as [N, K]."""
        return tensor.reshape(-1, self.grid.block_size)

    def blocks_and_codes(self, latent: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents as blocks [N, K], and the codes they are frozen to, or empty."""
        blocks = self.blocks_of(latent.detach())
        if self.codes is None:
            return blocks, _nothing(blocks.device)
        return blocks, self.blocks_of(self.codes if rows is None else self.codes[rows])

    def z_and_given(self, latent: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale latents [N], and the bases (free, frozen) or steps (fixed) that are not learned; or empty."""

        def pick(tensor: Tensor | None) -> Tensor:
            if tensor is None:
                return _nothing(latent.device)
            return tensor.detach() if rows is None else tensor.detach()[rows]

        given = pick(self.base)
        if self.mode == "fixed":
            supers = None if self.super_scale is None else pick(self.super_scale).flatten(0, -2)
            scale = pick(self.scale)
            given = Quantized(self.grid, scale, scale.flatten(0, -2), supers).step
        return pick(self.scale_latent).reshape(-1), given.reshape(-1).float()

    def arguments(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All that compiled kernels take of a whole weight."""
        return *self.blocks_and_codes(latent), *self.z_and_given(latent)

    def drop(self) -> None:
        """Forget what was decoded for a step."""
        # a module's own way of setting takes ten times as long
        vars(self).update(values=None, steps=None, scales=None, decoded=None)

    def scales_for(self, latent: Tensor, blocks: Tensor, rows: Tensor | None) -> Scales:
        """Of the whole weight, as cached if they are, or of the given rows of it."""
        if rows is None and self.scales is not None:
            return self.scales
        return scales_of(self.mode, self.grid, *features(self.mode, blocks, *self.z_and_given(latent, rows)))

    @torch.no_grad()
    def compute(
        self, latent: Tensor, rows: Tensor | None = None, *, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Decoded values in the latents' shape, and float32 steps [N]."""
        blocks, frozen = self.blocks_and_codes(latent, rows)
        blocks = blocks.float()
        scales = self.scales_for(latent, blocks, rows)
        (values,) = in_chunks(functools.partial(forward, dtype, self.mode, self.grid), blocks, frozen, *scales)
        return values.view(latent.shape), scales.step

    @torch.no_grad()
    def gradients(
        self, grad: Tensor, latent: Tensor, rows: Tensor | None = None, *, reuse: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of latents (None in frozen mode) and scale latents (None in fixed mode), of these rows.

        reuse: `grad` may be overwritten, for want of fresh memory, which takes a CPU as long as the arithmetic.
        """
        blocks, frozen = self.blocks_and_codes(latent, rows)
        blocks = blocks.float()
        scales = self.scales_for(latent, blocks, rows)
        if self.mode != "frozen":
            grad = grad.to(torch.float32, copy=not reuse)
        kernel = functools.partial(backward, self.mode, self.grid)
        (grad_z,) = in_chunks(kernel, grad.view(-1, self.grid.block_size), blocks, frozen, *scales)
        return self.shaped(grad, grad_z, latent)

    def shaped(self, grad_latent: Tensor, grad_z: Tensor, latent: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the kernel gives in the shapes of latents and of scale latents."""
        steps_shape = (*latent.shape[:-1], latent.shape[-1] // self.grid.block_size)
        return (
            None if self.mode == "frozen" else grad_latent.view(latent.shape).to(latent.dtype),
            None if self.scale_latent is None else grad_z.view(steps_shape),
        )

    def forward(self, latent: Tensor, dtype: torch.dtype) -> Tensor:
        """The whole weight as the runtime will decode it, in `dtype`, with gradients."""
        return FakeQuantize.apply(latent, self.scale_latent, self, dtype)

    def forward_rows(self, latent_rows: Tensor, rows: Tensor, table: Tensor | None = None) -> Tensor:
        """Rows gathered from the latents, decoded after the gather: the cost follows the tokens.

        table: the latents, if the backward may gather the rows again rather than keep them.
        """
        z_rows = None if self.scale_latent is None else F.embedding(rows, self.scale_latent)
        return FakeQuantizeRows.apply(latent_rows, z_rows, self, rows, None if table is None else table.detach())

    @torch.no_grad()
    def set_steps(self, step: Tensor) -> None:
        """Begin with other steps than the fitted ones, float32 [R, S]; in free mode."""
        assert self.base is not None and self.mode == "free"
        self.base.copy_(step)

    @torch.no_grad()
    def freeze(self, latent: Tensor) -> None:
        """Fix the codes of the present forward; only the scales go on learning."""
        quantized = self.pack(latent)
        step = quantized.step.to(latent.device)
        self.codes = quantized.codes.to(latent.device)
        self.base, self.mode = step, "frozen"
        self.scale_latent = nn.Parameter(torch.zeros_like(step))

    @torch.no_grad()
    def pack(self, latent: Tensor) -> Quantized:
        """Codes and scales of the forward itself: taken from the values it decoded, not fitted anew.

        Uses the cached values where there are some. Raises MismatchError if the codes did not decode
        to those very values.
        """
        if self.values is not None and self.steps is not None:
            values, step = self.values, self.steps
        else:
            values, step = self.compute(latent)
        step, values = step.view(*latent.shape[:-1], -1).cpu(), values.cpu()
        codes = self.grid.codes_of(values, step)
        if self.mode == "fixed":
            super_scale = None if self.super_scale is None else self.super_scale.cpu()
            quantized = Quantized(self.grid, codes, self.scale.cpu(), super_scale)
        else:
            step = torch.where(step == 0, torch.full_like(step, -0.0), step)  # as ggml writes empty blocks
            quantized = from_steps(self.grid, codes, step)
        if not torch.equal(quantized.decode(values.dtype), values):
            raise MismatchError("packed codes do not decode to the values of the training forward")
        return quantized


@functools.cache
def _nothing(device: torch.device) -> Tensor:
    """In the place of what a mode does not have, float32 [0]."""
    return torch.empty(0, device=device)


def _to_device(quantized: Quantized, device: torch.device) -> Quantized:
    super_scale = None if quantized.super_scale is None else quantized.super_scale.to(device)
    return Quantized(quantized.grid, quantized.codes, quantized.scale.to(device), super_scale)


def _ratio_latent(grid: BlockGrid, latent: Tensor, step: Tensor) -> Tensor:
    """z whose canonical step is the fitted one; kept off the flat ends of the sigmoid."""
    peak = grid.blocks(latent.detach().float()).abs().amax(-1).clamp_min(1e-30)
    ratio = step.abs() * abs(grid.code_min) / peak
    share = ((ratio - LOWEST_RATIO) / (1 - LOWEST_RATIO)).clamp(0.02, 0.98)
    return torch.logit(share)


class FakeQuantize(torch.autograd.Function):
    """latent [R, C], z -> decoded weight. Saves only its own inputs, which are parameters."""

    @staticmethod
    def forward(ctx, latent, z, quantizer, dtype):
        ctx.quantizer = quantizer
        ctx.save_for_backward(latent)
        if quantizer.values is not None:
            return quantizer.values.view_as(quantizer.values)
        return quantizer.compute(latent, dtype=dtype)[0]

    @staticmethod
    def backward(ctx, grad):
        (latent,) = ctx.saved_tensors
        return *ctx.quantizer.gradients(grad.contiguous(), latent), None, None


class FakeQuantizeRows(torch.autograd.Function):
    """Gathered latents [..., C] and their z -> decoded rows. Saves no rows where it has the table."""

    @staticmethod
    def forward(ctx, latent_rows, z_rows, quantizer, rows, table):
        ctx.quantizer, ctx.has_z, ctx.has_table = quantizer, z_rows is not None, table is not None
        ctx.save_for_backward(latent_rows if table is None else table, rows)
        return quantizer.compute(latent_rows, rows)[0].to(latent_rows.dtype)

    @staticmethod
    def backward(ctx, grad):
        latent_rows, rows = ctx.saved_tensors
        if ctx.has_table:
            latent_rows = F.embedding(rows, latent_rows)
        grad_latent, grad_z = ctx.quantizer.gradients(grad.contiguous(), latent_rows, rows)
        return grad_latent, grad_z if ctx.has_z else None, None, None, None


class FakeQuantLinear(torch.autograd.Function):
    """y = x W^T with a fake-quantized W, and x and y on their static scales where there are latents of these.

    Saves x, as a plain linear does, and no copy of W, of the quantized x or of y: these are computed again.
    """

    @staticmethod
    def forward(ctx, x, latent, z, bias, input_z, output_z, quantizer):
        dtype = compute_dtype(x, latent)
        x = x.to(dtype)
        ctx.quantizer, ctx.has_bias = quantizer, bias is not None
        ctx.save_for_backward(x, latent, None if output_z is None else bias, input_z, output_z)
        y = F.linear(quantize_static(x, input_z), _values(quantizer, latent, dtype), _in(dtype, bias))
        return quantize_static(y, output_z)

    @staticmethod
    def backward(ctx, grad):
        x, latent, bias, input_z, output_z = ctx.saved_tensors
        quantizer, needs = ctx.quantizer, ctx.needs_input_grad
        quantized_x = quantize_static(x, input_z)
        weight = _values(quantizer, latent, grad.dtype)
        grad_output_z = grad_input_z = grad_x = grad_latent = grad_z = None
        if output_z is not None:
            grad, grad_output_z = static_gradients(grad, F.linear(quantized_x, weight, _in(grad.dtype, bias)), output_z)
        if needs[0] or needs[4]:
            grad_x, grad_input_z = static_gradients(grad @ weight, x, input_z)
        flat = grad.flatten(0, -2)
        if needs[1] or needs[2]:
            grad_latent, grad_z = quantizer.gradients(flat.T @ quantized_x.flatten(0, -2), latent, reuse=True)
        grad_bias = flat.sum(0) if ctx.has_bias else None
        return grad_x, grad_latent, grad_z, grad_bias, grad_input_z, grad_output_z, None


def _in(dtype: torch.dtype, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _values(quantizer: WeightQuantizer, latent: Tensor, dtype: torch.dtype) -> Tensor:
    values = quantizer.values
    return values if values is not None else quantizer.compute(latent, dtype=dtype)[0]


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype a linear computes in: autocast's where it is on, the weight's otherwise."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class RoundStraightThrough(torch.autograd.Function):
    """Float leftovers: rounded to the stored dtype forward, identity backward. rounded: as cached, or None."""

    @staticmethod
    def forward(ctx, latent, grid, rounded):
        return grid.round(latent).to(latent.dtype) if rounded is None else rounded.view_as(rounded)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None
