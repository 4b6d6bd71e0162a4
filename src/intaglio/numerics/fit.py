"""First scales for a tensor: each format's own rules, and a search for the least squared error.

Shape suffixes as in `grid`: R rows, C columns, S steps in a row, K columns under one step.

A fit returns codes and scales; training then learns from the steps. Nothing outside training and
`quantize` may import this module: an exporter that could fit could also re-quantize.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from intaglio.errors import WeightError
from intaglio.numerics.fit_channel import absmax_steps, search_steps
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.numerics.rounding import HALF_LARGEST, divide, power_of_two_below, round_significant
from intaglio.numerics.steps import from_steps

# The search tries steps between these multiples of the one that maps the extremum to the last code.
# Below 0.6 more than a quarter of a Gaussian block would be clipped; above 1.1 the range is wasted,
# unless steps are so coarse (few significant bits) that the next one up lies further away.
LOWEST_RATIO = 0.6
HIGHEST_RATIO = 1.1
CANDIDATES = 26
COARSE_BITS = 5  # steps of so few bits are further apart than candidates: all of them are tried, each once
CHUNK_ELEMENTS = 1 << 18  # a chunk and its temporaries stay in the processor's cache
GPU_CHUNK_ELEMENTS = 1 << 24  # a GPU wants few launches; a chunk and its temporaries take about a gigabyte


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


def fit_absmax(values_RC: Tensor, grid: BlockGrid) -> Quantized:
    """Channel grids: the largest magnitude of each block on code_max, as quantizers do without data."""
    parts = []
    for chunk in row_chunks(values_RC):
        values = chunk.float()
        step = absmax_steps(values, grid)
        parts.append(from_steps(grid, grid.encode(values, step), step))
    return concatenate(parts)


def fit_mse(values_RC: Tensor, grid: BlockGrid, importance_C: Tensor | None = None) -> Quantized:
    """Steps of least squared error among the grid's own, by search.

    importance_C: optional weight of each column, for example its mean squared activation.
    """
    parts = []
    for chunk in row_chunks(values_RC):
        values = chunk.float()
        search = search_steps if grid.positive else _search_steps
        step = search(values, grid, importance_C)
        if grid.super_block is not None:
            step = _join_super_blocks(step, grid)
        parts.append(from_steps(grid, grid.encode(values, step), _signed_zero(step)))
    return concatenate(parts)


def row_chunks(values_RC: Tensor) -> tuple[Tensor, ...]:
    """Views of rows: so few that one chunk's search stays in the processor's cache, more on a GPU."""
    elements = CHUNK_ELEMENTS if values_RC.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    rows = max(1, elements // values_RC.shape[-1])
    return tuple(values_RC.split(rows))


def concatenate(parts: list[Quantized]) -> Quantized:
    """Joins the parts that were fitted by `row_chunks` into one tensor."""
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
    base = divide(peak, grid.code_min)
    if base.numel() and float(base.abs().max()) > HALF_LARGEST:
        raise WeightError(
            f"a weight of {float(peak.abs().max()):.3g} is beyond the reach of grid {grid.name}: "
            f"float16 scales end at {HALF_LARGEST:.0f}"
        )
    importance = None if importance_C is None else grid.blocks(importance_C.float())
    best_step = torch.zeros_like(base)
    best_error = torch.full_like(base, torch.inf)
    scratch = torch.empty_like(blocks)
    for step in _candidates(base, grid):
        divisor = torch.where(step == 0, 1.0, step).unsqueeze(-1)
        error = torch.div(blocks, divisor, out=scratch).round_().clamp_(grid.code_min, grid.code_max)
        error = error.mul_(step.unsqueeze(-1)).sub_(blocks).square_()
        error = (error if importance is None else error.mul_(importance)).sum(-1)
        better = error < best_error
        best_step = torch.where(better, step, best_step)
        best_error = torch.where(better, error, best_error)
    return best_step


def _candidates(base: Tensor, grid: BlockGrid) -> Iterator[Tensor]:
    """Steps to try for each block, float32 like `base`, of both signs unless the grid settles that."""
    highest = 1.0 if grid.canonical else max(HIGHEST_RATIO, 1 + 2.0 ** (1 - grid.step_bits))
    if grid.step_bits <= COARSE_BITS:
        steps = _steps_between(base * LOWEST_RATIO, base * highest, grid)
    else:
        steps = (base * ratio for ratio in torch.linspace(LOWEST_RATIO, highest, CANDIDATES).tolist())
    for step in steps:
        for signed in (step,) if grid.canonical else (step, -step):
            yield _round_search_step(signed, grid)


def _steps_between(low: Tensor, high: Tensor, grid: BlockGrid) -> Iterator[Tensor]:
    """Every step of so few significant bits between two; where a block has fewer than others, its last again."""
    successor = 1 << (24 - grid.step_bits)  # of the bit pattern, for either sign
    step, last = (round_significant(x, grid.step_bits).view(torch.int32) for x in (low, high))
    for _ in range(int((last - step).max()) // successor + 1 if step.numel() else 0):
        yield step.view(torch.float32)
        step = torch.minimum(step + successor, last)


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
