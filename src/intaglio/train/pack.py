"""Write what a prepared model computes with: the codes and scales of its forward become a packed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import WeightError
from intaglio.numerics.grid import Quantized
from intaglio.packed.write import write_packed
from intaglio.plan.plan import PlannedTensor
from intaglio.train.forward_check import check_forward
from intaglio.train.grid_optimizer import check_trainable
from intaglio.train.latents import Latents
from intaglio.train.sharding import gather_rows, is_main, settle
from intaglio.train.static import read_scales


def pack_model(
    latents: Latents,
    path: str | Path,
    *,
    assets: str | Path,
    provenance: dict[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Write the prepared model as a PackedModel folder; static scales that were never calibrated are off.

    latents: as `prepare` returned them. assets: the source model's folder, for tokenizer and generation files. LoRA
    adapters are part of the decoded weights, and so of the codes. Raises MismatchError for a model whose weights are
    not what its latents decode to, or that computes something else with them than transformers' own modules would, and
    InputError for parameters that the plan does not hold. Of several processes all
    must call this, and the main one writes.
    """
    settle(latents.model)
    check_trainable(latents)
    check_forward(latents)
    plan = latents.plan
    if not is_main():
        for tensor in plan:
            _whole(latents, tensor)
        return
    with write_packed(Path(path), plan, assets=Path(assets), provenance=provenance or {}, replace=replace) as writer:
        for tensor in plan:
            writer.add(tensor.name, _whole(latents, tensor))
        scales = read_scales(latents.model, plan)
        for scale in plan.static_scales:
            if scale.owned:
                writer.add_static(scale.name, scales[scale.name])


def _whole(latents: Latents, tensor: PlannedTensor) -> Quantized | Tensor:
    """A planned tensor as the forward uses it, put together from the rows of all processes on the main one."""
    try:
        value = latents.pack(tensor)
    except WeightError as error:
        raise WeightError(f"{tensor.name}: {error}") from error
    if not latents.is_sharded(tensor.name):
        return value
    rows = gather_rows(value)
    if rows is None:
        return value
    if isinstance(value, Tensor):
        return torch.cat(rows)
    parts = zip(*((part.codes, part.scale, part.super_scale) for part in rows), strict=True)
    return Quantized(value.grid, *(None if part[0] is None else torch.cat(part) for part in parts))  # type: ignore[arg-type]
