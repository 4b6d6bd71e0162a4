"""The steps of a training run: batches, the loss and its gradients, the frozen tail, checkpoints, and the loss log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.tracking import TensorBoardTracker
from numpy.typing import NDArray
from torch import Tensor, nn

from intaglio.errors import TrainingError
from intaglio.progress import Progress, StepInfo
from intaglio.train import checkpoint
from intaglio.train.corpus import Corpus, batch_indices
from intaglio.train.latents import Latents
from intaglio.train.lesson import Teach, labels_inside
from intaglio.train.optimizer import Phases, make_optimizer, set_lr
from intaglio.train.options import Options
from intaglio.train.run_folder import LOSSES_FILE, append_line, keep_lines
from intaglio.train.sharding import (
    average_over_processes,
    is_main,
    rank,
    sum_over_processes,
    world_size,
)
from intaglio.train.signals import deferred
from intaglio.train.static import switch_static
from intaglio.train.student import on_device


class Session:
    """The state of one training run between its steps.

    lesson: the student with its loss. It is called with input_ids and positions [B, T], and with the output of `teach`
    for these, which is computed without gradients.
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
        if self.dropout:  # a function of seed and step alone, so that a resumed run draws the same
            on = bool(np.random.default_rng([schedule.seed, step]).random() >= self.dropout)
            switch_static(self.latents.model, activations=on, kv_cache=on)
        set_lr(self.optimizer, self.phases.lr_factor(step, schedule.tail_lr))
        indices = batch_indices(len(self.corpus.tokens), schedule.batch_size, schedule.seed, step)
        micro_batches = self.micro_batches(indices)
        total = torch.zeros((), device=self.device)  # read once a step: a GPU runs ahead until then
        for micro_batch, weight in zip(micro_batches, self.weights(micro_batches), strict=True):
            total += self.backward(*micro_batch, weight)
        average_over_processes([total])  # all see one loss, and so stop at the same NaN
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
        # the mask marks labels, and the logits of a label are those of the place before it
        labels = torch.from_numpy(rows.loss_mask).to(self.device).roll(-1, 1)
        return tokens, positions, labels & labels_inside(positions)

    def weights(self, micro_batches: list[tuple[Tensor, Tensor, Tensor | None]]) -> list[Any]:
        """Share of each micro-batch in the mean over all tokens that count, on all processes together."""
        counts = [counted.sum().float() for _, _, counted in micro_batches if counted is not None]
        if not counts:
            return [1 / len(micro_batches)] * len(micro_batches)
        total = sum_over_processes(torch.stack(counts).sum()).clamp_min(1)
        return [count * world_size() / total for count in counts]  # gradients are averaged, so a share counts more

    def backward(self, input_ids: Tensor, positions: Tensor, counted: Tensor | None, weight: Any) -> Tensor:
        """Loss of one micro-batch, its gradients times `weight` added to the weights'."""
        with torch.no_grad():
            taught = self.teach(input_ids, positions)
        # no keyword without a mask: a drafter's lesson has none
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
        if step > self.phases.tail:  # a checkpoint at the first step of the tail was saved before codes froze
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
