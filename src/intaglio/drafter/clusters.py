"""The clustered head of small drafters: only the tokens of the likeliest clusters get logits.

A token's cluster is its place in `token_ordering` [V]; all clusters are of one size. A linear of `centroids` rates
them. (transformers: Gemma4AssistantMaskedEmbedder.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.train.distill import cap

CHUNK_TOKENS = 512  # whose logits over the whole vocabulary exist at once


@torch.no_grad()
def assign_clusters(drafter: Any) -> None:
    """Group the tokens by their rows of the head, in place; each centroid becomes the mean of its tokens' rows.

    Halves are cut again and again where the rows spread most, along their first principal component.
    """
    embedder, head = drafter.masked_embedding, drafter.lm_head.weight.float()
    groups = [torch.arange(len(head))]
    while len(groups) < embedder.num_centroids:
        groups = [half for group in groups for half in _halves(group, head)]
    if len(groups) != embedder.num_centroids:  # not a power of two: neighbours along the cuts share
        groups = list(torch.cat(groups).split(embedder.vocab_size_per_centroid))
    embedder.token_ordering.copy_(torch.cat(groups))
    embedder.centroids.weight.copy_(torch.stack([head[group].mean(0) for group in groups]))


def _halves(group: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    rows = head[group] - head[group].mean(0)
    direction = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
    order = group[(rows @ direction).argsort(stable=True)]
    return order[: len(order) // 2], order[len(order) // 2 :]


def clustered_logits(embedder: Any, hidden: Tensor, logits: Tensor) -> Tensor:
    """Logits [..., V] of the whole head; outside of the likeliest clusters they become the minimum minus 1.

    transformers takes the least of a whole batch, where one text changes another's; for a single place it is the
    same. It gathers the head's rows for each place, which takes many times as long for many of them.
    """
    best = embedder.centroids(hidden).topk(embedder.centroid_intermediate_top_k).indices
    open_clusters = torch.zeros(*hidden.shape[:-1], embedder.num_centroids, dtype=torch.bool, device=hidden.device)
    open_clusters.scatter_(-1, best, True)
    cluster_of = torch.empty_like(embedder.token_ordering)
    cluster_of[embedder.token_ordering] = torch.arange(len(cluster_of), device=hidden.device)
    counted = open_clusters[..., cluster_of // embedder.vocab_size_per_centroid]
    least = logits.masked_fill(~counted, torch.inf).amin(-1, keepdim=True)
    return torch.where(counted, logits, least - 1)


def cluster_loss(hidden: Tensor, embedder: Any, target_hidden: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    """Mean cross-entropy of the centroids' ratings with the target's probability of each cluster, float32 scalar.

    hidden: the drafter's [T, W]; target_hidden: [T, D], with the target's head [V, D].
    """
    rated = embedder.centroids(hidden).float().log_softmax(-1)
    losses = [
        F.cross_entropy(rated[rows], _mass(target_hidden[rows], head, softcap, embedder), reduction="sum")
        for rows in torch.arange(len(hidden), device=hidden.device).split(CHUNK_TOKENS)
    ]
    return torch.stack(losses).sum() / max(1, len(hidden))


@torch.no_grad()
def _mass(hidden: Tensor, head: Tensor, softcap: float | None, embedder: Any) -> Tensor:
    p = cap(hidden @ head.T, softcap).softmax(-1)
    return p[:, embedder.token_ordering].view(len(p), embedder.num_centroids, -1).sum(-1)
