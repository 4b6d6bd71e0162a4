"""The steps of a training run: batches, the loss and its gradients, the frozen tail, checkpoints, and the loss log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from intaglio.errors import InputError, TrainingError
from intaglio.progress import Progress, StepInfo
from intaglio.train import checkpoint
from intaglio.train.code_changes import CodeChanges
from intaglio.train.corpus import Corpus, batch_indices
from intaglio.train.latents import Latents
from intaglio.train.lesson import Teach, labels_inside
from intaglio.train.optimizer import Phases, make_optimizer, set_lr
from intaglio.train.options import Options
from intaglio.train.record import Record
from intaglio.train.sharding import (
    average_over_processes,
    is_main,
    rank,
    settle,
    sum_over_processes,
    world_size,
)
from intaglio.train.signals import deferred
from intaglio.train.static import switch_static
from intaglio.train.student import on_device

CODES_COUNTED = 100  # times in a run, at most, that changed codes are counted
HELD_OUT_TOKENS = 4096  # of the text that a run is measured on while it trains


class Session:
    """The state of one training run between its steps.

    lesson: the student with its loss. It is called with input_ids and positions [B, T], and with the output of `teach`
    for these, which is computed without gradients. held_out: windows int32 [N, T] that `options.eval_every` is for;
    InputError where they are missing.
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
        held_out: NDArray[np.int32] | None = None,
    ):
        if options.eval_every and held_out is None:
            raise InputError("eval_every is set, and there is no held-out text to measure on: give it, or leave it out")
        self.latents, self.lesson, self.teach, self.corpus = latents, lesson, teach, corpus
        self.recipe, self.schedule = latents.plan.recipe, latents.plan.recipe.schedule
        self.phases = Phases.of(self.schedule)
        self.run_dir, self.device, self.options = run_dir, device, options
        self.held_out = None if held_out is None else held_out[: max(1, HELD_OUT_TOKENS // held_out.shape[1])]
        self.changes, self.count_every = CodeChanges(latents), -(-self.phases.total // CODES_COUNTED)
        self.optimizer = make_optimizer(latents, self.schedule)
        self.dropout = self.recipe.activations.dropout if self.recipe.activations else 0.0

    def run(self, start: Path | None, progress: Progress, on_step: Callable[[StepInfo], None]) -> None:
        """Train from `start`, a checkpoint, or from the beginning, to the end.

        A signal that asks the process to end saves a checkpoint first.
        """
        first = self.restore(start) if start else 0
        self.changes.begin(self.run_dir, resumed=start is not None)
        record = Record(self.latents.plan, self.run_dir, first, self.options, progress) if is_main() else nullcontext()
        every, began = self.options.checkpoint_every, time.perf_counter()
        with record as log, deferred() as pending:
            for step in range(first, self.phases.total):
                if step == self.phases.tail:
                    self.enter_tail()
                figures = self.step(step)
                info = self.info(step, figures, time.perf_counter() - began)
                if log is not None:
                    log.add(info)
                    progress.step(info)
                    on_step(info)
                due = every and info.step % every == 0 and info.step < self.phases.total
                if due or pending.number:
                    checkpoint.save(self.run_dir, info.step, self.latents, self.optimizer)
                pending.stop()

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step; returns its figures: the mean loss over its micro-batches, and see `read_losses`."""
        schedule, every = self.schedule, self.options.eval_every
        found = {"held_out_loss": self.held_out_loss()} if every and step % every == 0 else {}
        if self.dropout:  # a function of seed and step alone, so that a resumed run draws the same
            on = bool(np.random.default_rng([schedule.seed, step]).random() >= self.dropout)
            switch_static(self.latents.model, activations=on, kv_cache=on)
        factor = self.phases.lr_factor(step, schedule.tail_lr)
        set_lr(self.optimizer, factor)
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
        counted = bool(self.changes.latents.blocks) and (step + 1) % self.count_every == 0
        before = self.changes.sample() if counted else {}
        self.optimizer.step()
        if counted:
            found |= self.changes.shares(before)
        return {"loss": loss, "lr": factor * schedule.lr} | found

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss on the held-out windows, of the model as it is; every process computes all of it."""
        assert self.held_out is not None
        if self.dropout:  # each step sets it anew
            switch_static(self.latents.model, activations=True, kv_cache=True)
        windows, size = on_device(self.held_out, self.device), self.schedule.micro_batch or self.schedule.batch_size
        total = torch.zeros((), device=self.device)
        # uncompiled: other lengths, and no gradients, would have every layer compiled anew
        with torch.compiler.set_stance("force_eager"):
            for tokens in windows.split(size):
                positions = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
                total += self.lesson(tokens, positions, *self.teach(tokens, positions)) * len(tokens)
        settle(self.latents.model)
        return total.item() / len(windows)

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

    def info(self, step: int, figures: dict[str, float], seconds: float) -> StepInfo:
        """A step with its figures, for whoever shows it."""
        tokens = (step + 1) * self.schedule.batch_size * self.schedule.sequence_length
        phase = "tail" if step >= self.phases.tail else "train"
        more = {key: value for key, value in figures.items() if key != "loss"}
        return StepInfo(step + 1, self.phases.total, figures["loss"], tokens, seconds, phase, more)
