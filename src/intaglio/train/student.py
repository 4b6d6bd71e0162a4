"""The student before its first step: a copy of the original on the plan's grids, with all scales there are."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intaglio.packed.checkpoint import TextModel
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import Plan
from intaglio.plan.schedule import Schedule
from intaglio.progress import Progress
from intaglio.train.calibrate import calibrate
from intaglio.train.corpus import Corpus, batch_indices
from intaglio.train.gptq import start_from_gptq
from intaglio.train.latents import Latents, prepare
from intaglio.train.lora import add_lora
from intaglio.train.sharding import like, rank, sum_over_processes, world_size


def build_student(
    original: TextModel, plan: Plan, *, start: PackedModel | None = None, dtype: torch.dtype | None = None
) -> Latents:
    """A copy of the original with every planned tensor on its grid, ready to train; the original stays as it is.

    dtype: in which the copy holds its weights and computes; the original's by default. start: a packed model whose
    values the student has instead; the student is then `original` itself.
    """
    if world_size() > 1:
        student = like(original, next(original.parameters()).device)
    else:
        student = original if start is not None else copy.deepcopy(original)
        cast_weights(student, dtype or student.dtype)
    student.requires_grad_(True).train()
    # adapters before latents, which find the weights inside of them
    if plan.recipe.schedule.lora_rank:
        add_lora(student, plan, plan.recipe.schedule.lora_rank)
    source = None if start is not None or student.dtype == original.dtype else original.state_dict()
    return prepare(student, plan, start=start, source=source)


@torch.no_grad()
def cast_weights(model: TextModel, dtype: torch.dtype) -> None:
    """Hold a model's weights in `dtype`: what a checkpoint stores, and nothing else.

    A cast of the whole model would round rotary tables too, which moves logits.
    """
    stored = set(model.state_dict())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)


def calibrate_student(latents: Latents, corpus: Corpus, device: torch.device, progress: Progress | None = None) -> None:
    """Find the plan's static scales on the schedule's share of the corpus; every process takes its part."""
    if not latents.plan.static_scales:
        return
    schedule = latents.plan.recipe.schedule
    rows = _share(corpus, schedule, schedule.calibration_tokens)
    own = rows[rank() :: world_size()]
    size = schedule.micro_batch or schedule.batch_size
    batches = [own[i : i + size] for i in range(0, len(own), size)]
    calibrate(
        latents.model,
        latents.plan,
        [(on_device(corpus.tokens[b], device), on_device(corpus.positions[b], device)) for b in batches],
        reduce=sum_over_processes,
        progress=progress,
    )


def gptq_start(latents: Latents, original: TextModel, corpus: Corpus, device: torch.device) -> None:
    """Let GPTQ choose the first codes, on the schedule's share of the corpus."""
    schedule = latents.plan.recipe.schedule
    rows = _share(corpus, schedule, schedule.gptq_tokens)
    own = rows[rank() :: world_size()]
    tokens, positions = (on_device(array[own], device) for array in (corpus.tokens, corpus.positions))
    start_from_gptq(latents, original, tokens, positions)


def _share(corpus: Corpus, schedule: Schedule, tokens: int) -> NDArray[np.int64]:
    """Rows of the corpus that hold `tokens` tokens, or all rows of a smaller one: the first of epoch 0."""
    count = min(len(corpus.tokens), -(-tokens // schedule.sequence_length))
    return batch_indices(len(corpus.tokens), count, schedule.seed, 0)


def on_device(array: NDArray[np.int32], device: torch.device) -> Tensor:
    """int64, on `device`."""
    return torch.from_numpy(array).long().to(device)
