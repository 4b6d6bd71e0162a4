"""Decoder layers that are recomputed in the backward, compiled and sharded, in this order from the inside out.

A layer's `forward` is replaced and the layer itself is not, so names of modules and parameters stay those of the
bare model. FSDP2 gathers and frees a layer's weights in hooks around `forward` (see `sharding.shard`). So hooks run
once each way, the compiler sees none of them, and what it compiles is a forward together with its recomputation.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from intaglio.train.attention import attend_in_chunks
from intaglio.train.kernels import expect_compilations


def set_layers(*models: Any, checkpointing: bool = False, compiled: bool = False, backend: str = "inductor") -> None:
    """Set how the decoder layers of transformers' models run; an earlier setting is replaced.

    Sharding may come before or after.

    checkpointing: keep a layer's inputs for the backward, and recompute the rest. compiled: compile each layer when it
    first runs, with attention in chunks of queries (see `attention`). backend: of torch.compile.
    """
    layers = [layer for model in models for layer in model.model.layers]
    forward = _recomputed if checkpointing else _plain
    if compiled:
        for model in models:
            attend_in_chunks(model)
        expect_compilations(4 * len(layers))  # anew when codes freeze, and where activations are switched off
        # a layer that others share keys and values of puts them into a dict, which the recomputation need not do again
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        forward = torch.compile(forward, dynamic=False, backend=backend)
    for layer in layers:
        layer.__dict__.pop("forward", None)  # of an earlier setting
        if checkpointing or compiled:
            layer.forward = types.MethodType(forward, layer)  # a copy of the model binds it to its own layer


def _plain(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _recomputed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(type(layer).forward, layer, *args, use_reentrant=False, **kwargs)
