"""Settings that change how a run is computed, and not its recipe."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from intaglio.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of how a run is computed: precision, compilation, checkpoints, logs. None of it is in the recipe.

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

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the student's weights are held, and products computed."""
        precision = self.precision or ("bf16" if torch.cuda.is_available() else "no")
        return torch.bfloat16 if precision == "bf16" else torch.float32
