"""The training loop: a student on its grids learns the distribution of its own float original, or of a user's text.

Read it from top to bottom: build the student, step, freeze, finish. It lacks early stopping, which a general trainer
has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.fsdp import FSDPModule

from intaglio.errors import InputError
from intaglio.packed.checkpoint import TextModel
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import Plan
from intaglio.plan.schedule import Schedule
from intaglio.progress import Progress, StepInfo
from intaglio.train import checkpoint
from intaglio.train.corpus import Corpus
from intaglio.train.latents import Latents
from intaglio.train.layers import set_layers
from intaglio.train.lesson import Distiller, Teach, Teacher, nothing
from intaglio.train.options import Options
from intaglio.train.run_folder import check_run_dir, claim
from intaglio.train.session import Session
from intaglio.train.sharding import (
    check_shared,
    check_together,
    is_main,
    keep_gathered,
    shard,
    start_processes,
    world_size,
)
from intaglio.train.static import put_scales, switch_static
from intaglio.train.student import build_student, calibrate_student, gptq_start
from intaglio.train.trouble import explained


def train(
    original: TextModel,
    plan: Plan,
    corpus: Corpus,
    run_dir: str | Path,
    *,
    teacher: TextModel | None = None,
    start: PackedModel | None = None,
    source: str | None = None,
    options: Options | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    on_step: Callable[[StepInfo], None] = lambda info: None,
    on_start: Callable[[Latents], None] = lambda latents: None,
    held_out: NDArray[np.int32] | None = None,
) -> Latents:
    """Train a copy of `original` to the plan's grids and return its latents; `.model` is the student itself.

    original: text model in its checkpoint's dtype or float32; it keeps its values. Of several processes each has a
    shard of it (see `sharding.load_own_rows`), or all of it, which is then sharded in place. corpus: packed sequences.
    run_dir: receives logs and checkpoints; an existing run is continued only with `resume`.
    teacher: another model whose distribution is learned, by the original's tokens; the original by default.
    start: a packed model to go on from, bit for bit; `original` then only lends its modules, and is changed.
    source: name of the original on the Hub with its commit, of which no other one may resume the run.
    progress: shows the calibration of static scales and the steps. on_step: for a caller's own code, such as a test
    that stops a run; called after each step, and what it raises ends the run.
    on_start: called with the latents as training begins with them, but not when it goes on from a checkpoint.
    held_out: windows int32 [N, T] of text that is not trained on, for `options.eval_every`.
    Raises TrainingError when the loss becomes NaN or Inf; the last checkpoint stays. Raises InputError for a KL
    without a teacher: a packed model has no original.
    """
    options, progress, run_dir = options or Options(), progress or Progress(), Path(run_dir)
    device, schedule = start_processes(), plan.recipe.schedule
    check_stages(schedule, start is not None)
    identity = run_identity(plan, start, options, source) | {"corpus": corpus.digest}
    _check_run(run_dir, identity, resume, schedule.batch_size)
    with explained(plan, run_dir, device, gradient_checkpointing=options.gradient_checkpointing):
        original = original.to(device)
        if world_size() > 1 and not isinstance(original, FSDPModule):
            shard(original, device)
        teacher = _teacher(plan, original, teacher, start, device)
        latents = build_student(original, plan, start=start, dtype=options.dtype)
        student = latents.model
        saved = checkpoint.latest(run_dir)
        if start is None:  # else its codes and static scales are the packed model's
            _first_values(latents, original, corpus, device, saved, progress)
        if "scales" in schedule.stages:
            latents.leave_scales()  # after GPTQ, which moves the codes that are fixed here
        if schedule.gathered:
            keep_gathered(student, teacher)
        session = Session(
            latents, *_lesson(student, teacher, device, options), corpus, run_dir, device, options, held_out
        )
        if is_main():
            claim(run_dir, identity)  # last: a model that is refused leaves no run behind
        if saved is None:
            on_start(latents)
        session.run(saved, progress, on_step)
        switch_static(student, activations=True, kv_cache=True)  # the last step's dropout may have left them off
        return latents


def _check_run(run_dir: Path, identity: dict[str, str], resume: bool, batch_size: int) -> None:
    """Raise on every process alike, before sharding: one that failed alone would leave the others waiting."""
    check_run_dir(run_dir, identity, resume)
    check_together(batch_size, identity)
    check_shared(run_dir)


def check_stages(schedule: Schedule, started: bool) -> None:
    """Raise InputError for stages that train nothing over the whole model, and for those that need a packed model.

    started: whether training goes on from a packed model, such as the stage "layers" leaves.
    """
    if schedule.stages == ("layers",):
        raise InputError(
            "schedule.stages = ['layers'] trains nothing over the whole model: use `intaglio quantize --data`, or add "
            "'scales' or 'model'"
        )
    if "layers" in schedule.stages and not started:
        raise InputError("the stage 'layers' comes first, and leaves a packed model: give that as `start`")
    if schedule.lora_rank and not started:
        raise InputError("schedule.lora_rank is for training that goes on from a packed model: quantize it first")


def _teacher(
    plan: Plan, original: TextModel, teacher: TextModel | None, start: PackedModel | None, device: torch.device
) -> TextModel | None:
    """The model whose distribution is learned, without gradients; None where the text itself is the lesson."""
    if plan.recipe.schedule.loss == "cross_entropy":
        return None
    if teacher is None and start is not None:
        raise InputError(
            "schedule.loss = 'kl' needs a teacher, and a packed model has no original: name the model it is to learn "
            "from, or learn from the text itself with schedule.loss = 'cross_entropy'"
        )
    return (teacher or original).to(device).requires_grad_(False)


def _lesson(
    student: TextModel, teacher: TextModel | None, device: torch.device, options: Options
) -> tuple[Distiller, Teach]:
    """The student with its loss, and the teacher's part in it; layers run as the options say."""
    gpu = device.type == "cuda"
    compiled = gpu if options.compiled is None else options.compiled
    set_layers(student, checkpointing=options.gradient_checkpointing, compiled=compiled and gpu)
    if teacher is not None:
        set_layers(teacher, compiled=compiled and gpu)
    lesson = Distiller(student, getattr(student.config, "final_logit_softcapping", None), compiled)
    return lesson, nothing if teacher is None else Teacher(teacher, options.dtype)


def _first_values(
    latents: Latents,
    original: TextModel,
    corpus: Corpus,
    device: torch.device,
    saved: Path | None,
    progress: Progress,
) -> None:
    """Codes by GPTQ, if the schedule has it, and static scales; before a checkpoint only places for its scales."""
    if saved is not None:  # the checkpoint holds the values; parameters must exist to be filled
        plan = latents.plan
        put_scales(latents.model, plan, {scale.name: 1.0 for scale in plan.static_scales if scale.owned})
        return
    if latents.plan.recipe.schedule.gptq_tokens:
        gptq_start(latents, original, corpus, device)
    calibrate_student(latents, corpus, device, progress)  # of the codes that GPTQ chose


def run_identity(
    plan: Plan, start: PackedModel | None, options: Options | None, source: str | None = None
) -> dict[str, str]:
    """Facts that must be the same for a run to be resumed, beside the corpus."""
    precision = "bf16" if (options or Options()).dtype == torch.bfloat16 else "no"
    identity = {"plan": plan.digest, "recipe": plan.recipe.to_toml(), "precision": precision}
    identity |= {} if source is None else {"model": source}
    return identity | ({} if start is None else {"start": start.sha256()})
