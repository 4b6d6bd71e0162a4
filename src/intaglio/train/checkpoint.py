"""Training checkpoints: safetensors and JSON, nothing pickled, each complete or absent.

Data order and learning rates are functions of the step, and training draws no other random
numbers, so parameters, buffers and optimizer moments are the whole state: a resumed run repeats the
uninterrupted one bit for bit on a CPU.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from intaglio.errors import ConfigError
from intaglio.packed.store import SafetensorsWriter, new_path, open_safetensors
from intaglio.train.latents import Latents

KEEP = 2  # the newest, and one before it in case the newest turns out to hold a diverged state


def step_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, if any."""
    found = sorted((run_dir / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def save(run_dir: Path, step: int, latents: Latents, optimizer: torch.optim.Optimizer) -> Path:
    """Write the state after `step` optimizer steps; older checkpoints but one are removed."""
    tensors = {f"latents.{name}": tensor for name, tensor in latents.state().items()}
    names = {id(parameter): name for name, parameter in latents.named_parameters()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"optimizer.{names[id(parameter)]}.{key}": value for key, value in state.items()}
    path = step_dir(run_dir, step)
    with new_path(path, replace=True) as temporary:
        temporary.mkdir()
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with SafetensorsWriter(temporary / "state.safetensors", specs, {}) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        (temporary / "meta.json").write_text(json.dumps({"step": step, "torch": torch.__version__}), "utf-8")
    for old in sorted(path.parent.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)
    return path


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
    except (ConfigError, KeyError, RuntimeError) as error:  # unreadable, other names, other shapes
        raise _damaged(path, error) from error
    latents.decode()


def _load(path: Path, latents: Latents, optimizer: torch.optim.Optimizer) -> None:
    state = latents.state()
    parameters = dict(latents.named_parameters())
    with open_safetensors(path / "state.safetensors") as file:
        for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
            kind, _, rest = name.partition(".")
            value = file.get_tensor(name)
            if kind == "latents":
                state.pop(rest).copy_(value)
            else:
                owner, _, key = rest.rpartition(".")
                parameter = parameters[owner]
                on_device = value if key == "step" and not parameter.is_cuda else value.to(parameter.device)
                optimizer.state[parameter][key] = on_device.clone()
    if state:
        raise KeyError(f"{sorted(state)[0]} is missing")
