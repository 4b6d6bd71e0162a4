"""Parameter groups and learning rates: AdamW on float32 latents, cosine, a frozen-codes tail."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from intaglio.plan.schedule import Schedule
from intaglio.train.fused import FusedGridAdamW
from intaglio.train.grid_optimizer import GridOptimizer, is_scale
from intaglio.train.latents import Latents
from intaglio.train.lean import Bfloat16AdamW, GridAdamW8bit


@dataclass(frozen=True)
class Phases:
    """Boundaries of the phases of training. total: all steps; tail: the first step with frozen codes."""

    total: int
    tail: int
    warmup: int

    @classmethod
    def of(cls, schedule: Schedule) -> Phases:
        """The phases of a schedule: shares become whole steps."""
        tokens_per_step = schedule.batch_size * schedule.sequence_length
        total = max(1, round(schedule.tokens / tokens_per_step))
        frozen = 0.0 if "scales" in schedule.stages else schedule.frozen_tail  # there codes stand still anyway
        tail = total - int(total * frozen)
        return cls(total, tail, max(1, int(total * schedule.warmup)))

    def lr_factor(self, step: int, tail_lr: float) -> float:
        """Warm-up and cosine to zero before the tail, and once more, lower, in it."""
        if step < self.tail:
            return min(1.0, (step + 1) / self.warmup) * _cosine(step / self.tail)
        length = self.total - self.tail
        warmup = max(1, min(self.warmup, length // 4))
        position = step - self.tail
        return tail_lr * min(1.0, (position + 1) / warmup) * _cosine(position / length)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(
    latents: Latents, schedule: Schedule, before: GridOptimizer | None = None, *, fused: bool | None = None
) -> GridOptimizer:
    """AdamW with one group for each kind of parameter; `base_lr` of a group is its peak rate.

    before: the optimizer of the steps so far; parameters that were there keep their moments. fused: step, clip and
    decode in one pass (see `fused`); by default on a GPU.

    Scale latents are logarithms and take `scale_lr`; weight decay would pull scales to 1, so they
    have none. In the tail, masters whose codes are frozen are left out.
    """
    # a group each: rates of embeddings and norm gains differ from those of weights (docs/experiments.md)
    groups: dict[str, list[nn.Parameter]] = {"scale": [], "embedding": [], "float": [], "weight": []}
    for name, parameter in latents.named_parameters():
        if parameter.requires_grad:
            groups[kind_of(name)].append(parameter)
    peaks = {
        "scale": schedule.scale_lr,
        "embedding": schedule.lr * schedule.embedding_lr,
        "float": schedule.lr * schedule.float_lr,
        "weight": schedule.lr,
    }
    decay = {"scale": 0.0, "embedding": 0.0, "float": schedule.weight_decay, "weight": schedule.weight_decay}
    if fused is None:
        fused = any(parameter.is_cuda for _, parameter in latents.named_parameters())
    optimizer = _class_of(schedule, fused)(
        latents,
        groups=[
            {"params": params, "lr": peaks[kind], "base_lr": peaks[kind], "weight_decay": decay[kind]}
            for kind, params in groups.items()
            if params
        ],
        clip=schedule.clip,
        betas=schedule.betas,
    )
    if before is not None:
        kept = {id(p) for group in optimizer.param_groups for p in group["params"]}
        optimizer.state.update({p: state for p, state in before.state.items() if id(p) in kept})
    return optimizer


def _class_of(schedule: Schedule, fused: bool) -> Callable[..., GridOptimizer]:
    """The optimizer that a schedule's moments need."""
    if schedule.moments == "int8":
        return GridAdamW8bit
    if fused:
        offload = schedule.offload_moments and torch.cuda.is_available()  # on a CPU they are where they would go
        moments = getattr(torch, schedule.moments)
        return partial(FusedGridAdamW, moments=moments, offload=offload, fused=True)
    plain = Bfloat16AdamW if schedule.moments == "bfloat16" else torch.optim.AdamW
    return partial(GridOptimizer, optimizer_class=plain, fused=True)


def kind_of(name: str) -> str:
    """Name of the schedule's rate for a parameter of `Latents.named_parameters`."""
    if is_scale(name):
        return "scale"
    if "embed_tokens" in name:
        return "embedding"
    return "float" if "norm." in name or "per_layer_model_projection" in name else "weight"


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` of its peak."""
    for group in optimizer.param_groups:
        rate = group["base_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):  # torchao's, which a compiled step reads
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
