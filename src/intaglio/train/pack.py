"""Write what a prepared model computes with: the codes and scales of its forward become a packed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from intaglio.errors import WeightError
from intaglio.packed.model import write_packed
from intaglio.train.latents import Latents
from intaglio.train.optimizer import check_trainable
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
    not what its latents decode to, and InputError for parameters that the plan does not hold.
    """
    check_trainable(latents)
    plan = latents.plan
    with write_packed(Path(path), plan, assets=Path(assets), provenance=provenance or {}, replace=replace) as writer:
        for tensor in plan:
            try:
                value = latents.pack(tensor)
            except WeightError as error:
                raise WeightError(f"{tensor.name}: {error}") from error
            writer.add(tensor.name, value)
        scales = read_scales(latents.model, plan)
        for scale in plan.static_scales:
            if scale.owned:
                writer.add_static(scale.name, scales[scale.name])
