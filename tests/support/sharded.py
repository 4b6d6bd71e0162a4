"""A short training that tests start in several processes: `torchrun -m tests.support.sharded OUT RECIPE STOP`.

RECIPE `experts` is q4_0 for a mixture of experts.
"{rank}" in an argument is the process's number; the override "corpus=N" is the seed of the text.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from intaglio.progress import StepInfo
from intaglio.train.loop import train
from intaglio.train.options import Options
from intaglio.train.pack import pack_model
from tests.support.training import SMALL, SMALL_MOE, moe, small_corpus, small_model, small_plan

SCHEDULE = {
    "tokens": 512, "batch_size": 4, "sequence_length": 16, "lr": 1e-5, "scale_lr": 1e-4, "float_lr": 1,
    "embedding_lr": 1, "frozen_tail": 0.4,
}  # fmt: skip
OPTIONS = Options(precision="no", compiled=False, checkpoint_every=3, eval_every=3, track=("tensorboard",))


def run(out: Path, recipe: str, stop: int, *overrides: str) -> None:
    """Train into OUT/run, or go on there, and pack into OUT/packed. stop: the step after which the process dies."""
    torch.set_num_threads(1)
    experts, rank = recipe == "experts", os.environ.get("RANK", "0")
    out, overrides = Path(str(out).format(rank=rank)), tuple(override.format(rank=rank) for override in overrides)
    seed = sum(int(value.removeprefix("corpus=")) for value in overrides if value.startswith("corpus="))
    overrides = tuple(override for override in overrides if not override.startswith("corpus="))
    settings = (*(f"schedule.{key}={value}" for key, value in SCHEDULE.items()), *overrides)
    plan = small_plan(*settings, recipe="q4_0" if experts else recipe, config=SMALL_MOE if experts else SMALL)

    def on_step(info: StepInfo) -> None:
        if info.step == stop:
            os._exit(0)

    resume = (out / "run").exists()
    original, corpus = moe() if experts else small_model(), small_corpus(seed=seed)
    how = {"options": OPTIONS, "resume": resume, "on_step": on_step, "held_out": small_corpus(6, seed=9).tokens}
    latents = train(original, plan, corpus, out / "run", **how)  # type: ignore[arg-type]
    (out / "assets").mkdir(exist_ok=True)
    pack_model(latents, out / "packed", assets=out / "assets")


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
