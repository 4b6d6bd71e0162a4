"""The codes of some rows of a source on the planned grid: taken over, recovered from floats, or fitted anew."""

from __future__ import annotations

from typing import Any

import torch

from intaglio.errors import WeightError
from intaglio.numerics.grid import EMPTY_STEP, BlockGrid, Quantized
from intaglio.numerics.identify import Hypothesis
from intaglio.numerics.rounding import HALF_LARGEST, round_half
from intaglio.plan.plan import PlannedTensor
from intaglio.sources.inspect import recovered_blocks
from intaglio.train.quantize import FITS, check_finite


def coded(
    tensor: PlannedTensor,
    hypothesis: Hypothesis | None,
    value: Any,
    fit: str,
    rows: slice | None,
    lead: tuple[int, ...],
) -> Quantized:
    """Some rows [*lead, columns] of a tensor on its planned grid; the fit is for blocks that are not recovered.

    value: the source's codes, or floats [R, C] for which the hypothesis holds. Raises WeightError for values that are
    not finite and for scales beyond the grid's.
    """
    grid = tensor.grid
    assert isinstance(grid, BlockGrid)
    first_row = rows.start if rows else 0
    if isinstance(value, Quantized):
        return _recoded(value, grid, tensor.name, lead)
    assert hypothesis is not None
    parts = list(recovered_blocks(value, hypothesis))
    codes = torch.cat([part.codes for part in parts])
    scale = torch.cat([part.scale for part in parts])
    exact = torch.cat([part.exact for part in parts])
    if not bool(exact.all()):
        left = (~exact).nonzero().squeeze(1)
        blocks = value.reshape(-1, grid.block_size)[left].float()
        check_finite(value, tensor.name, first_row)
        fitted = FITS[fit](blocks, grid)
        codes[left], scale[left] = fitted.codes, fitted.step.squeeze(1)
    empty = torch.tensor(EMPTY_STEP if grid.positive else -0.0)  # ggml's scale of an empty block
    scale = torch.where((codes == 0).all(1), empty, scale)
    scale = scale if grid.positive else round_half(scale)
    if float(scale.abs().max()) > HALF_LARGEST and not grid.positive:
        raise WeightError(f"{tensor.name}: a scale of {float(scale.abs().max()):.3g} is beyond float16")
    return Quantized(grid, codes.reshape(*lead, -1).contiguous(), scale.reshape(*lead, -1).to(grid.scale_dtype))


def _recoded(value: Quantized, grid: BlockGrid, name: str, lead: tuple[int, ...]) -> Quantized:
    """The same codes and scales on the planned grid, which has the same bytes."""
    scales = (value.scale, *(() if value.super_scale is None else (value.super_scale,)))
    if not all(bool(torch.isfinite(scale).all()) for scale in scales) or int(value.codes.min()) < grid.code_min:
        raise WeightError(f"{name}: has scales that are not finite, or codes below {grid.code_min}: download it again")
    scale = value.scale if value.scale.dtype == grid.scale_dtype else value.scale.to(grid.scale_dtype)
    if not bool(torch.isfinite(scale).all()):
        raise WeightError(f"{name}: a scale of {float(value.scale.abs().max()):.3g} is beyond float16")
    super_scale = None if value.super_scale is None else value.super_scale.reshape(*lead, -1)
    return Quantized(grid, value.codes.reshape(*lead, -1), scale.reshape(*lead, -1), super_scale)
