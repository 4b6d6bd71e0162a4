"""The training loop: a quantized student learns the distribution of its own float original, or of a user's text.

One plain file on accelerate, read from top to bottom: build the student, step, freeze, finish. What
it lacks beside a general trainer: evaluation and early stopping (see `measure`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from intaglio.errors import InputError, TrainingError
from intaglio.packed.checkpoint import TextModel
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import Plan
from intaglio.train import checkpoint
from intaglio.train.corpus import Corpus, batch_indices
from intaglio.train.decode import StepWeights, freeze_codes
from intaglio.train.kernels import compile_layers
from intaglio.train.lesson import Distiller, Teach, Teacher, nothing
from intaglio.train.optimizer import Phases, make_optimizer, set_lr
from intaglio.train.run_folder import LOSSES_FILE, append_line, check_run_dir, claim, keep_lines
from intaglio.train.static import put_scales, switch_static
from intaglio.train.student import build_student, calibrate_student, gptq_start, on_device


@dataclass(frozen=True, kw_only=True)
class Options:
    """What does not change the result's recipe, only how it is computed.

    precision: "bf16" for bfloat16 autocast, "no" for float32; None picks bf16 on a GPU.
    compiled: compile quantizer and loss with torch.compile, on a GPU decoder layers too; None does so on a GPU.
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


@dataclass(frozen=True)
class StepInfo:
    """Progress after an optimizer step: index, total, mean loss in nats, tokens seen, seconds."""

    step: int
    total_steps: int
    loss: float
    tokens: int
    seconds: float
    phase: str


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
    on_step: Callable[[StepInfo], None] = lambda info: None,
    on_calibration: Callable[[int, int], None] = lambda done, total: None,
) -> TextModel:
    """Train a copy of `original` to the plan's grids and return it, prepared and on the grid.

    original: float32 text model; it stays as it is. corpus: packed sequences. run_dir: receives
    losses, checkpoints and TensorBoard files; an existing run is continued only with `resume`.
    teacher: another model whose distribution is learned, by the original's tokens; the original by default.
    start: a packed model to go on from, bit for bit; `original` is then only what holds it, and is used up.
    on_calibration: tokens done and in all of the pass that calibrates static scales, if there are any.
    Raises TrainingError when the loss becomes NaN or Inf; the last checkpoint stays. InputError for a KL to
    nobody: a packed model that goes on has no original.
    """
    options = options or Options()
    run_dir = Path(run_dir)
    if plan.recipe.schedule.lora_rank and start is None:
        raise InputError("schedule.lora_rank is for training that goes on from a packed model: quantize it first")
    identity = run_identity(plan, start, options) | {"corpus": corpus.digest}
    check_run_dir(run_dir, identity, resume)
    accelerator = make_accelerator(options, run_dir)
    compiled = accelerator.device.type == "cuda" if options.compiled is None else options.compiled
    if plan.recipe.schedule.loss == "cross_entropy":
        teacher = None
    elif teacher is None and start is not None:
        raise InputError(
            "schedule.loss = 'kl' needs a teacher, and a packed model has no original: name the model it is to learn "
            "from, or learn from the text itself with schedule.loss = 'cross_entropy'"
        )
    else:
        teacher = (teacher or original).to(accelerator.device).requires_grad_(False)
    student = build_student(original.to(accelerator.device), plan, start=start, compiled=compiled)
    saved = checkpoint.latest(run_dir)
    if start is None:  # else its codes and static scales are the packed model's
        _first_values(student, original, plan, corpus, accelerator, saved, on_calibration)
    if options.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiled and accelerator.device.type == "cuda":
        compile_layers(student, *([] if teacher is None else [teacher]))
    softcap = getattr(student.config, "final_logit_softcapping", None)
    lesson = Distiller(student, softcap, compiled)
    teach = nothing if teacher is None else Teacher(teacher, session_dtype(accelerator))
    session = Session(student, lesson, teach, plan, corpus, run_dir, accelerator, compiled, options)
    claim(run_dir, identity)  # not before everything that can be wrong with the model was looked at
    if options.tensorboard:
        accelerator.init_trackers("tensorboard")
    session.run(saved, on_step)
    switch_static(student, activations=True, kv_cache=True)
    accelerator.end_training()
    return student


def _first_values(
    student: TextModel,
    original: TextModel,
    plan: Plan,
    corpus: Corpus,
    accelerator: Accelerator,
    saved: Path | None,
    on_calibration: Callable[[int, int], None],
) -> None:
    """Codes by GPTQ, if the schedule wants it, and static scales; or what a checkpoint will fill."""
    if saved is not None:  # the checkpoint knows the scales; they must only be there
        put_scales(student, plan, {scale.name: 1.0 for scale in plan.static_scales if scale.owned})
        return
    if plan.recipe.schedule.gptq_tokens:
        gptq_start(student, original, plan.recipe.schedule, corpus, accelerator)
    calibrate_student(student, plan, corpus, accelerator, on_calibration)


def run_identity(plan: Plan, start: PackedModel | None, options: Options | None) -> dict[str, str]:
    """What must be the same for a run to be resumed, beside the corpus."""
    identity = {"plan": plan.digest, "recipe": plan.recipe.to_toml(), "precision": precision_of(options or Options())}
    return identity | ({} if start is None else {"start": start.sha256()})


def precision_of(options: Options) -> str:
    """The precision that the options ask for, "bf16" or "no"."""
    return options.precision or ("bf16" if torch.cuda.is_available() else "no")


def make_accelerator(options: Options, run_dir: Path | None) -> Accelerator:
    """accelerate with the precision that the options ask for."""
    precision = precision_of(options)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # of an earlier run in this process
    log_with = "tensorboard" if options.tensorboard else None
    return Accelerator(mixed_precision=precision, log_with=log_with, project_dir=run_dir)


def session_dtype(accelerator: Accelerator) -> torch.dtype:
    """What products are computed in."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


class Session:
    """The state of one training run between its steps.

    lesson: the student with its loss: called with input_ids and positions [B, T], a dtype, and what `teach` makes
    of these input_ids and positions without gradients.
    """

    def __init__(
        self,
        student: TextModel,
        lesson: nn.Module,
        teach: Teach,
        plan: Plan,
        corpus: Corpus,
        run_dir: Path,
        accelerator: Accelerator,
        compiled: bool,
        options: Options,
    ):
        self.schedule = plan.recipe.schedule
        self.phases = Phases.of(self.schedule)
        self.student, self.teach, self.corpus = student, teach, corpus
        self.run_dir, self.accelerator, self.options = run_dir, accelerator, options
        self.compiled = compiled
        self.dtype = session_dtype(accelerator)
        self.lesson = accelerator.prepare(lesson)
        self.weights = StepWeights(student)
        self.optimizer = make_optimizer(student, self.schedule)
        self.dropout = plan.recipe.activations.dropout if plan.recipe.activations else 0.0
        self.seconds_before = 0.0

    def run(self, start: Path | None, on_step: Callable[[StepInfo], None]) -> None:
        """Train from `start`, a checkpoint, or from the beginning, to the end."""
        first = self.restore(start) if start else 0
        log = self.run_dir / LOSSES_FILE
        keep_lines(log, first)
        began = time.perf_counter()
        try:
            for step in range(first, self.phases.total):
                if step == self.phases.tail:
                    self.enter_tail()
                loss = self.step(step)
                info = self.record(step, loss, self.seconds_before + time.perf_counter() - began)
                append_line(log, json.dumps({"step": info.step, "tokens": info.tokens, "loss": loss}) + "\n")
                on_step(info)
                every = self.options.checkpoint_every
                if every and info.step % every == 0 and info.step < self.phases.total:
                    checkpoint.save(self.run_dir, info.step, self.student, self.optimizer)
        finally:
            self.weights.close()

    def step(self, step: int) -> float:
        """One optimizer step; returns the mean loss over its micro-batches."""
        schedule = self.schedule
        if self.dropout:
            on = bool(np.random.default_rng([schedule.seed, step]).random() >= self.dropout)
            switch_static(self.student, activations=on, kv_cache=on)
        set_lr(self.optimizer, self.phases.lr_factor(step, schedule.tail_lr))
        indices = batch_indices(len(self.corpus.tokens), schedule.batch_size, schedule.seed, step)
        micro_batches = self.micro_batches(indices)
        self.weights.decode(self.dtype)
        total = torch.zeros((), device=self.accelerator.device)
        for input_ids, positions in micro_batches[:-1]:
            total += self.backward(input_ids, positions, 1 / len(micro_batches))
        with self.weights.dropped_by_backward():
            total += self.backward(*micro_batches[-1], 1 / len(micro_batches))
        loss = self.accelerator.reduce(total, reduction="mean").item()
        if not math.isfinite(loss):
            last = checkpoint.latest(self.run_dir)
            kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            raise TrainingError(f"loss is {loss} at step {step + 1}: {kept}: lower schedule.lr or check the data")
        if schedule.clip:
            self.accelerator.clip_grad_norm_(self.student.parameters(), schedule.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.weights.drop()
        return loss

    def micro_batches(self, indices) -> list[tuple[Tensor, Tensor]]:
        """This process's share of a batch, cut into micro-batches on the device."""
        accelerator = self.accelerator
        indices = indices[accelerator.process_index :: accelerator.num_processes]
        size = self.schedule.micro_batch or len(indices)
        parts = [indices[i : i + size] for i in range(0, len(indices), size)]

        tokens, positions = self.corpus.tokens, self.corpus.positions
        return [(on_device(tokens[p], accelerator), on_device(positions[p], accelerator)) for p in parts]

    def backward(self, input_ids: Tensor, positions: Tensor, weight: float) -> Tensor:
        """Loss of one micro-batch, its gradients times `weight` added to the parameters'."""
        with self.accelerator.autocast():
            with torch.no_grad():
                arguments = (input_ids, positions, self.dtype, *self.teach(input_ids, positions))
            if not self.compiled:
                loss = self.lesson(*arguments) * weight
                self.accelerator.backward(loss)
                return loss.detach()
            with self.weights.in_graph(self.dtype):
                loss = self.lesson(*arguments) * weight
                self.accelerator.backward(loss)
            return loss.detach()

    def enter_tail(self) -> None:
        """Freeze the codes; what goes on learning keeps its moments."""
        self.weights.close()
        freeze_codes(self.student)
        self.weights = StepWeights(self.student)
        self.optimizer = make_optimizer(self.student, self.schedule, self.optimizer)

    def restore(self, path: Path) -> int:
        """Bring model and optimizer to the state of a checkpoint; return its step."""
        step = checkpoint.read_step(path)
        if step > self.phases.tail:
            self.enter_tail()
        checkpoint.load(path, self.student, self.optimizer)
        return step

    def record(self, step: int, loss: float, seconds: float) -> StepInfo:
        """What a step's callback hears; logged for TensorBoard too."""
        tokens = (step + 1) * self.schedule.batch_size * self.schedule.sequence_length
        phase = "tail" if step >= self.phases.tail else "train"
        if self.options.tensorboard:
            self.accelerator.log({"loss": loss, "tokens": tokens}, step=step + 1)
        return StepInfo(step + 1, self.phases.total, loss, tokens, seconds, phase)
