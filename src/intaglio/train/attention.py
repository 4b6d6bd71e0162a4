"""Attention in chunks of queries, by plain matrix products: what compiled training on a GPU uses.

torch's fused kernels compute whole squares once they are given a mask, and packed documents and sliding windows need
one. For the 512-wide heads of Gemma 4's full layers torch has only a slow kernel: its backward took 11 ms for 4 x 2048
tokens on an H200, ten times its forward. Here a chunk of queries meets only the keys that it may see. The backward
computes the probabilities again, so nothing is kept but queries, keys, values and the output. A compiler may decide
otherwise: that of torch 2.11 keeps probabilities in bfloat16, which `plan.memory.attention_bytes` counts.

Shape suffixes: B sequences, H heads of queries, G heads of keys and values, R = H / G, T positions, D width of a head;
N = R x queries of a chunk, K keys that they may see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from intaglio.plan.activations import attention_chunks
from intaglio.train.static import ATTENTION, static_attention

CHUNKED = "intaglio_chunked"  # as transformers' registry of attention functions knows it


def _rows(x_BHTD: Tensor, queries: slice, groups: int) -> Tensor:
    """Queries of a chunk, those of one head of keys side by side: [B, G, N, D]."""
    batch, _, _, width = x_BHTD.shape
    return x_BHTD[:, :, queries].reshape(batch, groups, -1, width)


def _probabilities(q_BGND: Tensor, k_BGKD: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Softmax over the keys that are seen, [B, G, N, K], in the dtype of the queries. seen: bool [B or 1, 1, Q, K]."""
    scores = (q_BGND @ k_BGKD.transpose(-1, -2)).float() * scale
    batch, groups, rows, keys = scores.shape
    scores = scores.view(batch, groups, -1, seen.shape[-2], keys).masked_fill(~seen[:, :, None], -torch.inf)
    return scores.softmax(-1).view(batch, groups, rows, keys).to(q_BGND.dtype)


def _seen(mask: Tensor | None, queries: slice, keys: slice, window: int | None, device: torch.device) -> Tensor:
    """True where a query may see a key of its chunk, bool [B or 1, 1, Q, K]. mask: of all positions; None: causal."""
    if mask is not None:
        return mask[:, :, queries, keys]
    ahead = torch.arange(queries.start, queries.stop, device=device)[:, None] - torch.arange(
        keys.start, keys.stop, device=device
    )
    return ((ahead >= 0) if window is None else (ahead >= 0) & (ahead < window))[None, None]


class ChunkedAttention(torch.autograd.Function):
    """Causal attention; a token sees itself and earlier ones, of the last `window` ones where that is given."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, mask: Tensor | None, scale: float, window: int | None
    ) -> Tensor:
        outputs = []
        for queries, keys in attention_chunks(q_BHTD.shape[2], window):
            seen = _seen(mask, queries, keys, window, q_BHTD.device)
            rows = _rows(q_BHTD, queries, k_BGTD.shape[1])
            output = _probabilities(rows, k_BGTD[:, :, keys], seen, scale) @ v_BGTD[:, :, keys]
            outputs.append(output.view(*q_BHTD.shape[:2], -1, q_BHTD.shape[3]))
        ctx.save_for_backward(q_BHTD, k_BGTD, v_BGTD, mask)
        ctx.scale, ctx.window = scale, window
        return torch.cat(outputs, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BHTD,), (q_BHTD, k_BGTD, v_BGTD, mask) = grads, ctx.saved_tensors
        grad_q = []
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k_BGTD, v_BGTD))
        for queries, keys in attention_chunks(q_BHTD.shape[2], ctx.window):
            rows, grad = (_rows(x, queries, k_BGTD.shape[1]) for x in (q_BHTD, grad_BHTD))
            key, value = k_BGTD[:, :, keys], v_BGTD[:, :, keys]
            seen = _seen(mask, queries, keys, ctx.window, q_BHTD.device)
            shares = _probabilities(rows, key, seen, ctx.scale)
            grad_shares = (grad @ value.transpose(-1, -2)).float() * shares
            grad_scores = (grad_shares - shares * grad_shares.sum(-1, keepdim=True)) * ctx.scale
            grad_scores = grad_scores.to(rows.dtype)
            grad_q.append((grad_scores @ key).view(*q_BHTD.shape[:2], -1, q_BHTD.shape[3]))
            grad_k[:, :, keys] += grad_scores.transpose(-1, -2) @ rows
            grad_v[:, :, keys] += shares.transpose(-1, -2) @ grad
        return torch.cat(grad_q, 2), grad_k.to(k_BGTD.dtype), grad_v.to(v_BGTD.dtype), None, None, None


def chunked_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers registers them: [B, H, T, D] to [B, T, H, D].

    One query at a time, as in generation, and dropout are left to torch's own kernels.
    """
    if dropout or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = ChunkedAttention.apply(query, key, value, attention_mask, scale, sliding_window)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


def attend_in_chunks(model: Any) -> None:
    """Let a transformers model attend through `chunked_attention`; one that does not attend by sdpa stays as it is."""
    functions: dict[str, tuple[str, Callable[..., Any]]] = {
        "sdpa": (CHUNKED, chunked_attention),
        ATTENTION: (f"{ATTENTION}_chunked", functools.partial(static_attention, attend=chunked_attention)),
    }
    if model.config._attn_implementation in functions:
        name, function = functions[model.config._attn_implementation]
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
        model.set_attn_implementation(name)
