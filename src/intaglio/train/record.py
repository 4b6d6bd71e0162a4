"""What training writes down of each step: losses.jsonl and speed.jsonl in the run's folder, and trackers.

losses.jsonl depends on model, recipe, text and seed alone. A resumed run cuts it back to its checkpoint, and on a CPU
repeats it bit for bit. speed.jsonl says what the machine did: a row a step, also for a step that is done again.
"""

from __future__ import annotations

import json
import time
import tomllib
from pathlib import Path

import torch

from intaglio.plan.memory import training_memory
from intaglio.plan.plan import Plan
from intaglio.progress import Progress, StepInfo, host_peak_bytes
from intaglio.train.options import Options
from intaglio.train.run_folder import LOSSES_FILE, SPEED_FILE, append_line, flat, keep_lines
from intaglio.train.sharding import world_size
from intaglio.train.trackers import Trackers


class Record:
    """The logs and trackers of a run in its main process, as a context that ends the trackers.

    first: steps that a checkpoint holds; the log of a cut run is cut back to them.
    """

    def __init__(self, plan: Plan, run_dir: Path, first: int, options: Options, progress: Progress):
        self.losses, self.speed = run_dir / LOSSES_FILE, run_dir / SPEED_FILE
        keep_lines(self.losses, first)
        self.step_tokens = plan.recipe.schedule.batch_size * plan.recipe.schedule.sequence_length
        self.planned_bytes = planned_bytes(plan, options)
        config = flat(tomllib.loads(plan.recipe.to_toml())) | {"plan": plan.digest}
        self.trackers = Trackers(options.track, run_dir, config, progress.note)

    def __enter__(self) -> Record:
        self.trackers.__enter__()
        self.last = time.perf_counter()
        return self

    def __exit__(self, *rest: object) -> None:
        self.trackers.__exit__(*rest)

    def add(self, info: StepInfo) -> None:
        """Write the rows of a step, and tell the trackers.

        Bytes of memory are those at the peak so far, on the host and on the main process's GPU; `planned_bytes` is
        what `intaglio plan` counts for that GPU.
        """
        row = {"step": info.step, "tokens": info.tokens, "loss": info.loss, **info.figures}
        append_line(self.losses, json.dumps(row) + "\n")
        before, self.last = self.last, time.perf_counter()
        speed = {"tokens_per_s": self.step_tokens / (self.last - before), "host_bytes": host_peak_bytes()}
        if torch.cuda.is_available():
            speed |= {"gpu_bytes": torch.cuda.max_memory_allocated(), "planned_bytes": self.planned_bytes}
        append_line(self.speed, json.dumps({"step": info.step, "time": time.time(), **speed}) + "\n")
        self.trackers.log({key: value for key, value in (row | speed).items() if key != "step"}, info.step)


def planned_bytes(plan: Plan, options: Options) -> int:
    """Memory of training on each GPU as `intaglio plan` counts it; 0 for drafters, whose target it does not know."""
    if plan.model.family.drafter:
        return 0
    checkpointing, compiled = options.gradient_checkpointing, options.compiled is not False
    return training_memory(plan, gpus=world_size(), gradient_checkpointing=checkpointing, compiled=compiled).total
