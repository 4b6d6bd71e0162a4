"""Attention on keys and values as an int8 cache gives them back.

transformers hands every attention function the rotated keys and normed values, those of a donor layer to
the layers that share them. So this is where they are quantized: with the donor's scale each time, to
the same codes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from intaglio.errors import InputError
from intaglio.train.static import static

NAME = "intaglio_static_kv"  # as transformers' registry of attention functions knows it


def static_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """transformers' sdpa attention; key and value [B, heads, T, width] are quantized by the module's scales."""
    scales = getattr(module, "static", None)
    if scales is not None and scales.observer is not None:
        scales.observer("k_cache", key.transpose(1, 2))
        scales.observer("v_cache", value.transpose(1, 2))
    key, value = static(module, "k_cache", key), static(module, "v_cache", value)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def use_static_attention(model: Any) -> None:
    """Let all layers of a transformers model attend through `static_attention`.

    Raises InputError for a model with another attention than sdpa: its numbers would change.
    """
    kind = model.config._attn_implementation
    if kind not in ("sdpa", NAME):
        raise InputError(
            f"[kv_cache]: the model attends by {kind!r}, expected 'sdpa': load it with attn_implementation='sdpa'"
        )
    AttentionInterface.register(NAME, static_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
