"""Memory of a training step on one GPU of many, without a GPU: the trainer's own code on tensors that have no values.

    python benchmarks/simulate_ranks.py --out benchmarks/results/simulate_ranks.json   # minutes a cell on two cores
    python benchmarks/simulate_ranks.py 31b:4:2048:checkpointing --gpus 64

Rank 0 of a fake process group builds teacher, student, latents and optimizer, and takes a step under FakeTensorMode.
Every storage is counted from its allocation to its end. What a GPU compiles into one kernel counts with its results alone.
A case is model:sequences on each GPU:tokens, then `checkpointing` or not; `plan` is compared with each. A cell that --out
holds already is not simulated again, so the command goes on where it was stopped; after a change remove the file.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import scale_step
import torch
import torch.distributed as dist
from common import environment, write_result
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools import fake_collectives  # noqa: F401  collectives on tensors without values
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from intaglio.numerics import grid
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.plan.bundled import bundled_config
from intaglio.plan.family import text_config
from intaglio.plan.memory import TrainingMemory, training_memory
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train import distill, fused, latent, latents, sharding
from intaglio.train.layers import set_layers
from intaglio.train.lesson import Distiller, Teacher
from intaglio.train.optimizer import make_optimizer
from intaglio.train.sharding import local

CASES = (
    "e2b:4:2048",
    "e4b:4:2048:checkpointing",
    "12b:4:2048:checkpointing",
    "26b-a4b:4:2048:checkpointing",
    "31b:4:2048:checkpointing",
)
CPU = torch.device("cpu")


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that exist, `now` and at most (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.inside = 0  # kernels that a GPU runs as one
        self.sizes: dict[int, tuple[Any, int]] = {}
        self.resize = torch.UntypedStorage.resize_

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.note, out)
        return out

    def note(self, tensor: Tensor) -> None:
        """Count the storage behind a tensor, unless it is known or has no memory."""
        if tensor.device.type == "meta" or hasattr(tensor, "_local_tensor"):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = (weakref.ref(storage, lambda _: self.count(key, None)), 0)
            self.count(key, storage.nbytes())

    def count(self, key: int, size: int | None) -> None:
        """A known storage now has this size; None: it is gone."""
        reference, before = self.sizes.pop(key)
        self.now += (size or 0) - before
        if size is not None:
            self.sizes[key] = (reference, size)
        self.see()

    def see(self) -> None:
        if not self.inside:
            self.peak = max(self.peak, self.now)

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        """FSDP2 frees and fills the storages of gathered weights."""
        self.resize(storage, size)
        if storage._cdata in self.sizes:
            self.count(storage._cdata, size)

    def as_one(self, function: Callable) -> Callable:
        """A function whose temporaries do not count."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.inside -= 1
                self.see()

        return run


def unfitted(values: Tensor, on: BlockGrid) -> Quantized:
    """Codes and scales of the right shapes, without a fit."""
    lead, columns = values.shape[:-1], values.shape[-1]
    scale = torch.empty(*lead, columns // (on.block_size or columns), dtype=on.scale_dtype)
    supers = None if on.super_block is None else torch.empty(*lead, columns // on.super_block, dtype=torch.half)
    return Quantized(on, torch.empty(values.shape, dtype=torch.int8), scale, supers)


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """Rank 0 of `count` processes that do not exist."""
    if count > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        if count > 1:
            dist.destroy_process_group()


def really(build: Callable, once: bool = False) -> Callable:
    """A context (or, `once`, a call) in which tensors on the meta device are torch's own: a model is moved from these."""

    @contextmanager
    def within(*args: Any, **kwargs: Any) -> Iterator[None]:
        with unset_fake_temporarily(), build(*args, **kwargs):
            yield

    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return build(*args, **kwargs)

    return call if once else within


@contextmanager
def without_values() -> Iterator[LiveBytes]:
    """Tensors without values, counted; checks of values are left out, and sizes that depend on a GPU are its own."""
    live = LiveBytes()
    on_gpu = {
        (distill, "_chunk_tokens"): lambda hidden, head: max(
            distill.GPU_CHUNK_TOKENS, distill.GPU_CHUNK_LOGITS // head.shape[0]
        ),
        (distill, "_kernel"): lambda function, softcaps, compiled: live.as_one(lambda *a: function(*softcaps, *a)),
        (fused, "_kernel"): lambda function, *tensors: live.as_one(function),
        (latent, "in_chunks"): lambda kernel, *tensors: live.as_one(kernel)(*tensors),
        (latents, "check_finite"): lambda *_: None,
        (grid, "_cheaply_known_at_least"): lambda *_: False,
        (scale_step, "init_empty_weights"): really(scale_step.init_empty_weights),
        (sharding, "init_empty_weights"): really(sharding.init_empty_weights),
        (scale_step, "shard"): really(sharding.shard, once=True),
        (sharding, "shard"): really(sharding.shard, once=True),
        (torch.UntypedStorage, "resize_"): lambda storage, size: live.resized(storage, size),
    }
    with ExitStack() as stack:
        for (owner, name), value in on_gpu.items():
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(live)


def bytes_of(tensors: Any) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)


def measure(plan: Plan, sequences: int, tokens: int, checkpointing: bool) -> dict[str, int]:
    """Bytes on rank 0: what is always there by row, at most in a forward and backward and in an optimizer step."""
    with without_values() as live, ExitStack() as stack:

        def build(*_: Any) -> Any:
            return scale_step.random_model(plan.model.config, CPU, torch.bfloat16)

        original = build()
        found = {"teacher": live.now}
        stack.enter_context(patch.object(scale_step, "deepcopy", build))  # a copy of a tensor without values is none
        held = latents.prepare(scale_step.plain_student(original, plan), plan, fit=unfitted)
        held.still.clear()  # on the host
        for block in held.blocks.values():
            block._scales = None  # only a CPU keeps them
        gc.collect()
        masters = [master.latent for master in held.trained.values()]
        found["student"] = bytes_of({id(p): p for p in (*held.model.parameters(), *held.model.buffers())}.values())
        found["masters"] = bytes_of(masters)
        found["scales"] = live.now - sum(found.values())
        optimizer: Any = make_optimizer(held, plan.recipe.schedule, fused=True)
        set_layers(held.model, checkpointing=checkpointing)
        lesson, teach = Distiller(held.model, 30.0, True), Teacher(original, torch.bfloat16)
        optimizer.make_buckets()
        gc.collect()
        before = live.peak = live.now
        found["optimizer"] = before - sum(found.values())
        learn(lesson, teach, sequences, tokens)
        found["learning"], live.peak = live.peak - before, live.now
        optimizer.step()
        found["stepping"] = live.peak - before
        found["total"] = before + max(found["learning"], found["stepping"])
    return found


def learn(lesson: Distiller, teach: Teacher, sequences: int, tokens: int) -> None:
    """One forward and backward."""
    ids = torch.zeros(sequences, tokens, dtype=torch.long)
    positions = torch.arange(tokens).expand(sequences, -1)
    with torch.no_grad():
        taught = teach(ids, positions)
    lesson(ids, positions, *taught).backward()


def compare(found: dict[str, int], planned: TrainingMemory) -> dict[str, list[int]]:
    """Found and planned bytes by row."""
    rows = planned.rows | {"total": planned.total}
    rows["learning"] = rows["gathered"] + rows["activations"] + rows["loss"]
    rows["stepping"] = rows["gradients"]
    return {name: [size, rows[name]] for name, size in found.items()}


def simulate(case: str, gpus: int, known: dict[str, int] | None) -> dict[str, Any]:
    """One case on one number of GPUs. known: what was found before."""
    model, sequences, tokens, *flags = case.split(":")
    config = bundled_config(f"gemma-4-{model}") if "/" not in model else model
    schedule = [f"schedule.batch_size={int(sequences) * gpus}", f"schedule.sequence_length={tokens}"]
    plan = make_plan(text_config(config) if isinstance(config, dict) else config, Recipe.load("q4_0", schedule))
    planned = training_memory(
        plan, gpus=gpus, gradient_checkpointing="checkpointing" in flags, compiled="compiled" in flags
    )
    with fake_ranks(1 if known else gpus):
        found = known or measure(plan, int(sequences), int(tokens), "checkpointing" in flags)
    rows = compare(found, planned)
    print(f"{case} on {gpus}: {found['total'] / 1e9:.1f} GB, planned {planned.total / 1e9:.1f}", flush=True)
    for name, (size, expected) in rows.items():
        print(f"  {name:10} {size / 1e9:8.2f} {expected / 1e9:8.2f}  {expected / max(size, 1) - 1:+.1%}", flush=True)
    return {"case": case, "gpus": gpus, "found_and_planned": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    before = json.loads(arguments.out.read_text())["rows"] if arguments.out and arguments.out.is_file() else []
    known = {
        (row["case"], row["gpus"]): {name: found for name, (found, _) in row["found_and_planned"].items()}
        for row in before
    }
    rows = []
    for cell in dict.fromkeys([*known, *itertools.product(arguments.cases, arguments.gpus)]):
        rows.append(simulate(*cell, known.get(cell)))
        if arguments.out is not None and len(rows) >= len(known):
            write_result(arguments.out, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
