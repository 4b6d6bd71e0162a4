"""Settings that change how a run is computed, and not its recipe."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from intaglio.errors import InputError
from intaglio.train.trackers import check_trackers


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of how a run is computed: precision, compilation, checkpoints, logs. None of it is in the recipe.

    precision: "bf16" to hold the student's weights and compute in bfloat16, "no" for float32; None picks bf16 on a GPU.
        Latents are float32 either way.
    compiled: compile the loss with torch.compile, and on a GPU decoder layers too; None does so on a GPU.
    checkpoint_every: optimizer steps between checkpoints; 0 for none.
    eval_every: optimizer steps between measurements of the loss on held-out text, which begin before the first; 0 for
        none.
    track: trackers that are told of every step: "wandb", "trackio", "tensorboard" (in the run folder), "mlflow".
    gradient_checkpointing: recompute decoder layers in the backward.
    """

    precision: str | None = None
    compiled: bool | None = None
    checkpoint_every: int = 0
    eval_every: int = 0
    track: tuple[str, ...] = ()
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.precision not in (None, "bf16", "no"):
            raise InputError(f"precision {self.precision!r}: expected bf16 or no")
        for name in ("checkpoint_every", "eval_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} = {getattr(self, name)}: expected 0 or more")
        check_trackers(self.track)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the student's weights are held, and products computed."""
        precision = self.precision or ("bf16" if torch.cuda.is_available() else "no")
        return torch.bfloat16 if precision == "bf16" else torch.float32
