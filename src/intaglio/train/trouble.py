"""Errors of a machine in training, as messages that say what to do: no memory left, other processes gone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from intaglio.errors import TrainingError
from intaglio.plan.memory import LABELS, training_memory
from intaglio.plan.plan import Plan
from intaglio.plan.units import gigabytes
from intaglio.train import checkpoint
from intaglio.train.sharding import rank, world_size

FIXES = 3  # settings that a message offers


@contextmanager
def explained(plan: Plan, run_dir: Path, device: torch.device, *, gradient_checkpointing: bool) -> Iterator[None]:
    """Raise TrainingError, with the last checkpoint, where the GPU's memory ends or the other processes are gone."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        text = memory_text(plan, memory_of(device), world_size(), gradient_checkpointing)
        raise TrainingError(f"process {rank()}: {device} has no memory left: {text}; {_kept(run_dir)}") from error
    except dist.DistError as error:
        said = str(error).strip().splitlines()[0][:200]
        raise TrainingError(
            f"process {rank()}: the exchange with the other processes failed ({said}): look for the first error among "
            f"all processes; {_kept(run_dir)}"
        ) from error


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a GPU has, or the host of a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_text(plan: Plan, available: int, gpus: int, gradient_checkpointing: bool) -> str:
    """The plan's figure beside what there is, its largest row, and settings that would take less, in bytes on a GPU."""
    if plan.model.family.drafter:
        return f"{gigabytes(available)} in all: choose a smaller schedule.micro_batch"
    planned = training_memory(plan, gpus=gpus, gradient_checkpointing=gradient_checkpointing)
    row = max(planned.at_the_peak, key=planned.at_the_peak.__getitem__)
    fixes = fixes_of(plan, gpus, gradient_checkpointing)
    fitting = [fix for fix in fixes if fix[1] <= available] or fixes
    offers = ", ".join(
        f"{name} ({gigabytes(size)}{'' if size <= available else ', still too much alone'})"
        for name, size in fitting[:FIXES]
    )
    return (
        f"`intaglio plan` counts {gigabytes(planned.total)}, and {gigabytes(available)} are there; the largest part is "
        f"{LABELS[row]}, {gigabytes(planned.rows[row])}: choose {offers or 'a GPU with more memory'}"
    )


def fixes_of(plan: Plan, gpus: int, gradient_checkpointing: bool) -> list[tuple[str, int]]:
    """Settings, each alone, and what the plan counts with it; those first that do not change what is learned."""
    schedule = plan.recipe.schedule
    found: list[tuple[str, int]] = []

    def offer(
        name: str, *, more_gpus: int = gpus, checkpointing: bool = gradient_checkpointing, **changes: object
    ) -> None:
        changed = replace(plan, recipe=plan.recipe.with_schedule(**changes)) if changes else plan
        found.append((name, training_memory(changed, gpus=more_gpus, gradient_checkpointing=checkpointing).total))

    if not gradient_checkpointing:
        offer("--gradient-checkpointing", checkpointing=True)
    sequences = schedule.micro_batch or -(-schedule.batch_size // gpus)
    if sequences > 1:
        offer("--set schedule.micro_batch=1", micro_batch=1)
    if schedule.moments == "float32":
        offer("--set schedule.moments=bfloat16", moments="bfloat16")
    if not schedule.offload_moments and schedule.moments != "int8":
        offer("--set schedule.offload_moments=true", offload_moments=True)
    if schedule.gathered:
        offer("--set schedule.gathered=false", gathered=False)
    if schedule.batch_size % (2 * gpus) == 0:
        offer(f"{2 * gpus} GPUs", more_gpus=2 * gpus)
    now = training_memory(plan, gpus=gpus, gradient_checkpointing=gradient_checkpointing).total
    return [fix for fix in found if fix[1] < now]


def _kept(run_dir: Path) -> str:
    last = checkpoint.latest(run_dir)
    if last is None:
        return "there is no checkpoint yet"
    return f"the last checkpoint is {last}: --resume goes on from it with the same recipe, on any number of GPUs"
