"""The losses: forward KL of the student's next-token distribution to the teacher's, full vocabulary, and cross-entropy.

Shape suffixes: T tokens, D hidden width, V vocabulary.

A vocabulary of 262144 makes a logits matrix of 8192 tokens 8 GB in float32, and autograd keeps
several. Here tokens are taken in chunks, and the gradient of a chunk is computed in the forward, so
that at most one chunk of logits exists at a time. With soft-capped logits s = c tanh(l / c):

    loss   = mean_T sum_V p (log p - log q)       p teacher, q student
    dloss/dl = (q - p) (1 - tanh(l / c)^2) / T

Cross-entropy is the same with the text's next token in p's place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Kernel = Callable[..., tuple[Tensor, Tensor]]  # summed loss of a chunk, and its gradient by the logits

CHUNK_TOKENS = 128  # on a CPU: with a small vocabulary a chunk stays in its cache, which halves the time
GPU_CHUNK_TOKENS = 512
# A small vocabulary leaves room for more tokens on a GPU, where few large kernels beat many small ones.
GPU_CHUNK_LOGITS = 1 << 27


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Final logit soft-capping, in float32."""
    logits = logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _kl_terms(
    softcap: float | None, teacher_softcap: float | None, student_TV: Tensor, teacher_TV: Tensor
) -> tuple[Tensor, Tensor]:
    """Terms of the KL and its gradient by the student's logits, both float32 [T, V], without a token's weight."""
    capped = cap(student_TV, softcap)
    log_q = capped.log_softmax(-1)
    log_p = cap(teacher_TV, teacher_softcap).log_softmax(-1)  # by its own cap: a drafter has none where its target has
    p = log_p.exp()
    return p * (log_p - log_q), (log_q.exp() - p) * _slope(capped, softcap)


def _slope(capped: Tensor, softcap: float | None) -> Tensor | float:
    """Derivative of the capped logits by the logits."""
    return 1.0 if softcap is None else 1 - (capped / softcap).square()


def _chunk_gradient(
    softcap: float | None, teacher_softcap: float | None, student_TV: Tensor, teacher_TV: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """Summed KL of a chunk (float32 scalar) and weight x its gradient by the student's logits."""
    terms, grad = _kl_terms(softcap, teacher_softcap, student_TV, teacher_TV)
    return terms.sum(), (grad * weight).to(student_TV.dtype)


def _weighted_chunk_gradient(
    softcap: float | None, teacher_softcap: float | None, student_TV: Tensor, teacher_TV: Tensor, weight_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted KL of a chunk (float32 scalar) and its gradient, with a weight for each token."""
    terms, grad = _kl_terms(softcap, teacher_softcap, student_TV, teacher_TV)
    return (terms.sum(-1) * weight_T).sum(), (grad * weight_T.unsqueeze(-1)).to(student_TV.dtype)


def _chunk_gradient_of_labels(
    softcap: float | None, student_TV: Tensor, labels_T: Tensor, weight_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of a chunk (float32 scalar) and its gradient by the student's logits."""
    capped = cap(student_TV, softcap)
    log_q = capped.log_softmax(-1)
    loss = -(log_q.gather(-1, labels_T.unsqueeze(-1)).squeeze(-1) * weight_T).sum()
    error = log_q.exp().scatter_add(-1, labels_T.unsqueeze(-1), log_q.new_full((len(labels_T), 1), -1.0))
    return loss, (error * _slope(capped, softcap) * weight_T.unsqueeze(-1)).to(student_TV.dtype)


@functools.cache
def _kernel(function: Kernel, softcaps: tuple[float | None, ...], compiled: bool) -> Kernel:
    kernel: Kernel = functools.partial(function, *softcaps)
    return torch.compile(kernel, dynamic=False) if compiled else kernel


class _Chunked(torch.autograd.Function):
    """kernel: summed loss and gradient of a chunk's logits [T, V]; told which rows of the tokens these are."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, kernel: Kernel, scale: float, chunk: int) -> Tensor:
        total = torch.zeros((), device=hidden_TD.device)
        grad_hidden = torch.empty_like(hidden_TD)
        grad_head = torch.zeros_like(head_VD) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden = hidden_TD[rows]
            loss, grad_TV = kernel(hidden @ head_VD.T, rows)
            total += loss
            grad_hidden[rows] = grad_TV @ head_VD  # now: kept logits of all chunks would fill the memory
            if grad_head is not None:
                grad_head.addmm_(grad_TV.T, hidden)
        ctx.save_for_backward(grad_hidden, grad_head)
        return total * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        grad_head = None if grad_head is None else grad_head * grad.to(grad_head.dtype)
        return grad_hidden * grad.to(grad_hidden.dtype), grad_head, None, None, None


def _chunked(hidden_TD: Tensor, head_VD: Tensor, kernel: Kernel, scale: float, chunk: int) -> Tensor:
    loss: Tensor = _Chunked.apply(hidden_TD, head_VD, kernel, scale, chunk)  # type: ignore[no-untyped-call]
    return loss


def chunked_kl(
    hidden_TD: Tensor,
    head_VD: Tensor,
    teacher_hidden_TD: Tensor,
    teacher_head_VD: Tensor,
    *,
    softcap: float | None,
    teacher_softcap: float | Literal["same"] | None = "same",
    counted_T: Tensor | None = None,
    chunk_tokens: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """Mean KL(teacher || student) over tokens, in nats, float32 scalar; of those in `counted_T`, bool, if given.

    hidden_TD, teacher_hidden_TD: outputs of the final norm. head_VD, teacher_head_VD: output
    embeddings, in the same dtype as the hidden states; their widths may differ. Gradients reach hidden_TD and head_VD.
    softcap, teacher_softcap: of the final logits; None for none.
    chunk_tokens: tokens whose logits exist at once; None picks by device and vocabulary.
    """
    softcaps = (softcap, softcap if teacher_softcap == "same" else teacher_softcap)
    chunk = chunk_tokens or _chunk_tokens(hidden_TD, head_VD)
    if counted_T is not None:
        weighted, weight_T = _kernel(_weighted_chunk_gradient, softcaps, compiled), _weights(counted_T)

        def of_counted(student_TV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            return weighted(student_TV, teacher_hidden_TD[rows] @ teacher_head_VD.T, weight_T[rows])

        return _chunked(hidden_TD, head_VD, of_counted, 1.0, chunk)
    kernel, weight = _kernel(_chunk_gradient, softcaps, compiled), 1.0 / hidden_TD.shape[0]

    def of_rows(student_TV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return kernel(student_TV, teacher_hidden_TD[rows] @ teacher_head_VD.T, weight)

    return _chunked(hidden_TD, head_VD, of_rows, weight, chunk)


def _weights(counted_T: Tensor) -> Tensor:
    """float32 weights of tokens that sum to one; all zero where none is counted."""
    return counted_T.float() / counted_T.sum().clamp_min(1)


def chunked_cross_entropy(
    hidden_TD: Tensor,
    head_VD: Tensor,
    labels_T: Tensor,
    counted_T: Tensor,
    *,
    softcap: float | None,
    chunk_tokens: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """Mean cross-entropy with `labels_T`, int64, over the tokens that are `counted_T`, in nats, float32 scalar.

    The other arguments are those of `chunked_kl`.
    """
    kernel = _kernel(_chunk_gradient_of_labels, (softcap,), compiled)
    weight_T = _weights(counted_T)

    def of_rows(student_TV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return kernel(student_TV, labels_T[rows], weight_T[rows])

    return _chunked(hidden_TD, head_VD, of_rows, 1.0, chunk_tokens or _chunk_tokens(hidden_TD, head_VD))


def _chunk_tokens(hidden_TD: Tensor, head_VD: Tensor) -> int:
    on_gpu = max(GPU_CHUNK_TOKENS, GPU_CHUNK_LOGITS // head_VD.shape[0])
    return on_gpu if hidden_TD.is_cuda else CHUNK_TOKENS
