"""Training checkpoints: safetensors and JSON, nothing pickled, each complete or absent.

Data order and learning rates are functions of the step, and training draws no other random numbers, so latents and
optimizer moments are the whole state: a resumed run repeats the uninterrupted one bit for bit on a CPU. Each process
writes its own rows; any number of processes can go on from them.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from intaglio.errors import ConfigError
from intaglio.packed.store import SafetensorsWriter, new_path, open_safetensors
from intaglio.train.latents import Latents
from intaglio.train.sharding import from_main, is_main, wait_for_all, world_size

FIRST_ROWS = "first_rows"  # key of a file's metadata: where the rows of each shard begin in the whole tensor
KEEP = 2  # the newest, and one before it in case the newest turns out to hold a diverged state


def step_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, if any."""
    found = sorted((run_dir / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def save(run_dir: Path, step: int, latents: Latents, optimizer: torch.optim.Optimizer) -> Path:
    """Write the state after `step` optimizer steps; older checkpoints but one are removed.

    Of several processes all must call this: each writes the rows that it owns into a file of its own.
    """
    own, first_rows = _own_state(latents, optimizer)
    path = step_dir(run_dir, step)
    with ExitStack() as stack:
        temporary = stack.enter_context(new_path(path, replace=True)) if is_main() else None
        if temporary is not None:
            temporary.mkdir()
        folder = from_main(temporary)
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in own.items()}
        with SafetensorsWriter(folder / _file_name(), specs, {FIRST_ROWS: json.dumps(first_rows)}) as writer:
            for name, tensor in own.items():
                writer.write(name, tensor)
        wait_for_all()
        if temporary is not None:
            (temporary / "meta.json").write_text(json.dumps({"step": step, "torch": torch.__version__}), "utf-8")
    if is_main():
        for old in sorted(path.parent.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old)
    wait_for_all()
    return path


def _file_name() -> str:
    if world_size() == 1:
        return "state.safetensors"
    return f"state-{dist.get_rank() + 1:05d}-of-{world_size():05d}.safetensors"


def _own_state(latents: Latents, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors that this process writes, by name, and the first row of those that are a shard.

    Tensors that all processes have alike are the main one's to write.
    """
    tensors = {f"latents.{name}": (name, tensor) for name, tensor in latents.state().items()}
    names = {id(parameter): name for name, parameter in latents.named_parameters()}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        tensors |= {f"optimizer.{name}.{key}": (name, value) for key, value in state.items()}
    first_rows = latents.first_rows()
    shards = {key: first_rows[name] for key, (name, tensor) in tensors.items() if tensor.ndim and name in first_rows}
    own = {key: tensor for key, (_, tensor) in tensors.items() if key in shards or is_main()}
    return own, shards


def read_step(path: Path) -> int:
    """How many steps a checkpoint has behind it. ConfigError if it is damaged."""
    try:
        meta: dict[str, Any] = json.loads((path / "meta.json").read_text("utf-8"))
        return int(meta["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: object) -> ConfigError:
    return ConfigError(f"{path}: damaged checkpoint: {error}: remove it to resume from the one before")


@torch.no_grad()
def load(path: Path, latents: Latents, optimizer: torch.optim.Optimizer) -> None:
    """Restore latents, what they decode to, and the optimizer, in place.

    The latents must be in the phase of the checkpoint (codes frozen or not) and the optimizer made for it.
    """
    try:
        _load(path, latents, optimizer)
    except (
        ConfigError,
        KeyError,
        RuntimeError,
        ValueError,
        TypeError,
        SafetensorError,
    ) as error:  # unreadable, other names, other shapes
        raise _damaged(path, error) from error
    latents.decode()


def _load(path: Path, latents: Latents, optimizer: torch.optim.Optimizer) -> None:
    parameters, first_rows = dict(latents.named_parameters()), latents.first_rows()
    with ExitStack() as stack:
        stored = _Stored(
            [stack.enter_context(open_safetensors(file)) for file in sorted(path.glob("state*.safetensors"))]
        )
        for name, tensor in latents.state().items():
            tensor.copy_(stored.take(f"latents.{name}", tensor, first_rows.get(name)))
        for name, parameter in parameters.items():
            row = first_rows.get(name)
            if f"optimizer.{name}.exp_avg" not in stored.parts:
                continue  # it has not been trained yet
            moments = {key: stored.take(f"optimizer.{name}.{key}", parameter, row) for key in ("exp_avg", "exp_avg_sq")}
            step = stored.take(f"optimizer.{name}.step", torch.zeros(()), None)
            on_device = {key: value.to(parameter.device) for key, value in moments.items()}
            optimizer.state[parameter] = {"step": step.to(parameter.device) if parameter.is_cuda else step} | on_device
        if stored.parts:
            raise KeyError(f"{min(stored.parts)} is not part of this training")


class _Stored:
    """The tensors of a checkpoint, whichever number of processes wrote it."""

    def __init__(self, files: list[Any]):
        if not files:
            raise KeyError("state.safetensors is missing")
        self.parts: dict[str, list[tuple[int, Any]]] = {}  # by name: first row and file of each part
        for file in files:
            first_rows = json.loads((file.metadata() or {}).get(FIRST_ROWS, "{}"))
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                self.parts.setdefault(name, []).append((int(first_rows.get(name, 0)), file))

    def take(self, name: str, like: Tensor, first: int | None) -> Tensor:
        """A stored tensor, or a shard's rows from `first` on; KeyError if shape or dtype are not those of `like`."""
        parts = sorted(self.parts.pop(name), key=lambda part: part[0])
        if not like.ndim:
            value = parts[0][1].get_tensor(name)
        elif first is None:
            value = torch.cat([file.get_tensor(name) for _, file in parts])
        else:
            value = torch.cat([_overlap(file, name, row, first, first + len(like)) for row, file in parts])
        if value.shape != like.shape or value.dtype != like.dtype:
            found, wanted = f"{value.dtype} {list(value.shape)}", f"{like.dtype} {list(like.shape)}"
            raise KeyError(f"{name} is {found}, expected {wanted}")
        return value


def _overlap(file: Any, name: str, row: int, first: int, stop: int) -> Tensor:
    """Those rows of a part, which begins at `row` of the whole, that lie in first .. stop."""
    part = file.get_slice(name)
    return part[max(first - row, 0) : max(min(stop - row, part.get_shape()[0]), 0)]
