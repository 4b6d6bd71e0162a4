"""Bytes that autograd keeps of a forward, counted from transformers' layers in eager mode and bfloat16.

A test compares them with a forward. A compiled layer keeps less, except for attention in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intaglio.plan.family import ModelSpec

FLOAT, HALF = 4, 2  # bytes of float32 and bfloat16
SMALLEST_CHUNK, MOST_CHUNKS = 512, 8  # of queries in attention; smaller chunks skip more keys, and take more kernels


def activation_bytes(model: ModelSpec, tokens: int, length: int, gradient_checkpointing: bool) -> int:
    """Bytes that autograd keeps of a forward of sequences of `length` tokens, `tokens` in all.

    With checkpointing: the input of each layer, and one layer in full.
    """
    config = model.layer_config
    layers = [layer_bytes(model, layer, length) for layer in range(config.num_hidden_layers)]
    width, per_layer = config.hidden_size, getattr(config, "hidden_size_per_layer_input", 0) or 0
    outside = 2 * FLOAT * width + per_layer * len(layers) * (3 * FLOAT) + (HALF * width if per_layer else 0)
    kept = HALF * width * len(layers) + max(layers) if gradient_checkpointing else sum(layers)
    return int(tokens * (outside + kept))


def attention_bytes(model: ModelSpec, tokens: int, length: int) -> int:
    """Bytes that compiled layers keep of attention in chunks although they are recomputed (see `train.attention`).

    Queries, output and probabilities in bfloat16: torch 2.11's compiler saves what an autograd function inside of a
    checkpoint computes twice. torch 2.13 does not.
    """
    config: Any = model.layer_config
    size: int = 0
    for layer, kind in enumerate(config.layer_types):
        window = config.sliding_window if kind == "sliding_attention" else None
        pairs = sum((q.stop - q.start) * (k.stop - k.start) for q, k in attention_chunks(length, window))
        width = config.per_layer_config[layer].head_dim
        size += HALF * config.num_attention_heads * (2 * width * tokens + pairs * tokens // length)
    return size


def attention_chunks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Slices of queries that attend together, and of the keys that any of these may see."""
    size = max(SMALLEST_CHUNK, -(-length // MOST_CHUNKS))
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield slice(start, stop), slice(0 if window is None else max(0, start - window + 1), stop)


def layer_bytes(model: ModelSpec, layer: int, length: int) -> int:
    """Bytes that autograd keeps of one layer and token, in a sequence of `length` tokens.

    A norm keeps its input and the normed values in float32.
    """
    config: Any = model.layer_config
    own, width = config.per_layer_config[layer], config.hidden_size
    norm = 2 * FLOAT
    queries = config.num_attention_heads * own.head_dim
    keys = own.num_key_value_heads * own.head_dim if model.kv_donors[layer] == layer else 0
    head_norm = norm if any(tensor.name.endswith(".q_norm.weight") for tensor in model.tensors) else 0
    value_norm = FLOAT if model.family.value_norm else 0
    size: int = width * (4 * norm + 2 * HALF)  # four norms, and what q/k/v and gate/up multiply
    # queries and their norm; queries, keys and values of all heads, and the result twice, for attention and o
    size += queries * (head_norm + 5 * HALF) + keys * (head_norm + value_norm)
    if model.family.eager:  # capped scores, their softmax in float32, and the probabilities
        size += config.num_attention_heads * length * (2 * HALF + FLOAT)
    size += _mlp_width(model, layer) * 4 * HALF  # gate, its activation, up, and the product
    per_layer = getattr(config, "hidden_size_per_layer_input", 0) or 0
    if per_layer:  # gate, its activation, the product and the input, and one more norm
        size += width * (norm + HALF) + per_layer * (3 * HALF + FLOAT)
    if getattr(config, "enable_moe_block", False):  # three more norms, the router's, and its scores
        size += width * 4 * norm + config.num_experts * norm
        size += config.top_k_experts * (2 * HALF * width + 4 * HALF * config.moe_intermediate_size)
    return size


def _mlp_width(model: ModelSpec, layer: int) -> int:
    return model.tensor(f"model.layers.{layer}.mlp.gate_proj.weight").shape[0]
