"""The training loop: a quantized student learns the distribution of its own float original.

One plain file on accelerate, read from top to bottom: build the student, step, freeze, finish. What
it lacks beside a general trainer: evaluation and early stopping (see `measure`), and any loss but
the KL to the teacher.
"""

from __future__ import annotations

import copy
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
from numpy.typing import NDArray
from torch import Tensor, nn

from intaglio.errors import ConfigError, InputError, OutputError, TrainingError
from intaglio.packed.checkpoint import TextModel
from intaglio.packed.store import new_path, write_error
from intaglio.plan.plan import Plan
from intaglio.plan.recipe import Schedule
from intaglio.train import checkpoint
from intaglio.train.attach import is_frozen_table, prepare
from intaglio.train.calibrate import calibrate
from intaglio.train.corpus import Corpus, batch_indices
from intaglio.train.decode import cache_values, decoded_in_graph, drop_values, freeze_codes
from intaglio.train.distill import chunked_kl
from intaglio.train.gptq import start_from_gptq
from intaglio.train.modules import QuantLinear
from intaglio.train.optimizer import Phases, make_optimizer, set_lr
from intaglio.train.static import put_scales, switch_static

LOSSES_FILE = "losses.jsonl"
RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What does not change the result's recipe, only how it is computed.

    precision: "bf16" for bfloat16 autocast, "no" for float32; None picks bf16 on a GPU.
    compiled: compile quantizer, loss and decoder layers with torch.compile; None does so on a GPU.
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


class Distiller(nn.Module):
    """Student plus loss as one module, so that accelerate can wrap the whole."""

    def __init__(self, student: TextModel, softcap: float | None, compiled: bool):
        super().__init__()
        self.student = student
        self.softcap = softcap
        self.compiled = compiled

    def forward(self, input_ids: Tensor, positions: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        hidden = final_hidden(self.student, input_ids, positions).to(teacher_head.dtype)
        head = head_weight(self.student, teacher_head.dtype)
        return chunked_kl(
            hidden.flatten(0, 1), head, teacher_hidden, teacher_head, softcap=self.softcap, compiled=self.compiled
        )


def final_hidden(model: TextModel, input_ids: Tensor, positions: Tensor) -> Tensor:
    """Output of the final norm, [B, T, D]. Positions that restart keep documents apart."""
    return model.model(input_ids=input_ids, position_ids=positions, use_cache=False).last_hidden_state


def head_weight(model: TextModel, dtype: torch.dtype) -> Tensor:
    """Output embedding [V, D] as the forward decodes it."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, QuantLinear):
        return head.weight.to(dtype)
    decoded = head.quantizer.decoded
    return decoded if decoded is not None else head.quantizer(head.weight, dtype)


def train(
    teacher: TextModel,
    plan: Plan,
    corpus: Corpus,
    run_dir: str | Path,
    *,
    options: Options | None = None,
    resume: bool = False,
    on_step: Callable[[StepInfo], None] = lambda info: None,
    on_calibration: Callable[[int, int], None] = lambda done, total: None,
) -> TextModel:
    """Train a copy of `teacher` to the plan's grids and return it, prepared and on the grid.

    teacher: float32 text model; it stays as it is. corpus: packed sequences. run_dir: receives
    losses, checkpoints and TensorBoard files; an existing run is continued only with `resume`.
    on_calibration: tokens done and in all of the pass that calibrates static scales, if there are any.
    Raises TrainingError when the loss becomes NaN or Inf; the last checkpoint stays.
    """
    options = options or Options()
    run_dir = Path(run_dir)
    identity = {"plan": plan.digest, "corpus": corpus.digest}
    check_run_dir(run_dir, identity, resume)
    accelerator = make_accelerator(options, run_dir)
    compiled = accelerator.device.type == "cuda" if options.compiled is None else options.compiled
    teacher = teacher.to(accelerator.device).requires_grad_(False)
    student = build_student(teacher, plan, compiled=compiled)
    start = checkpoint.latest(run_dir)
    if plan.recipe.schedule.gptq_tokens and start is None:
        _gptq(student, plan.recipe.schedule, corpus, accelerator)
    if start is None:
        calibrate_student(student, plan, corpus, accelerator, on_calibration)
    else:  # the checkpoint knows the scales; they must only be there
        put_scales(student, plan, {scale.name: 1.0 for scale in plan.static_scales if scale.owned})
    if options.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiled:
        for layer in (*teacher.model.layers, *student.model.layers):
            layer.compile(dynamic=False)
    session = Session(teacher, student, plan, corpus, run_dir, accelerator, compiled, options)
    _claim(run_dir, identity)  # not before everything that can be wrong with the model was looked at
    if options.tensorboard:
        accelerator.init_trackers("tensorboard")
    session.run(start, on_step)
    switch_static(student, activations=True, kv_cache=True)
    accelerator.end_training()
    return student


def build_student(teacher: TextModel, plan: Plan, *, compiled: bool = False) -> TextModel:
    """A copy of the teacher with every planned tensor on its grid, ready to train.

    Of the table of per-layer embeddings no copy is made where it is not trained: the student has codes of it.
    """
    frozen = {tensor.name for tensor in plan if is_frozen_table(tensor)}
    tables = [parameter for name, parameter in teacher.named_parameters() if name in frozen]
    student = copy.deepcopy(teacher, {id(table): table for table in tables}).requires_grad_(True)
    student.train()
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
    count = min(len(corpus.tokens), -(-schedule.calibration_tokens // schedule.sequence_length))
    rows = batch_indices(len(corpus.tokens), count, schedule.seed, 0)
    own = rows[accelerator.process_index :: accelerator.num_processes]
    size = schedule.micro_batch or schedule.batch_size
    batches = [own[i : i + size] for i in range(0, len(own), size)]
    with accelerator.autocast():
        calibrate(
            student,
            plan,
            [
                (_on_device(corpus.tokens[b], accelerator), _on_device(corpus.positions[b], accelerator))
                for b in batches
            ],
            reduce=lambda counts: accelerator.reduce(counts, reduction="sum"),
            on_progress=on_progress,
        )


def _gptq(student: TextModel, schedule: Schedule, corpus: Corpus, accelerator: Accelerator) -> None:
    count = min(len(corpus.tokens), -(-schedule.gptq_tokens // schedule.sequence_length))
    rows = batch_indices(len(corpus.tokens), count, schedule.seed, 0)
    with accelerator.autocast():
        start_from_gptq(
            student, _on_device(corpus.tokens[rows], accelerator), _on_device(corpus.positions[rows], accelerator)
        )


def _on_device(array: NDArray[np.int32], accelerator: Accelerator) -> Tensor:
    return torch.from_numpy(array).long().to(accelerator.device)


def make_accelerator(options: Options, run_dir: Path | None) -> Accelerator:
    """accelerate with the precision that the options ask for."""
    precision = options.precision or ("bf16" if torch.cuda.is_available() else "no")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # of an earlier run in this process
    log_with = "tensorboard" if options.tensorboard else None
    return Accelerator(mixed_precision=precision, log_with=log_with, project_dir=run_dir)


def check_run_dir(run_dir: Path, identity: dict[str, str], resume: bool) -> None:
    """Raise OutputError unless a run of this identity may begin in the folder, or go on there with `resume`."""
    record = run_dir / RUN_FILE
    if not record.is_file():
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise OutputError(f"{run_dir}: is not empty and holds no run: choose another folder")
        return
    if not resume:
        raise OutputError(f"{run_dir}: holds another run: choose another folder, or continue it with --resume")
    try:
        found = dict(json.loads(record.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise OutputError(f"{record}: damaged: {error}: choose another folder") from None
    for key, value in identity.items():
        if found.get(key) != value:
            raise OutputError(
                f"{run_dir}: cannot resume: the run there has another {key} ({found.get(key)}): "
                f"give it the {key} that it began with, or choose another folder"
            )


def _claim(run_dir: Path, identity: dict[str, str]) -> None:
    """Make the folder this run's."""
    if not (run_dir / RUN_FILE).is_file():
        with new_path(run_dir / RUN_FILE) as temporary:
            temporary.write_text(json.dumps(identity), "utf-8")


class Session:
    """The state of one training run between its steps."""

    def __init__(
        self,
        teacher: TextModel,
        student: TextModel,
        plan: Plan,
        corpus: Corpus,
        run_dir: Path,
        accelerator: Accelerator,
        compiled: bool,
        options: Options,
    ):
        self.schedule = plan.recipe.schedule
        self.phases = Phases.of(self.schedule)
        self.teacher, self.student, self.corpus = teacher, student, corpus
        self.run_dir, self.accelerator, self.options = run_dir, accelerator, options
        self.compiled = compiled
        softcap = getattr(student.config, "final_logit_softcapping", None)
        self.dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        self.teacher_head = teacher.get_output_embeddings().weight.to(self.dtype)
        self.distiller = accelerator.prepare(Distiller(student, softcap, compiled))
        self.optimizer = make_optimizer(student, self.schedule)
        self.dropout = plan.recipe.activations.dropout if plan.recipe.activations else 0.0
        self.seconds_before = 0.0

    def run(self, start: Path | None, on_step: Callable[[StepInfo], None]) -> None:
        """Train from `start`, a checkpoint, or from the beginning, to the end."""
        first = self.restore(start) if start else 0
        log = self.run_dir / LOSSES_FILE
        _keep_lines(log, first)
        began = time.perf_counter()
        for step in range(first, self.phases.total):
            if step == self.phases.tail:
                self.enter_tail()
            loss = self.step(step)
            info = self.record(step, loss, self.seconds_before + time.perf_counter() - began)
            _append(log, json.dumps({"step": info.step, "tokens": info.tokens, "loss": loss}) + "\n")
            on_step(info)
            every = self.options.checkpoint_every
            if every and info.step % every == 0 and info.step < self.phases.total:
                checkpoint.save(self.run_dir, info.step, self.student, self.optimizer)

    def step(self, step: int) -> float:
        """One optimizer step; returns the mean loss over its micro-batches."""
        schedule = self.schedule
        if self.dropout:
            on = bool(np.random.default_rng([schedule.seed, step]).random() >= self.dropout)
            switch_static(self.student, activations=on, kv_cache=on)
        set_lr(self.optimizer, self.phases.lr_factor(step, schedule.tail_lr))
        indices = batch_indices(len(self.corpus.tokens), schedule.batch_size, schedule.seed, step)
        micro_batches = self.micro_batches(indices)
        cache_values(self.student, self.dtype)
        total = torch.zeros((), device=self.accelerator.device)
        for input_ids, positions in micro_batches:
            total += self.backward(input_ids, positions, 1 / len(micro_batches))
        loss = self.accelerator.reduce(total, reduction="mean").item()
        if not math.isfinite(loss):
            last = checkpoint.latest(self.run_dir)
            kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            raise TrainingError(f"loss is {loss} at step {step + 1}: {kept}: lower schedule.lr or check the data")
        if schedule.clip:
            self.accelerator.clip_grad_norm_(self.student.parameters(), schedule.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        drop_values(self.student)
        return loss

    def micro_batches(self, indices) -> list[tuple[Tensor, Tensor]]:
        """This process's share of a batch, cut into micro-batches on the device."""
        accelerator = self.accelerator
        indices = indices[accelerator.process_index :: accelerator.num_processes]
        size = self.schedule.micro_batch or len(indices)
        parts = [indices[i : i + size] for i in range(0, len(indices), size)]

        tokens, positions = self.corpus.tokens, self.corpus.positions
        return [(_on_device(tokens[p], accelerator), _on_device(positions[p], accelerator)) for p in parts]

    def backward(self, input_ids: Tensor, positions: Tensor, weight: float) -> Tensor:
        """Loss of one micro-batch, its gradients times `weight` added to the parameters'."""
        with self.accelerator.autocast():
            with torch.no_grad():
                teacher_hidden = final_hidden(self.teacher, input_ids, positions).to(self.dtype).flatten(0, 1)
            arguments = (input_ids, positions, teacher_hidden, self.teacher_head)
            if not self.compiled:
                loss = self.distiller(*arguments) * weight
                self.accelerator.backward(loss)
                return loss.detach()
            with decoded_in_graph(self.student, self.dtype):
                loss = self.distiller(*arguments) * weight
                self.accelerator.backward(loss)
            return loss.detach()

    def enter_tail(self) -> None:
        """Freeze the codes; what goes on learning keeps its moments."""
        freeze_codes(self.student)
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


def _keep_lines(log: Path, count: int) -> None:
    """Cut a log of an interrupted run back to where its checkpoint is."""
    lines = log.read_text("utf-8").splitlines(keepends=True) if log.is_file() else []
    with new_path(log, replace=True) as temporary:
        temporary.write_text("".join(lines[:count]), "utf-8")


def _append(log: Path, line: str) -> None:
    try:
        with open(log, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise write_error(log, error) from error


def read_losses(run_dir: Path) -> list[dict[str, float]]:
    """Rows {step, tokens, loss} of a run; none if it has not begun. ConfigError for a damaged log."""
    path = Path(run_dir) / LOSSES_FILE
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.is_file() else [], 1):
        try:
            row = json.loads(line)
            rows.append({"step": int(row["step"]), "tokens": int(row["tokens"]), "loss": float(row["loss"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number}: not a line of a loss log: {error!r}: remove it or the run") from None
    return rows
