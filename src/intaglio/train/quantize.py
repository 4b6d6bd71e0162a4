"""Quantization without training: fit, pack, done.

Streams the checkpoint a few rows of a tensor at a time: from the file to the device, where they are fitted, and back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from intaglio.errors import ConfigError, WeightError
from intaglio.numerics.device import Device, device_for
from intaglio.numerics.fit import check_finite as check_finite
from intaglio.numerics.fit import fit_absmax, fit_mse
from intaglio.numerics.fit_stock import fit_stock
from intaglio.numerics.grid import BlockGrid, FloatGrid, Quantized
from intaglio.packed.checkpoint import stream_chunks
from intaglio.packed.model import PackedModel
from intaglio.packed.origin import provenance_of
from intaglio.packed.write import PackedWriter, write_packed
from intaglio.plan.hub import find_model
from intaglio.plan.plan import Plan
from intaglio.progress import Progress
from intaglio.train.towers import Towers

FITS: dict[str, Callable[[Tensor, BlockGrid], Quantized]] = {
    "mse": fit_mse,
    "stock": fit_stock,
    "absmax": fit_absmax,
}


def fit_rows(fit: Callable[[Tensor, BlockGrid], Quantized], values: Tensor, grid: BlockGrid) -> Quantized:
    """A fit of matrices, also for the weights of experts [E, R, C]: each row of each expert by itself."""
    return fit(values.flatten(0, -2), grid).with_lead(values.shape[:-1])


def fit_tensor(values: Tensor, plan: Plan, name: str, rows: slice | None = None) -> Quantized | Tensor:
    """One tensor, or these rows of it, on its planned grid: the recipe's fit, or rounding for a float leftover."""
    tensor, grid = plan[name], plan[name].grid
    if values.ndim or tensor.spec.role != "tower_float":  # the bounds of a clipped linear may be infinite
        check_finite(values, name, rows.start if rows else 0)
    if tensor.full_floats:
        return values.float()
    try:
        return grid.round(values) if isinstance(grid, FloatGrid) else fit_rows(FITS[plan.recipe.fit], values, grid)
    except WeightError as error:
        raise WeightError(f"{name}: {error}") from error


def quantize(
    model_dir: str | Path,
    plan: Plan,
    out: str | Path,
    *,
    trained: PackedModel | None = None,
    towers: Towers | None = None,
    replace: bool = False,
    provenance: dict[str, Any] | None = None,
    device: Device = None,
    progress: Progress | None = None,
) -> PackedModel:
    """Write a PackedModel of `model_dir` by the recipe's fit alone; static scales are left off.

    trained: a packed model of the same text model and recipe, whose codes and scales are taken as they
        are; what is left to fit is what the plan carries beside it, such as towers.
    towers: those whose activation scales are calibrated when their weights are packed.
    device: where tensors are fitted; None picks a GPU if there is one. Stock and absmax fits have the same bits
        on every device; the searches of an MSE fit may choose a neighbouring step where two are as good.

    progress: shows each tensor that is done. Raises ConfigError for a damaged checkpoint and WeightError for NaN, Inf
    or weights beyond a grid's reach; nothing is left behind.
    """
    source, target, device = find_model(model_dir, progress), Path(out), device_for(device)
    record = {**provenance_of(source), "method": f"fit {plan.recipe.fit}", **(provenance or {})}
    if trained is not None:
        _check_trained(trained, plan)
        record |= trained.provenance
    number, progress = itertools.count(1), progress or Progress()
    with write_packed(target, plan, assets=source, provenance=record, replace=replace) as writer:
        writer.leave_static_off()  # first: what is found below replaces it
        if trained is not None:
            for name in _copied(trained, writer):
                progress.part(next(number), len(plan.everything), name)
        wanted = None if trained is None else {tensor.name for tensor in plan.carried}
        for name, rows, values in stream_chunks(source, plan.model, only=wanted):
            value = fit_tensor(values.to(device), plan, name, rows)
            writer.add(name, value, rows)
            if towers is not None:
                towers.put(name, value, rows)
            if rows is None or rows.stop == plan[name].spec.shape[0]:
                progress.part(next(number), len(plan.everything), name)
        for name, scale in towers.calibrate().items() if towers is not None else ():
            writer.add_static(name, scale)
    return PackedModel.open(target)


def _check_trained(trained: PackedModel, plan: Plan) -> None:
    if trained.plan.tensors != plan.tensors or trained.plan.static_scales != plan.static_scales:
        raise ConfigError(
            f"{trained.path}: holds recipe {trained.plan.recipe.name} of another text model or with other grids: "
            "expected that of this checkpoint and recipe"
        )


def _copied(trained: PackedModel, writer: PackedWriter) -> Iterator[str]:
    """Copies a packed model's text into another one that is being written; yields each tensor's name."""
    for tensor in trained.plan:
        for rows, value in trained.chunks(tensor.name):
            writer.add(tensor.name, value, rows)
        yield tensor.name
    values = trained.read_static()
    for scale in trained.plan.static_scales:
        if scale.owned:
            writer.add_static(scale.name, values[scale.name])
