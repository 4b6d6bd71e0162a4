"""The result of llama.cpp's quantizer on a tensor, bit for bit, on a CPU and on a GPU.

A fused multiply-add would change some codes. PyTorch's eager kernels do one operation each, and IEEE 754 says what each
gives, so both devices find the same bits. Three rules keep it so: never compile this file, divide by a number with
`divide`, and add in a fixed order, not with `sum`.

Shape suffixes as in `grid`: R rows, C columns, S steps in a row, K columns under one step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intaglio.errors import WeightError
from intaglio.numerics.fit import concatenate, extremum, row_chunks
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.numerics.rounding import divide

Q6_K_EMPTY = 1e-15  # ggml: GROUP_MAX_EPS


def fit_stock(values_RC: Tensor, grid: BlockGrid) -> Quantized:
    """The codes and scales that llama.cpp's quantizer would write, bit for bit (without an importance matrix).

    Source of the rules: ggml-quants.c, quantize_row_{q4_0,q8_0,q6_K,q2_0}_ref.
    """
    rule = {"Q4_0": _stock_q4_0, "Q8_0": _stock_absmax, "Q6_K": _stock_q6_k, "Q2_0": _stock_absmax}[str(grid.ggml_type)]
    parts = [rule(chunk.float(), grid) for chunk in row_chunks(values_RC)]
    return concatenate(parts)


def _stock_q4_0(values_RC: Tensor, grid: BlockGrid) -> Quantized:
    blocks = grid.blocks(values_RC)
    peak = extremum(blocks)
    step = torch.where(peak == 0, 0.0, peak) / -8  # the scale of an empty block is -0.0, whatever its zeros' signs
    inverse = _inverse(step)
    # trunc(x / step + 8.5) with the float32 inverse, before the scale is rounded to float16
    codes = (blocks * inverse.unsqueeze(-1) + 8.5).trunc().clamp(max=15) - 8
    return Quantized(grid, codes.flatten(-2).to(torch.int8), _to_half(step, grid))


def _stock_absmax(values_RC: Tensor, grid: BlockGrid) -> Quantized:
    # Q2_0 takes the largest magnitude itself for the scale, so of its four codes 2 stays unused; its signs are mirrored
    blocks = grid.blocks(values_RC)
    step = divide(blocks.abs().amax(-1), 127 if grid.ggml_type == "Q8_0" else -1)
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
