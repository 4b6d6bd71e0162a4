"""Three steps of training whose layers run one way or another: `torchrun -m tests.support.layers OUT`.

OUT receives the losses of plain layers and of layers that are recomputed and compiled, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from intaglio.train.layers import set_layers
from intaglio.train.lesson import Distiller, Teacher
from intaglio.train.optimizer import make_optimizer
from intaglio.train.sharding import average_over_processes, is_main, local, rank, shard, start_processes, world_size
from intaglio.train.student import build_student
from tests.support.training import SMALL, small_corpus, small_model, small_plan


def train(
    config: dict[str, Any] = SMALL, *, checkpointing: bool = False, compiled: bool = False
) -> tuple[list[float], int]:
    """Losses of three steps, and the bytes that autograd keeps of a forward beside the model's weights."""
    torch.set_num_threads(1)
    device = start_processes()
    plan, original, corpus = small_plan("schedule.lr=1e-4", config=config), small_model(config), small_corpus()
    if world_size() > 1:
        shard(original, device)  # type: ignore[arg-type]
    latents = build_student(original, plan)  # type: ignore[arg-type]
    set_layers(latents.model, checkpointing=checkpointing, compiled=compiled, backend="aot_eager")
    lesson, teach = Distiller(latents.model, 30.0, False), Teacher(original, torch.float32)  # type: ignore[arg-type]
    optimizer = make_optimizer(latents, plan.recipe.schedule)
    kept = {local(p).untyped_storage().data_ptr(): 0 for p in latents.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    losses = []
    for step in range(3):
        rows = corpus.rows(np.arange(4 * step, 4 * step + 4)[rank() :: world_size()])
        ids, positions = (torch.from_numpy(array).long() for array in (rows.tokens, rows.positions))
        with torch.no_grad():
            taught = teach(ids, positions)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = lesson(ids, positions, *taught)
        loss.backward()
        mean = loss.detach().clone()
        average_over_processes([mean])
        losses.append(mean.item())
        optimizer.step()
    return losses, sum(kept.values()) // 3


if __name__ == "__main__":
    found = [train()[0], train(checkpointing=True, compiled=True)[0]]
    if is_main():
        Path(sys.argv[1]).write_text(json.dumps(found))
