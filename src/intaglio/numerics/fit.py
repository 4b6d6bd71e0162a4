"""First scales for a tensor: each format's own rules, and a search for the least squared error.

Shape suffixes as in `grid`: R rows, C columns, S steps in a row, K columns under one step.

A fit returns codes and scales; training then learns from the steps. Nothing outside training and
`quantize` may import this module: an exporter that could fit could also re-quantize.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intaglio.errors import WeightError
from intaglio.numerics.fit_channel import absmax_steps, search_steps
from intaglio.numerics.grid import (
    HALF_LARGEST,
    BlockGrid,
    Quantized,
    from_steps,
    power_of_two_below,
    round_significant,
)

# The search tries steps between these multiples of the one that maps the extremum to the last code.
# Below 0.6 more than a quarter of a Gaussian block would be clipped; above 1.1 the range is wasted,
# unless steps are so coarse (few significant bits) that the next one up lies further away.
LOWEST_RATIO = 0.6
HIGHEST_RATIO = 1.1
CANDIDATES = 26
Q6_K_EMPTY = 1e-15  # ggml: GROUP_MAX_EPS
CHUNK_ELEMENTS = 1 << 18  # a chunk and its temporaries stay in the processor's cache


def check_finite(values: Tensor, name: str, first_row: int = 0) -> None:
    """Raise WeightError naming the tensor and the first bad index; its rows begin with `first_row`."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        first, *others = (int(i) for i in (~finite).nonzero()[0])
        index = (first_row + first, *others)
        raise WeightError(
            f"{name}: {int((~finite).sum())} values are NaN or Inf, the first at index {index}: "
            "repair or re-export the checkpoint"
        )


def extremum(values_RSK: Tensor) -> Tensor:
    """The element of largest magnitude, the first one where several tie: [R, S]."""
    magnitude = values_RSK.abs()
    index = torch.arange(values_RSK.shape[-1], 0, -1, device=values_RSK.device)
    # argmax promises no order among ties, so ties are broken by position
    first = ((magnitude == magnitude.amax(-1, keepdim=True)) * index).argmax(-1, keepdim=True)
    return values_RSK.gather(-1, first).squeeze(-1)


def fit_stock(values_RC: Tensor, grid: BlockGrid) -> Quantized:
    """What llama.cpp's quantizer would write, bit for bit (without an importance matrix).

    Source of the rules: ggml-quants.c, quantize_row_{q4_0,q8_0,q6_K}_ref.
    """
    rule = {"Q4_0": _stock_q4_0, "Q8_0": _stock_q8_0, "Q6_K": _stock_q6_k}[str(grid.ggml_type)]
    parts = [rule(chunk.float(), grid) for chunk in _row_chunks(values_RC)]
    return _concatenate(parts)


def fit_absmax(values_RC: Tensor, grid: BlockGrid) -> Quantized:
    """Channel grids: the largest magnitude of each block on code_max, as quantizers do without data."""
    parts = []
    for chunk in _row_chunks(values_RC):
        values = chunk.float()
        step = absmax_steps(values, grid)
        parts.append(from_steps(grid, grid.encode(values, step), step))
    return _concatenate(parts)


def fit_mse(values_RC: Tensor, grid: BlockGrid, importance_C: Tensor | None = None) -> Quantized:
    """Steps of least squared error among the grid's own, by search.

    importance_C: optional weight of each column, for example its mean squared activation.
    """
    parts = []
    for chunk in _row_chunks(values_RC):
        values = chunk.float()
        search = search_steps if grid.positive else _search_steps
        step = search(values, grid, importance_C)
        if grid.super_block is not None:
            step = _join_super_blocks(step, grid)
        parts.append(from_steps(grid, grid.encode(values, step), _signed_zero(step)))
    return _concatenate(parts)


def _row_chunks(values_RC: Tensor) -> tuple[Tensor, ...]:
    rows = max(1, CHUNK_ELEMENTS // values_RC.shape[-1])
    return values_RC.split(rows)


def _concatenate(parts: list[Quantized]) -> Quantized:
    if len(parts) == 1:
        return parts[0]
    supers = [p.super_scale for p in parts if p.super_scale is not None]
    return Quantized(
        parts[0].grid,
        torch.cat([p.codes for p in parts]),
        torch.cat([p.scale for p in parts]),
        torch.cat(supers) if supers else None,
    )


def _signed_zero(step: Tensor) -> Tensor:
    """ggml writes -0.0 as the scale of an empty Q4_0 block (0 / -8); so do we."""
    return torch.where(step == 0, torch.full_like(step, -0.0), step)


def _search_steps(values_RC: Tensor, grid: BlockGrid, importance_C: Tensor | None) -> Tensor:
    """Least-squares step of each block, float32 [R, S], before super-blocks are joined."""
    blocks = grid.blocks(values_RC)
    peak = extremum(blocks)
    base = peak / grid.code_min
    if base.numel() and float(base.abs().max()) > HALF_LARGEST:
        raise WeightError(
            f"a weight of {float(peak.abs().max()):.3g} is beyond the reach of grid {grid.name}: "
            f"float16 scales end at {HALF_LARGEST:.0f}"
        )
    importance = None if importance_C is None else grid.blocks(importance_C.float())
    best_step = torch.zeros_like(base)
    best_error = torch.full_like(base, torch.inf)
    highest = 1.0 if grid.canonical else max(HIGHEST_RATIO, 1 + 2.0 ** (1 - grid.step_bits))
    for ratio in torch.linspace(LOWEST_RATIO, highest, CANDIDATES).tolist():
        for step in (base * ratio,) if grid.canonical else (base * ratio, base * -ratio):
            step = _round_search_step(step, grid)
            error = grid.decode(grid.encode_float(values_RC, step), step).sub_(values_RC).square_()
            error = grid.blocks(error)
            error = (error if importance is None else error * importance).sum(-1)
            better = error < best_error
            best_step = torch.where(better, step, best_step)
            best_error = torch.where(better, error, best_error)
    return best_step


def _round_search_step(step: Tensor, grid: BlockGrid) -> Tensor:
    if grid.super_block is not None:
        return round_significant(step, min(grid.step_bits, 11))
    return grid.round_step(step)


def _join_super_blocks(step_RS: Tensor, grid: BlockGrid) -> Tensor:
    """Round Q6_K steps so that each is an int8 times the power of two of its super-block."""
    assert grid.super_block is not None
    per_super = grid.super_block // grid.block_size
    largest = step_RS.abs().unflatten(-1, (-1, per_super)).amax(-1)
    unit = (power_of_two_below(largest) * 2.0**-6).clamp_min(2.0**-24).repeat_interleave(per_super, dim=-1)
    scale = (step_RS / unit).round()
    scale = torch.where((scale == 0) & (step_RS != 0), step_RS.sign(), scale)
    return round_significant(scale, min(grid.step_bits, 7)).clamp(-127, 127) * unit


def _stock_q4_0(values_RC: Tensor, grid: BlockGrid) -> Quantized:
    blocks = grid.blocks(values_RC)
    peak = extremum(blocks)
    step = torch.where(peak == 0, 0.0, peak) / -8  # the scale of an empty block is -0.0, whatever its zeros' signs
    inverse = _inverse(step)
    # trunc(x / step + 8.5) with the float32 inverse, before the scale is rounded to float16
    codes = (blocks * inverse.unsqueeze(-1) + 8.5).trunc().clamp(max=15) - 8
    return Quantized(grid, codes.flatten(-2).to(torch.int8), _to_half(step, grid))


def _stock_q8_0(values_RC: Tensor, grid: BlockGrid) -> Quantized:
    blocks = grid.blocks(values_RC)
    step = blocks.abs().amax(-1) / 127
    inverse = _inverse(step)
    scaled = blocks * inverse.unsqueeze(-1)
    # C's roundf: halves away from zero. Adding 0.5 in float32 would round 0.49999997 up.
    codes = scaled.trunc() + ((scaled - scaled.trunc()).abs() >= 0.5) * scaled.sign()
    return Quantized(grid, codes.flatten(-2).to(torch.int8), _to_half(step, grid))


def _inverse(step: Tensor) -> Tensor:
    """1 / step in float32; 0 where that is infinite, for steps that are zero in float16 all the same."""
    inverse = 1.0 / step
    return torch.where(torch.isfinite(inverse), inverse, 0.0)


def _to_half(step: Tensor, grid: BlockGrid) -> Tensor:
    scale = step.to(torch.float16)
    if not bool(torch.isfinite(scale).all()):
        raise WeightError(
            f"a scale of {float(step.abs().max()):.3g} overflows float16 in grid {grid.name}: "
            "the weights are too large for this format"
        )
    return scale


def _stock_q6_k(values_RC: Tensor, grid: BlockGrid) -> Quantized:
    step, search_codes = _q6_k_search(grid.blocks(values_RC))
    per_super = step.unflatten(-1, (-1, 16))  # [R, C / 256, 16]
    peak = extremum(per_super)
    empty = peak.abs() < Q6_K_EMPTY
    inverse = torch.where(empty, torch.zeros_like(peak), -128.0 / peak)
    super_scale = torch.where(empty, torch.zeros_like(peak), 1.0 / inverse).to(torch.float16)
    scale = (inverse.unsqueeze(-1) * per_super).round().clamp(max=127)
    scale = scale.flatten(-2)
    rounded = super_scale.float().repeat_interleave(16, dim=-1) * scale
    # where the rounded step is zero, ggml leaves the codes of the search in place, and those of an
    # empty block or super-block at the lowest: they decode to zero all the same
    empty_super = empty.repeat_interleave(16, dim=-1).unsqueeze(-1)
    search_codes = torch.where(empty_super, torch.full_like(search_codes, -32), search_codes).flatten(-2)
    is_zero = (rounded == 0).repeat_interleave(16, dim=-1)
    codes = torch.where(is_zero, search_codes.to(torch.int8), grid.encode(values_RC, rounded))
    return Quantized(grid, codes, scale.to(torch.int8), super_scale)


def _q6_k_search(blocks_RSK: Tensor) -> tuple[Tensor, Tensor]:
    """ggml's make_qx_quants with nmax 32 and weights x^2, for blocks of 16.

    Returns the steps, float32 [R, S], and the codes they were found with, float32 [R, S, 16].
    """
    peak = extremum(blocks_RSK)
    empty = peak.abs() < Q6_K_EMPTY
    safe_peak = torch.where(empty, torch.ones_like(peak), peak)
    columns = [c.contiguous() for c in blocks_RSK.unbind(-1)]

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        # one column after the other, as the C loop adds them: float32 sums depend on the order
        along_x, along_code = torch.zeros_like(peak), torch.zeros_like(peak)
        for x in columns:
            code = (inverse * x).round().clamp(-32, 31)
            weight = x * x
            along_x = along_x + weight * x * code
            along_code = along_code + weight * code * code
        return along_x, along_code

    best_inverse = -32.0 / safe_peak
    along_x, along_code = sums(best_inverse)
    step = torch.where(along_code > 0, along_x / along_code, torch.zeros_like(peak))
    best = step * along_x
    for nudge in (n for n in range(-9, 10) if n != 0):
        numerator = torch.tensor(32.0, dtype=torch.float32) + torch.tensor(0.1, dtype=torch.float32) * nudge
        inverse = -numerator.to(peak.device) / safe_peak
        along_x, along_code = sums(inverse)
        better = (along_code > 0) & (along_x * along_x > best * along_code)
        best_inverse = torch.where(better, inverse, best_inverse)
        step = torch.where(better, along_x / along_code, step)
        best = torch.where(better, step * along_x, best)
    codes = (blocks_RSK * best_inverse.unsqueeze(-1)).round().clamp(-32, 31)
    empty = empty.unsqueeze(-1)
    return torch.where(empty.squeeze(-1), 0.0, step), torch.where(empty, -32.0, codes)
