"""Quantization without training: fit, pack, done. Streams the checkpoint a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from intaglio.errors import WeightError
from intaglio.numerics.fit import check_finite, fit_absmax, fit_mse, fit_stock
from intaglio.numerics.grid import BlockGrid, FloatGrid, Quantized
from intaglio.packed.checkpoint import model_name, stream_chunks
from intaglio.packed.model import PackedModel, write_packed
from intaglio.plan.plan import Plan

FITS: dict[str, Callable[[Tensor, BlockGrid], Quantized]] = {
    "mse": fit_mse,
    "stock": fit_stock,
    "absmax": fit_absmax,
}


def fit_tensor(values: Tensor, plan: Plan, name: str, rows: slice | None = None) -> Quantized | Tensor:
    """One tensor, or these rows of it, on its planned grid: the recipe's fit, or rounding for a float leftover."""
    tensor, grid = plan[name], plan[name].grid
    if values.ndim or tensor.spec.role != "tower_float":  # the bounds of a clipped linear may be infinite
        check_finite(values, name, rows.start if rows else 0)
    if tensor.full_floats:
        return values.float()
    try:
        return grid.round(values) if isinstance(grid, FloatGrid) else FITS[plan.recipe.fit](values, grid)
    except WeightError as error:
        raise WeightError(f"{name}: {error}") from error


def quantize(
    model_dir: str | Path,
    plan: Plan,
    out: str | Path,
    *,
    replace: bool = False,
    provenance: dict[str, Any] | None = None,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> PackedModel:
    """Write a PackedModel of `model_dir` by the recipe's fit alone; static scales are left off.

    on_tensor is called with each tensor's name when it is done. Raises ConfigError for a damaged
    checkpoint and WeightError for NaN, Inf or weights beyond a grid's reach; nothing is left behind.
    """
    source, target = Path(model_dir), Path(out)
    record = {"name": model_name(source), "method": f"fit {plan.recipe.fit}", **(provenance or {})}
    with write_packed(target, plan, assets=source, provenance=record, replace=replace) as writer:
        for name, rows, values in stream_chunks(source, plan.model):
            writer.add(name, fit_tensor(values, plan, name, rows), rows)
            if rows is None or rows.stop == plan[name].spec.shape[0]:
                on_tensor(name)
        writer.leave_static_off()
    return PackedModel.open(target)
