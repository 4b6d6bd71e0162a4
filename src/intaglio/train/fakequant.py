"""Fake quantization: the training forward sees `code x step`, the latents behind it stay float32.

Shape suffixes: R rows, C columns, S steps in a row; N blocks of K neighbouring columns.

Four modes say where a block's step comes from. `z` is the learned scale latent of a block.

    canonical  step = extremum / code_min x ratio(z), ratio in (0.6, 1]: clips, never widens, so
               the extremum keeps code_min and llama.cpp's quantizer finds the same grid again
    free       step = sign x exp(z), sign fixed by the first fit
    fixed      step as fitted; only the codes follow the latents
    frozen     step = sign x exp(z), and the codes stand still

Rounding passes gradients straight through (STE); clipping stops them, and what clipping stops
reaches the step instead, as in LSQ (Esser et al. 2020, arXiv:1902.08153). The backward recomputes
codes and steps from the latents: nothing but the latents themselves is kept between the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.errors import MismatchError
from intaglio.numerics.grid import BlockGrid, Quantized, from_steps, round_half

LOWEST_RATIO = 0.6  # of the canonical step; a tighter clip would cost more than it gains
CHUNK_BLOCKS = 1 << 13
SMALLEST_LOG_STEP = -28.0  # exp(-28) rounds to zero on every grid: an empty block


def _ratio(z: Tensor) -> Tensor:
    return LOWEST_RATIO + (1 - LOWEST_RATIO) * torch.sigmoid(z)


def _extremum(blocks_NK: Tensor) -> Tensor:
    """Signed value of largest magnitude [N]. Of a tie in magnitude the positive value is taken:
    its opposite is clipped to code_max, so the decoded block has one extremum all the same."""
    highest, lowest = blocks_NK.amax(-1), blocks_NK.amin(-1)
    return torch.where(highest >= -lowest, highest, lowest)


def _round_step(step: Tensor, grid: BlockGrid) -> Tensor:
    rounded = round_half(step, grid.step_bits)
    if grid.canonical:
        rounded = torch.where(rounded.abs() < 2.0**-20, torch.zeros_like(rounded), rounded)
    return rounded


def _step(mode: str, grid: BlockGrid, blocks: Tensor, z: Tensor, given: Tensor) -> Tensor:
    """Rounded steps [N]. `given`: signs (free, frozen) or the steps themselves (fixed), float32."""
    if mode == "fixed":
        return given
    if mode == "canonical":
        return _round_step(_extremum(blocks) / grid.code_min * _ratio(z), grid)
    return _round_step(given * torch.exp(z), grid)


def _codes(grid: BlockGrid, blocks: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and, before rounding and clipping, the positions between them: float32 [N, K]."""
    position = blocks / torch.where(step == 0, torch.ones_like(step), step).unsqueeze(-1)
    codes = position.round().clamp(grid.code_min, grid.code_max)
    return torch.where((step == 0).unsqueeze(-1), torch.zeros_like(codes), codes), position


def _forward(mode: str, grid: BlockGrid, blocks: Tensor, z: Tensor, given: Tensor, frozen: Tensor):
    """Values [N, K] and steps [N], float32."""
    step = _step(mode, grid, blocks, z, given)
    codes = frozen.float() if mode == "frozen" else _codes(grid, blocks, step)[0]
    return codes * step.unsqueeze(-1), step


def _backward(mode: str, grid: BlockGrid, grad: Tensor, blocks: Tensor, z: Tensor, given: Tensor, frozen: Tensor):
    """Gradients of the latents [N, K] and of z [N] for a gradient of the values [N, K]."""
    grad = grad.float()
    step = _step(mode, grid, blocks, z, given)
    if mode == "frozen":
        grad_z = (grad * frozen.float()).sum(-1) * step
        return torch.zeros_like(grad), grad_z
    codes, position = _codes(grid, blocks, step)
    inside = (position >= grid.code_min) & (position <= grid.code_max)
    grad_latent = torch.where(inside, grad, torch.zeros_like(grad))
    if mode == "fixed":
        return grad_latent, torch.zeros_like(z)
    grad_step = (grad * (codes - torch.where(inside, position, torch.zeros_like(position)))).sum(-1)
    if mode == "free":
        return grad_latent, grad_step * given * torch.exp(z)
    peak, ratio = _extremum(blocks), _ratio(z)
    at_peak = (blocks == peak.unsqueeze(-1)).float()
    at_peak = at_peak / at_peak.sum(-1, keepdim=True)
    grad_latent = grad_latent + at_peak * (grad_step * ratio / grid.code_min).unsqueeze(-1)
    sigmoid = torch.sigmoid(z)
    grad_z = grad_step * peak / grid.code_min * (1 - LOWEST_RATIO) * sigmoid * (1 - sigmoid)
    return grad_latent, grad_z


@functools.cache
def _kernel(function: Callable, mode: str, grid: BlockGrid, compiled: bool) -> Callable:
    kernel = functools.partial(function, mode, grid)
    return torch.compile(kernel, dynamic=True) if compiled else functools.partial(_in_chunks, kernel)


def _in_chunks(kernel: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Run an elementwise kernel over runs of blocks whose temporaries stay in the processor's cache.

    On a CPU this takes a tenth of the time of one pass over a large weight. Empty tensors stand for
    arguments that the mode does not have.
    """
    count = max(t.shape[0] for t in tensors)
    if count <= CHUNK_BLOCKS or tensors[0].is_cuda:
        return kernel(*tensors)
    parts = [
        kernel(*(t[i : i + CHUNK_BLOCKS] if t.numel() else t for t in tensors)) for i in range(0, count, CHUNK_BLOCKS)
    ]
    return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))


class WeightQuantizer(nn.Module):
    """The grid of one weight: how to decode its latents, and the learned part of its scales.

    scale_latent: float32 parameter [R, S], or None in fixed mode.
    scale, super_scale: the fitted scales, in fixed mode only.
    sign: int8 buffer [R, S] of +1 and -1, in free and frozen mode.
    codes: int8 buffer [R, C], only once frozen.
    compiled: run the kernels through torch.compile.
    """

    def __init__(self, grid: BlockGrid, latent: Tensor, fitted: Quantized, *, learned: bool, compiled: bool = False):
        super().__init__()
        self.grid = grid
        self.compiled = compiled
        device = latent.device
        self.mode = "fixed" if not learned else "canonical" if grid.canonical else "free"
        step = fitted.step.to(device) if learned else None
        self.register_buffer("scale", None if learned else fitted.scale.to(device))
        has_super = not learned and fitted.super_scale is not None
        self.register_buffer("super_scale", fitted.super_scale.to(device) if has_super else None)
        self.register_buffer("sign", _signs(step) if self.mode == "free" else None)
        self.register_buffer("codes", None)
        scale_latent = None
        if step is not None:
            scale_latent = _ratio_latent(grid, latent, step) if grid.canonical else _log_magnitude(step)
        self.scale_latent = None if scale_latent is None else nn.Parameter(scale_latent)
        self.values: Tensor | None = None  # decoded once for the optimizer step; see `cache_values`
        self.decoded: Tensor | None = None  # the same with its place in the autograd graph

    def blocks_of(self, tensor: Tensor) -> Tensor:
        """[..., C] as [N, K]."""
        return tensor.reshape(-1, self.grid.block_size)

    def arguments(self, latent: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Kernel arguments for the whole weight, or for the given rows of it."""

        def pick(tensor: Tensor | None) -> Tensor:
            if tensor is None:
                return latent.new_empty(0)
            return tensor.detach() if rows is None else tensor.detach()[rows]

        given = pick(self.sign)
        if self.mode == "fixed":
            supers = None if self.super_scale is None else pick(self.super_scale).flatten(0, -2)
            scale = pick(self.scale)
            given = Quantized(self.grid, scale, scale.flatten(0, -2), supers).step
        codes = pick(self.codes)
        return (
            self.blocks_of(latent.detach()).float(),
            pick(self.scale_latent).reshape(-1),
            given.reshape(-1).float(),
            codes if self.codes is None else self.blocks_of(codes),
        )

    @torch.no_grad()
    def compute(self, latent: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Decoded values, float32 in the latents' shape, and steps [N]."""
        kernel = _kernel(_forward, self.mode, self.grid, self.compiled)
        values, step = kernel(*self.arguments(latent, rows))
        return values.view(latent.shape), step

    @torch.no_grad()
    def gradients(self, grad: Tensor, latent: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Gradients of latents and scale latents (None in fixed mode), of these rows."""
        kernel = _kernel(_backward, self.mode, self.grid, self.compiled)
        grad_latent, grad_z = kernel(self.blocks_of(grad), *self.arguments(latent, rows))
        steps_shape = (*latent.shape[:-1], latent.shape[-1] // self.grid.block_size)
        return grad_latent.view(latent.shape), None if self.scale_latent is None else grad_z.view(steps_shape)

    def forward(self, latent: Tensor, dtype: torch.dtype) -> Tensor:
        """The whole weight as the runtime will decode it, in `dtype`, with gradients."""
        return FakeQuantize.apply(latent, self.scale_latent, self, dtype)

    def forward_rows(self, latent_rows: Tensor, rows: Tensor) -> Tensor:
        """Rows gathered from the latents, decoded after the gather: the cost follows the tokens."""
        z_rows = None if self.scale_latent is None else F.embedding(rows, self.scale_latent)
        return FakeQuantizeRows.apply(latent_rows, z_rows, self, rows)

    @torch.no_grad()
    def freeze(self, latent: Tensor) -> None:
        """Fix the codes of the present forward; only the scales go on learning."""
        quantized = self.pack(latent)
        step = quantized.step.to(latent.device)
        self.codes = quantized.codes.to(latent.device)
        self.sign, self.mode = _signs(step), "frozen"
        self.scale_latent = nn.Parameter(_log_magnitude(step))

    @torch.no_grad()
    def pack(self, latent: Tensor) -> Quantized:
        """Codes and scales of the forward itself: taken from the values it decoded, not fitted anew.

        Raises MismatchError if the codes did not decode to those very values.
        """
        values, step = self.compute(latent)
        step = step.view(*latent.shape[:-1], -1).cpu()
        values = values.cpu()
        codes = self.grid.encode(values, step)
        if self.mode == "fixed":
            super_scale = None if self.super_scale is None else self.super_scale.cpu()
            quantized = Quantized(self.grid, codes, self.scale.cpu(), super_scale)
        else:
            step = torch.where(step == 0, torch.full_like(step, -0.0), step)  # as ggml writes empty blocks
            quantized = from_steps(self.grid, codes, step)
        if not torch.equal(quantized.decode(), values):
            raise MismatchError("packed codes do not decode to the values of the training forward")
        return quantized


def _signs(step: Tensor) -> Tensor:
    return torch.where(step < 0, -1, 1).to(torch.int8)


def _log_magnitude(step: Tensor) -> Tensor:
    return step.abs().log().clamp_min(SMALLEST_LOG_STEP)


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
        return quantizer.compute(latent)[0].to(dtype)

    @staticmethod
    def backward(ctx, grad):
        (latent,) = ctx.saved_tensors
        grad_latent, grad_z = ctx.quantizer.gradients(grad.contiguous(), latent)
        return grad_latent.to(latent.dtype), grad_z, None, None


class FakeQuantizeRows(torch.autograd.Function):
    """Gathered latents [..., C] and their z -> decoded rows, float32."""

    @staticmethod
    def forward(ctx, latent_rows, z_rows, quantizer, rows):
        ctx.quantizer, ctx.has_z = quantizer, z_rows is not None
        ctx.save_for_backward(latent_rows, rows)
        return quantizer.compute(latent_rows, rows)[0].to(latent_rows.dtype)

    @staticmethod
    def backward(ctx, grad):
        latent_rows, rows = ctx.saved_tensors
        grad_latent, grad_z = ctx.quantizer.gradients(grad.contiguous(), latent_rows, rows)
        return grad_latent.to(latent_rows.dtype), grad_z if ctx.has_z else None, None, None


class FakeQuantLinear(torch.autograd.Function):
    """y = x W^T with a fake-quantized W. Saves x, as a plain linear does, and no copy of W."""

    @staticmethod
    def forward(ctx, x, latent, z, bias, quantizer):
        dtype = compute_dtype(x, latent)
        x = x.to(dtype)
        ctx.quantizer, ctx.has_bias = quantizer, bias is not None
        ctx.save_for_backward(x, latent)
        return F.linear(x, _values(quantizer, latent, dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx, grad):
        x, latent = ctx.saved_tensors
        quantizer = ctx.quantizer
        grad_x = grad @ _values(quantizer, latent, grad.dtype) if ctx.needs_input_grad[0] else None
        flat = grad.flatten(0, -2)
        grad_latent = grad_z = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_latent, grad_z = quantizer.gradients(flat.T @ x.flatten(0, -2), latent)
            grad_latent = grad_latent.to(latent.dtype)
        return grad_x, grad_latent, grad_z, flat.sum(0) if ctx.has_bias else None, None


def _values(quantizer: WeightQuantizer, latent: Tensor, dtype: torch.dtype) -> Tensor:
    values = quantizer.values
    return values if values is not None else quantizer.compute(latent)[0].to(dtype)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype a linear computes in: autocast's where it is on, the weight's otherwise."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class RoundStraightThrough(torch.autograd.Function):
    """Float leftovers: rounded to the stored dtype forward, identity backward."""

    @staticmethod
    def forward(ctx, latent, grid):
        return grid.round(latent).to(latent.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None
