"""A packed model as transformers' own: every weight decoded, nothing quantized any more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from intaglio.numerics.grid import Quantized
from intaglio.packed.checkpoint import TextModel
from intaglio.packed.model import PackedModel
from intaglio.plan.family import build_meta_model, transformers_config


def load_packed(packed: PackedModel) -> TextModel:
    """The text model of a packed model, float32, in eval mode; static scales are not part of it."""
    model_class: Any = type(build_meta_model(packed.plan.model.config))
    state = {tensor.name: packed.decode(tensor.name) for tensor in packed.plan}
    return model_class.from_pretrained(
        None,
        config=transformers_config(packed.plan.model.config),
        state_dict=state,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
    ).eval()


@torch.no_grad()
def decode_into(model: TextModel, packed: PackedModel) -> None:
    """Overwrite a model's weights with what a packed model of its shape decodes to, a few rows at a time.

    Decoded on the model's device in its dtype, as `BlockGrid.product` says; floats are rounded to that dtype.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    for tensor in packed.plan:
        target = tensors[tensor.name]
        for rows, value in packed.chunks(tensor.name, target.device):
            values = value.decode(target.dtype) if isinstance(value, Quantized) else value.float()
            target[rows if rows is not None else ...].copy_(values)
