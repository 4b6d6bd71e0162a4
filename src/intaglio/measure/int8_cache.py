"""Decoding with a KV cache that really holds int8: the check on what training only simulated.

Shape suffixes: N windows, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from intaglio.numerics.activation import encode

PREFILL_TOKENS = 16  # read at once, as a prompt is; the rest token by token


class _Int8:
    """Mixin for a layer of transformers' cache: holds codes, gives back codes x scale."""

    k_scale: Tensor
    v_scale: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        codes = encode(key_states, self.k_scale), encode(value_states, self.v_scale)
        all_keys, all_values = super().update(*codes, *args, **kwargs)  # type: ignore[misc]
        dtype = key_states.dtype
        return _decoded(all_keys, self.k_scale, dtype), _decoded(all_values, self.v_scale, dtype)


def _decoded(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype) * scale.to(dtype)


class Int8Layer(_Int8, DynamicLayer):
    """Keys and values of a layer with full attention."""


class Int8SlidingLayer(_Int8, DynamicSlidingWindowLayer):
    """Keys and values of a layer with a window."""


def int8_cache(model: Any, scales: dict[str, float]) -> DynamicCache:
    """An empty cache for `model`. scales: static scales of a packed model, by name."""
    cache = DynamicCache(config=model.config)
    for number, plain in enumerate(cache.layers):
        sliding = isinstance(plain, DynamicSlidingWindowLayer)
        layer = Int8SlidingLayer(plain.sliding_window) if sliding else Int8Layer()  # type: ignore[no-untyped-call, union-attr]
        for kind in ("k", "v"):
            scale = scales[f"model.layers.{number}.self_attn.{kind}_cache_scale"]
            setattr(layer, f"{kind}_scale", torch.tensor(scale, device=model.device))
        cache.layers[number] = layer
    return cache


@torch.no_grad()
def decode_windows(model: Any, windows_NT: Tensor, cache: DynamicCache) -> Tensor:
    """Logits [N, T, V] of windows that are read side by side through the cache."""
    windows = windows_NT.to(model.device)
    parts = [windows[:, :PREFILL_TOKENS], *windows[:, PREFILL_TOKENS:].split(1, dim=1)]
    logits = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts if part.numel()]
    return torch.cat(logits, dim=1)


def int8_source(model: Any, windows_NT: Tensor, scales: dict[str, float], batch: int = 16) -> Iterator[Tensor]:
    """float32 logits [T, V] of each window, `batch` windows read side by side, each batch with a new cache."""
    for windows in windows_NT.split(batch):
        for logits_TV in decode_windows(model, windows, int8_cache(model, scales)):
            yield logits_TV.float()
