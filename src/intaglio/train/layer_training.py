"""A window of layers learns to give the original's outputs, on the inputs that the quantized layers before it give.

After Li et al. 2021 (BRECQ, arXiv:2102.05426) and the first phase of Chen et al. 2024 (EfficientQAT, arXiv:2407.11062).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from intaglio.train.latents import Latents
from intaglio.train.optimizer import Phases, make_optimizer, set_lr
from intaglio.train.static import put_scales, read_scales
from intaglio.train.streams import Batch


class Training:
    """The stage "layers" of one window: AdamW over its latents, on the squared error of its outputs.

    latents: of the window's layers, whose numbers these are. starts: by batch, the window's inputs; the batches
    themselves are behind it already. learning: batches to learn from. scales: first values of static scales, by owner.
    """

    def __init__(
        self,
        latents: Latents,
        numbers: range,
        starts: dict[Batch, Tensor],
        learning: list[Batch],
        scales: dict[str, float],
    ):
        self.latents, self.numbers, self.starts, self.learning = latents, numbers, starts, learning
        self.layers = {number: latents.model.get_submodule(f"model.layers.{number}") for number in numbers}
        schedule = latents.plan.recipe.schedule
        self.schedule = replace(schedule, lr=schedule.layer_lr, clip=0.0)  # Adam's steps have one size for any loss
        if latents.plan.static_scales:
            put_scales(latents.model, latents.plan, scales)

    def run(self) -> tuple[float, float]:
        """Train, and bring the text behind the window anew; the error before and after."""
        sizes = torch.stack([self._size(batch) for batch in self.learning])
        before = torch.stack([self._missed(b, b.hidden[b.quantized].to(b.device)) for b in self.learning])
        self._train(sizes.mean())
        after = []
        for batch in self.starts:
            output = self._output(batch, keep=True)
            if batch in self.learning:
                after.append(self._missed(batch, output))
            batch.hidden[batch.quantized].copy_(output, non_blocking=True)
        return float(before.sum() / sizes.sum()), float(torch.stack(after).sum() / sizes.sum())

    def scales(self) -> dict[str, float]:
        """The static scales of the window's layers as they are now, by owner."""
        plan = self.latents.plan
        found = read_scales(self.latents.model, plan)
        return {scale.name: found[scale.name] for scale in plan.static_scales if scale.owned}

    def _train(self, size: Tensor) -> None:
        """size: mean square sum of the original's outputs in a batch, by which losses are divided."""
        schedule, learning = self.schedule, self.learning
        optimizer = make_optimizer(self.latents, schedule)
        steps = schedule.layer_epochs * len(learning)
        phases = Phases(steps, steps, max(1, int(steps * schedule.warmup)))
        for step in range(steps):
            epoch, at = divmod(step, len(learning))
            if at == 0:
                order = np.random.default_rng((schedule.seed, self.numbers[0], epoch)).permutation(len(learning))
            batch = learning[order[at]]
            set_lr(optimizer, phases.lr_factor(step, 1.0))
            with torch.enable_grad():
                (self._missed(batch, self._output(batch)) / size).backward()
            optimizer.step()

    def _output(self, batch: Batch, *, keep: bool = False) -> Tensor:
        return batch.run(self.layers, self.starts[batch][batch.quantized], batch.quantized, keep=keep)

    def _missed(self, batch: Batch, output: Tensor) -> Tensor:
        """Sum of squares of what the outputs differ by from the original's, without first tokens; float32 scalar."""
        target = batch.hidden[batch.original].to(output.device, non_blocking=True)
        return ((output.float() - target.float()).square().sum(-1) * batch.counted).sum()

    def _size(self, batch: Batch) -> Tensor:
        target = batch.hidden[batch.original].to(batch.device, non_blocking=True)
        return (target.float().square().sum(-1) * batch.counted).sum()
