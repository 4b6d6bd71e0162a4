"""From a prepared model to a PackedModel: codes and scales are read back out of the forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.errors import WeightError
from intaglio.numerics.grid import FloatGrid
from intaglio.packed.model import write_packed
from intaglio.plan.plan import Plan, PlannedTensor
from intaglio.train.attach import check_adapters, owners_of
from intaglio.train.decode import StepWeights
from intaglio.train.modules import FrozenEmbedding, QuantLoraLinear, merged_latent, quantizers_of
from intaglio.train.static import read_scales


@torch.no_grad()
def packed_value(model_owner: tuple[nn.Module, str], tensor: PlannedTensor, merged: Tensor | None = None) -> Any:
    """Quantized or float32 tensor, as the forward uses it."""
    module, attribute = model_owner
    if isinstance(module, FrozenEmbedding):
        return module.frozen.quantized()
    stored = module._parameters.get(attribute)
    latent = merged if merged is not None else stored if stored is not None else module._buffers[attribute]
    assert latent is not None
    if isinstance(tensor.grid, FloatGrid):
        return tensor.grid.round(latent.detach().cpu())
    return quantizers_of(module)[attribute].pack(latent.detach())


def pack_model(
    model: nn.Module,
    plan: Plan,
    path: str | Path,
    *,
    assets: str | Path,
    dtype: torch.dtype = torch.float32,
    provenance: dict[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Write the prepared model as a PackedModel folder; static scales that were never calibrated are off.

    assets: the source model's folder, for tokenizer and generation files. dtype: in which the
    training forward multiplied. LoRA adapters are merged into the latents, as the forward did.
    """
    check_adapters(model)
    owners = owners_of(model)
    merged = _merged_latents(model)
    weights = StepWeights(model)
    weights.drop()
    record = provenance or {}
    try:
        if not merged:  # decode as the training loop does: a compiled kernel may round a tie its own way
            weights.decode(dtype)
        with write_packed(Path(path), plan, assets=Path(assets), provenance=record, replace=replace) as writer:
            for tensor in plan:
                try:
                    value = packed_value(owners[tensor.name], tensor, merged.get(tensor.name))
                except WeightError as error:
                    raise WeightError(f"{tensor.name}: {error}") from error
                writer.add(tensor.name, value)
            scales = read_scales(model, plan)
            for scale in plan.static_scales:
                if scale.owned:
                    writer.add_static(scale.name, scales[scale.name])
    finally:
        weights.close()


@torch.no_grad()
def _merged_latents(model: nn.Module) -> dict[str, Tensor]:
    layers = ((path, module) for path, module in model.named_modules() if isinstance(module, QuantLoraLinear))
    return {path.removeprefix("base_model.model.") + ".weight": merged_latent(module) for path, module in layers}
