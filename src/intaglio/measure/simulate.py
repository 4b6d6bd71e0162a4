"""A packed model, simulated: transformers computes in float32 with what the artifact decodes to."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from intaglio.measure.evaluate import transformers_source
from intaglio.packed.checkpoint import TextModel
from intaglio.packed.model import PackedModel
from intaglio.train.static import attach_static, fix_scales, switch_static


def decoded_model(teacher: TextModel, packed: PackedModel) -> TextModel:
    """A copy of the teacher that computes as the packed model does: decoded weights, float32, static scales."""
    model = copy.deepcopy(teacher)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for planned in packed.plan:
            tensors[planned.name].copy_(packed.decode(planned.name))
    attach_static(model, packed.plan)
    fix_scales(model, packed.plan, packed.read_static())
    return model


def switched_source(model: TextModel, *, on: bool) -> Callable[[Tensor], Tensor]:
    """A logit source that computes with quantized activations and KV cache, or without."""
    source = transformers_source(model)

    def logits(window_T: Tensor) -> Tensor:
        switch_static(model, activations=on, kv_cache=on)
        return source(window_T)

    return logits
