"""The loss: forward KL of the student's next-token distribution to the teacher's, full vocabulary.

Shape suffixes: T tokens, D hidden width, V vocabulary.

A vocabulary of 262144 makes a logits matrix of 8192 tokens 8 GB in float32, and autograd keeps
several. Here tokens are taken in chunks, and the gradient of a chunk is computed in the forward, so
that at most one chunk of logits exists at a time. With soft-capped logits s = c tanh(l / c):

    loss   = mean_T sum_V p (log p - log q)       p teacher, q student
    dloss/dl = (q - p) (1 - tanh(l / c)^2) / T
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_TOKENS = 128  # on a CPU: with a small vocabulary a chunk stays in its cache, which halves the time
GPU_CHUNK_TOKENS = 512
# A small vocabulary leaves room for more tokens on a GPU, where few large kernels beat many small ones.
GPU_CHUNK_LOGITS = 1 << 27


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Final logit soft-capping, in float32."""
    logits = logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _chunk_gradient(softcap: float | None, student_TV: Tensor, teacher_TV: Tensor, weight: float):
    """Summed KL of a chunk (float32 scalar) and weight x its gradient by the student's logits."""
    capped = cap(student_TV, softcap)
    log_q = capped.log_softmax(-1)
    log_p = cap(teacher_TV, softcap).log_softmax(-1)
    p = log_p.exp()
    slope = 1.0 if softcap is None else 1 - (capped / softcap).square()
    grad = (log_q.exp() - p) * slope * weight
    return (p * (log_p - log_q)).sum(), grad.to(student_TV.dtype)


@functools.cache
def _kernel(softcap: float | None, compiled: bool) -> Callable:
    kernel = functools.partial(_chunk_gradient, softcap)
    return torch.compile(kernel, dynamic=False) if compiled else kernel


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, head_VD, teacher_hidden_TD, teacher_head_VD, kernel, chunk):
        total = torch.zeros((), device=hidden_TD.device)
        grad_hidden = torch.empty_like(hidden_TD)
        grad_head = torch.zeros_like(head_VD) if ctx.needs_input_grad[1] else None
        weight = 1.0 / hidden_TD.shape[0]
        for start in range(0, hidden_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden = hidden_TD[rows]
            loss, grad_TV = kernel(hidden @ head_VD.T, teacher_hidden_TD[rows] @ teacher_head_VD.T, weight)
            total += loss
            grad_hidden[rows] = grad_TV @ head_VD
            if grad_head is not None:
                grad_head.addmm_(grad_TV.T, hidden)
        ctx.save_for_backward(grad_hidden, grad_head)
        return total * weight

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_head = ctx.saved_tensors
        grad_head = None if grad_head is None else grad_head * grad.to(grad_head.dtype)
        return grad_hidden * grad.to(grad_hidden.dtype), grad_head, None, None, None, None


def chunked_kl(
    hidden_TD: Tensor,
    head_VD: Tensor,
    teacher_hidden_TD: Tensor,
    teacher_head_VD: Tensor,
    *,
    softcap: float | None,
    chunk_tokens: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """Mean KL(teacher || student) over tokens, in nats, float32 scalar.

    hidden_TD, teacher_hidden_TD: outputs of the final norm. head_VD, teacher_head_VD: output
    embeddings, in the same dtype as the hidden states. Gradients reach hidden_TD and head_VD.
    chunk_tokens: tokens whose logits exist at once; None picks by device and vocabulary.
    """
    if chunk_tokens is None:
        on_gpu = max(GPU_CHUNK_TOKENS, GPU_CHUNK_LOGITS // head_VD.shape[0])
        chunk_tokens = on_gpu if hidden_TD.is_cuda else CHUNK_TOKENS
    kernel = _kernel(softcap, compiled)
    return _ChunkedKL.apply(hidden_TD, head_VD, teacher_hidden_TD, teacher_head_VD, kernel, chunk_tokens)
