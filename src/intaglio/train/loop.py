"""The training loop: a student on its grids learns the distribution of its own float original, or of a user's text.

Read it from top to bottom: build the student, step, freeze, finish. It lacks evaluation and early stopping, which a
general trainer has (see `measure`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.tracking import TensorBoardTracker
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from intaglio.errors import InputError, TrainingError
from intaglio.packed.checkpoint import TextModel
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import Plan
from intaglio.plan.schedule import Schedule
from intaglio.progress import Progress, StepInfo
from intaglio.train import checkpoint
from intaglio.train.corpus import Corpus, batch_indices
from intaglio.train.latents import Latents
from intaglio.train.layers import set_layers
from intaglio.train.lesson import Distiller, Teach, Teacher, labels_inside, nothing
from intaglio.train.optimizer import Phases, make_optimizer, set_lr
from intaglio.train.run_folder import LOSSES_FILE, append_line, check_run_dir, claim, keep_lines
from intaglio.train.sharding import (
    average_over_processes,
    check_shared,
    check_together,
    is_main,
    keep_gathered,
    rank,
    shard,
    start_processes,
    sum_over_processes,
    world_size,
)
from intaglio.train.signals import deferred
from intaglio.train.static import put_scales, switch_static
from intaglio.train.student import build_student, calibrate_student, gptq_start, on_device
from intaglio.train.trouble import explained


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings that change how a run is computed, and not its recipe.

    precision: "bf16" to hold the student's weights and compute in bfloat16, "no" for float32; None picks bf16 on a GPU.
        Latents are float32 either way.
    compiled: compile the loss with torch.compile, and on a GPU decoder layers too; None does so on a GPU.
    checkpoint_every: optimizer steps between checkpoints; 0 for none.
    tensorboard: log the loss through accelerate's tracker into the run folder.
    gradient_checkpointing: recompute decoder layers in the backward.
    """

    precision: str | None = None
    compiled: bool | None = None
    checkpoint_every: int = 0
    tensorboard: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.precision not in (None, "bf16", "no"):
            raise InputError(f"precision {self.precision!r}: expected bf16 or no")
        if self.checkpoint_every < 0:
            raise InputError(f"checkpoint_every = {self.checkpoint_every}: expected 0 or more")


def train(
    original: TextModel,
    plan: Plan,
    corpus: Corpus,
    run_dir: str | Path,
    *,
    teacher: TextModel | None = None,
    start: PackedModel | None = None,
    options: Options | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    on_step: Callable[[StepInfo], None] = lambda info: None,
    on_start: Callable[[Latents], None] = lambda latents: None,
) -> Latents:
    """Train a copy of `original` to the plan's grids and return its latents; `.model` is the student itself.

    original: text model in its checkpoint's dtype or float32; it keeps its values. Of several processes each has a
    shard of it (see `sharding.load_own_rows`), or all of it, which is then sharded in place. corpus: packed sequences.
    run_dir: receives losses, checkpoints and TensorBoard files; an existing run is continued only with `resume`.
    teacher: another model whose distribution is learned, by the original's tokens; the original by default.
    start: a packed model to go on from, bit for bit; `original` is then only what holds it, and is used up.
    progress: shows the calibration of static scales and the steps. on_step: for a caller's own code, such as a test
    that stops a run; called after each step, and what it raises ends the run.
    on_start: called with the latents as training begins with them, but not when it goes on from a checkpoint.
    Raises TrainingError when the loss becomes NaN or Inf; the last checkpoint stays. InputError for a KL to
    nobody: a packed model that goes on has no original.
    """
    options, progress, run_dir = options or Options(), progress or Progress(), Path(run_dir)
    device = start_processes()
    check_stages(plan.recipe.schedule, start is not None)
    if plan.recipe.schedule.lora_rank and start is None:
        raise InputError("schedule.lora_rank is for training that goes on from a packed model: quantize it first")
    identity = run_identity(plan, start, options) | {"corpus": corpus.digest}
    check_run_dir(run_dir, identity, resume)
    check_together(plan.recipe.schedule.batch_size, identity)
    check_shared(run_dir)
    with explained(plan, run_dir, device, gradient_checkpointing=options.gradient_checkpointing):
        original = original.to(device)
        if world_size() > 1 and not isinstance(original, FSDPModule):
            shard(original, device)
        teacher = _teacher(plan, original, teacher, start, device)
        dtype = dtype_of(options)
        latents = build_student(original, plan, start=start, dtype=dtype)
        student = latents.model
        saved = checkpoint.latest(run_dir)
        if start is None:  # else its codes and static scales are the packed model's
            _first_values(latents, original, corpus, device, saved, progress)
        if "scales" in plan.recipe.schedule.stages:
            latents.leave_scales()
        if plan.recipe.schedule.gathered:
            keep_gathered(student, teacher)
        lesson, teach = _lesson(student, teacher, dtype, device, options)
        session = Session(latents, lesson, teach, corpus, run_dir, device, options)
        if is_main():
            claim(run_dir, identity)  # not before everything that can be wrong with the model was looked at
        if saved is None:
            on_start(latents)
        session.run(saved, progress, on_step)
        switch_static(student, activations=True, kv_cache=True)
        return latents


def check_stages(schedule: Schedule, started: bool) -> None:
    """Raise InputError for stages with nothing to train over the whole model, and where layers were to come before.

    started: whether training goes on from a packed model, as that of layers leaves one.
    """
    if schedule.stages == ("layers",):
        raise InputError(
            "schedule.stages = ['layers'] trains nothing over the whole model: use `intaglio quantize --data`, or add "
            "'scales' or 'model'"
        )
    if "layers" in schedule.stages and not started:
        raise InputError("the stage 'layers' comes first, and leaves a packed model: give that as `start`")


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
    student: TextModel, teacher: TextModel | None, dtype: torch.dtype, device: torch.device, options: Options
) -> tuple[Distiller, Teach]:
    """The student with its loss, and the teacher's part in it; layers run as the options say."""
    gpu = device.type == "cuda"
    compiled = gpu if options.compiled is None else options.compiled
    set_layers(student, checkpointing=options.gradient_checkpointing, compiled=compiled and gpu)
    if teacher is not None:
        set_layers(teacher, compiled=compiled and gpu)
    lesson = Distiller(student, getattr(student.config, "final_logit_softcapping", None), compiled)
    return lesson, nothing if teacher is None else Teacher(teacher, dtype)


def _first_values(
    latents: Latents,
    original: TextModel,
    corpus: Corpus,
    device: torch.device,
    saved: Path | None,
    progress: Progress,
) -> None:
    """Codes by GPTQ, if the schedule wants it, and static scales; or what a checkpoint will fill."""
    if saved is not None:  # the checkpoint knows the scales; they must only be there
        plan = latents.plan
        put_scales(latents.model, plan, {scale.name: 1.0 for scale in plan.static_scales if scale.owned})
        return
    if latents.plan.recipe.schedule.gptq_tokens:
        gptq_start(latents, original, corpus, device)
    calibrate_student(latents, corpus, device, progress)


def run_identity(plan: Plan, start: PackedModel | None, options: Options | None) -> dict[str, str]:
    """Facts that must be the same for a run to be resumed, beside the corpus."""
    identity = {"plan": plan.digest, "recipe": plan.recipe.to_toml(), "precision": precision_of(options or Options())}
    return identity | ({} if start is None else {"start": start.sha256()})


def precision_of(options: Options) -> str:
    """The precision that the options ask for, "bf16" or "no"."""
    return options.precision or ("bf16" if torch.cuda.is_available() else "no")


def dtype_of(options: Options) -> torch.dtype:
    """In which the student's weights are held, and products computed."""
    return torch.bfloat16 if precision_of(options) == "bf16" else torch.float32


class Session:
    """The state of one training run between its steps.

    lesson: the student with its loss: called with input_ids and positions [B, T] and what `teach` makes of these
    without gradients.
    """

    def __init__(
        self,
        latents: Latents,
        lesson: nn.Module,
        teach: Teach,
        corpus: Corpus,
        run_dir: Path,
        device: torch.device,
        options: Options,
    ):
        self.latents, self.lesson, self.teach, self.corpus = latents, lesson, teach, corpus
        self.recipe, self.schedule = latents.plan.recipe, latents.plan.recipe.schedule
        self.phases = Phases.of(self.schedule)
        self.run_dir, self.device, self.options = run_dir, device, options
        self.tracker = TensorBoardTracker("", run_dir) if options.tensorboard and is_main() else None
        if self.tracker is not None:
            self.tracker.start()
        self.optimizer = make_optimizer(latents, self.schedule)
        self.dropout = self.recipe.activations.dropout if self.recipe.activations else 0.0

    def run(self, start: Path | None, progress: Progress, on_step: Callable[[StepInfo], None]) -> None:
        """Train from `start`, a checkpoint, or from the beginning, to the end.

        A signal that asks the process to end saves a checkpoint first.
        """
        first = self.restore(start) if start else 0
        log, every = self.run_dir / LOSSES_FILE, self.options.checkpoint_every
        if is_main():
            keep_lines(log, first)  # a cut run has logged steps that are trained again from here
        began = time.perf_counter()
        with deferred() as pending:
            for step in range(first, self.phases.total):
                if step == self.phases.tail:
                    self.enter_tail()
                loss = self.step(step)
                info = self.record(step, loss, time.perf_counter() - began)
                if is_main():
                    append_line(log, json.dumps({"step": info.step, "tokens": info.tokens, "loss": loss}) + "\n")
                    progress.step(info)
                    on_step(info)
                due = every and info.step % every == 0 and info.step < self.phases.total
                if due or pending.number:
                    checkpoint.save(self.run_dir, info.step, self.latents, self.optimizer)
                pending.stop()
        if self.tracker is not None:
            self.tracker.finish()

    def step(self, step: int) -> float:
        """One optimizer step; returns the mean loss over its micro-batches."""
        schedule = self.schedule
        if self.dropout:
            on = bool(np.random.default_rng([schedule.seed, step]).random() >= self.dropout)
            switch_static(self.latents.model, activations=on, kv_cache=on)
        set_lr(self.optimizer, self.phases.lr_factor(step, schedule.tail_lr))
        indices = batch_indices(len(self.corpus.tokens), schedule.batch_size, schedule.seed, step)
        micro_batches = self.micro_batches(indices)
        total = torch.zeros((), device=self.device)
        for micro_batch, weight in zip(micro_batches, self.weights(micro_batches), strict=True):
            total += self.backward(*micro_batch, weight)
        average_over_processes([total])
        loss = total.item()
        if not math.isfinite(loss):
            last = checkpoint.latest(self.run_dir)
            kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            raise TrainingError(f"loss is {loss} at step {step + 1}: {kept}: lower schedule.lr or check the data")
        self.optimizer.step()
        return loss

    def micro_batches(self, indices: NDArray[np.int64]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """This process's share of a batch, cut into micro-batches on the device: tokens, positions, and what counts."""
        indices = indices[rank() :: world_size()]
        size = self.schedule.micro_batch or len(indices)
        parts = [indices[i : i + size] for i in range(0, len(indices), size)]

        return [self._on_device(self.corpus.rows(part)) for part in parts]

    def _on_device(self, rows: Corpus) -> tuple[Tensor, Tensor, Tensor | None]:
        tokens, positions = on_device(rows.tokens, self.device), on_device(rows.positions, self.device)
        if rows.loss_mask is None:
            return tokens, positions, None
        labels = torch.from_numpy(rows.loss_mask).to(self.device).roll(-1, 1)
        return tokens, positions, labels & labels_inside(positions)

    def weights(self, micro_batches: list[tuple[Tensor, Tensor, Tensor | None]]) -> list[Any]:
        """Share of each micro-batch in the mean over all tokens that count, on all processes together."""
        counts = [counted.sum().float() for _, _, counted in micro_batches if counted is not None]
        if not counts:
            return [1 / len(micro_batches)] * len(micro_batches)
        total = sum_over_processes(torch.stack(counts).sum()).clamp_min(1)
        return [count * world_size() / total for count in counts]

    def backward(self, input_ids: Tensor, positions: Tensor, counted: Tensor | None, weight: Any) -> Tensor:
        """Loss of one micro-batch, its gradients times `weight` added to the weights'."""
        with torch.no_grad():
            taught = self.teach(input_ids, positions)
        masked = {} if counted is None else {"counted": counted}
        loss: Tensor = self.lesson(input_ids, positions, *taught, **masked) * weight
        loss.backward()
        return loss.detach()

    def enter_tail(self) -> None:
        """Freeze the codes; what goes on learning keeps its moments."""
        self.latents.freeze_codes()
        self.optimizer = make_optimizer(self.latents, self.schedule, self.optimizer)

    def restore(self, path: Path) -> int:
        """Bring model and optimizer to the state of a checkpoint; return its step."""
        step = checkpoint.read_step(path)
        if step > self.phases.tail:
            self.enter_tail()
        checkpoint.load(path, self.latents, self.optimizer)
        return step

    def record(self, step: int, loss: float, seconds: float) -> StepInfo:
        """Progress for a step's callback; logged for TensorBoard too."""
        tokens = (step + 1) * self.schedule.batch_size * self.schedule.sequence_length
        phase = "tail" if step >= self.phases.tail else "train"
        if self.tracker is not None:
            self.tracker.log({"loss": loss, "tokens": tokens}, step=step + 1)
        return StepInfo(step + 1, self.phases.total, loss, tokens, seconds, phase)
