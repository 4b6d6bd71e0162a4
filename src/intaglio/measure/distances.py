"""Distance of each weight tensor of packed models from the original's."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from pathlib import Path

import torch

from intaglio.measure.charts import LayerRow
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.packed.checkpoint import stream_chunks
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import Plan

ORIGINAL = ""  # beside the packed models' labels


def weight_distances(
    model_dir: str | Path, plan: Plan, packed: dict[str, PackedModel], device: torch.device
) -> list[LayerRow]:
    """Relative RMS error of every tensor on a BlockGrid, for packed models by label, in the plan's order.

    A few rows of the original and of one packed model are on the device at a time. The error of a tensor of zeros is
    NaN.
    """
    planned = [tensor for tensor in plan if isinstance(tensor.grid, BlockGrid)]
    norms: dict[str, dict[str, list[float]]] = {tensor.name: defaultdict(list) for tensor in planned}
    for name, rows, values in stream_chunks(Path(model_dir), dataclasses.replace(plan.model, carried=())):
        if name not in norms:
            continue
        original = values.to(device).float()
        norms[name][ORIGINAL].append(float(original.norm()))
        for label, model in packed.items():
            value = model.read(name, rows, device)
            decoded = value.decode() if isinstance(value, Quantized) else value.float()
            norms[name][label].append(float((decoded - original).norm()))
    return [LayerRow(tensor=t.name, role=t.spec.role, relative_rms=_relative(norms[t.name])) for t in planned]


def _relative(norms: dict[str, list[float]]) -> dict[str, float]:
    """Norms of a tensor's parts, joined, over those of the original."""
    whole = {label: math.hypot(*parts) for label, parts in norms.items()}
    return {label: norm / (whole[ORIGINAL] or math.nan) for label, norm in whole.items() if label != ORIGINAL}
