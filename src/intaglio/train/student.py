"""The student before its first step: a copy of the original on the plan's grids, with all scales there are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from intaglio.packed.checkpoint import TextModel
from intaglio.packed.model import PackedModel
from intaglio.plan.memory import is_frozen_table
from intaglio.plan.plan import Plan
from intaglio.plan.schedule import Schedule
from intaglio.train.attach import prepare
from intaglio.train.calibrate import calibrate
from intaglio.train.corpus import Corpus, batch_indices
from intaglio.train.gptq import start_from_gptq
from intaglio.train.lora import add_lora


def build_student(
    teacher: TextModel, plan: Plan, *, start: PackedModel | None = None, compiled: bool = False
) -> TextModel:
    """A copy of the teacher with every planned tensor on its grid, ready to train.

    Of the table of per-layer embeddings no copy is made where it is not trained: the student has codes of it.
    start: a packed model whose values the student has instead; the student is then `teacher` itself.
    """
    rank = plan.recipe.schedule.lora_rank
    if start is not None:
        student = teacher.requires_grad_(True).train()
        if rank:
            add_lora(student, plan, rank)
        return prepare(student, plan, start=start, compiled=compiled, compact=True)
    frozen = {tensor.name for tensor in plan if is_frozen_table(tensor)}
    tables = [parameter for name, parameter in teacher.named_parameters() if name in frozen]
    student = copy.deepcopy(teacher, {id(table): table for table in tables}).requires_grad_(True)
    student.train()
    if rank:
        add_lora(student, plan, rank)
    prepare(student, plan, compiled=compiled, compact=True)
    for table in tables:
        table.requires_grad_(False)
    return student


def calibrate_student(
    student: TextModel,
    plan: Plan,
    corpus: Corpus,
    accelerator: Accelerator,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Find the plan's static scales on the schedule's share of the corpus; every process takes its part."""
    if not plan.static_scales:
        return
    schedule = plan.recipe.schedule
    rows = _share(corpus, schedule, schedule.calibration_tokens)
    own = rows[accelerator.process_index :: accelerator.num_processes]
    size = schedule.micro_batch or schedule.batch_size
    batches = [own[i : i + size] for i in range(0, len(own), size)]
    with accelerator.autocast():
        calibrate(
            student,
            plan,
            [(on_device(corpus.tokens[b], accelerator), on_device(corpus.positions[b], accelerator)) for b in batches],
            reduce=lambda counts: accelerator.reduce(counts, reduction="sum"),
            on_progress=on_progress,
        )


def gptq_start(
    student: TextModel, original: TextModel, schedule: Schedule, corpus: Corpus, accelerator: Accelerator
) -> None:
    """Let GPTQ choose the first codes, on the schedule's share of the corpus."""
    rows = _share(corpus, schedule, schedule.gptq_tokens)
    tokens, positions = (on_device(array[rows], accelerator) for array in (corpus.tokens, corpus.positions))
    with accelerator.autocast():
        start_from_gptq(student, original, tokens, positions)


def _share(corpus: Corpus, schedule: Schedule, tokens: int) -> NDArray[np.int64]:
    """Rows of the corpus that hold so many tokens, or all of them."""
    count = min(len(corpus.tokens), -(-tokens // schedule.sequence_length))
    return batch_indices(len(corpus.tokens), count, schedule.seed, 0)


def on_device(array: NDArray[np.int32], accelerator: Accelerator) -> Tensor:
    """int64, on the accelerator's device."""
    return torch.from_numpy(array).long().to(accelerator.device)
