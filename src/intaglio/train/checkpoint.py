"""Training checkpoints: safetensors and JSON, nothing pickled, each complete or absent.

Data order and learning rates are functions of the step, and training draws no other random
numbers, so parameters, buffers and optimizer moments are the whole state: a resumed run repeats the
uninterrupted one bit for bit on a CPU.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from intaglio.errors import ConfigError
from intaglio.packed.hashes import Hashes
from intaglio.packed.store import (
    SAFETENSORS_DTYPES,
    SafetensorsReader,
    SafetensorsWriter,
    Specs,
    headers,
    new_path,
)
from intaglio.plan.files import read_json, reading, whole_number

NAME = re.compile(r"step-\d{8,}")
REMEDY = "remove it to resume from the one before"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
KEEP = 2  # the newest, and one before it in case the newest turns out to hold a diverged state


def step_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, if any."""
    found = _checkpoints(run_dir / "checkpoints")
    return found[-1] if found else None


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints from the oldest on; anything else in the folder is no checkpoint."""
    found = folder.glob("step-*") if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and NAME.fullmatch(path.name))


def save(run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Write the state after `step` optimizer steps; older checkpoints but one are removed."""
    tensors = {f"model.{n}": t for n, t in _state(model).items()}
    names = {id(p): n for n, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"optimizer.{names[id(parameter)]}.{key}": value for key, value in state.items()}
    path = step_dir(run_dir, step)
    with new_path(path, replace=True, internal=True) as temporary:
        temporary.mkdir()
        write_state(temporary / "state.safetensors", tensors)
        (temporary / "meta.json").write_text(json.dumps({"step": step, "torch": torch.__version__}), "utf-8")
    for old in _checkpoints(path.parent)[:-KEEP]:
        shutil.rmtree(old)
    return path


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters once each (tied ones are one) and persistent buffers."""
    buffers = {
        n: b for n, b in model.state_dict().items() if n not in dict(model.named_parameters(remove_duplicate=False))
    }
    return dict(model.named_parameters()) | buffers


def read_step(path: Path) -> int:
    """How many steps a checkpoint has behind it. ConfigError if it is damaged."""
    with reading(path, "damaged checkpoint", REMEDY):
        step = int(path.name.removeprefix("step-"))
        return whole_number(read_json(path / "meta.json", limit=1 << 16), "step", least=step, most=step)


def write_state(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a safetensors file with the SHA-256 of each."""
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, specs, {}, hashed=True) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def read_state(path: Path, expected: Specs, optional: Specs | None = None) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file that `write_state` wrote, one at a time, on the CPU.

    expected: dtype and shape by name of what must be there; optional: of what may be. All names, dtypes, shapes and
    hashes are compared before the first tensor is given. ConfigError names what is missing, unknown or different.
    """
    known, found = expected | (optional or {}), headers(path)
    for name in (*expected, *found):
        if name not in found:
            raise ConfigError(f"{path}: {name} is missing")
        if name not in known:
            raise ConfigError(f"{path}: {name} is not of this run")
        dtype, shape = known[name]
        if found[name] != (SAFETENSORS_DTYPES[dtype], tuple(shape)):
            is_now = f"{found[name][0]} {list(found[name][1])}"
            raise ConfigError(f"{path}: {name} is {is_now}, expected {SAFETENSORS_DTYPES[dtype]} {list(shape)}")
    hashes = Hashes(path)
    if hashes.digests.keys() != found.keys():
        raise ConfigError(f"{path}: has hashes of other tensors than it holds")
    hashes.check_all()
    return _tensors(path)


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with SafetensorsReader(path) as file:
        for name in headers(path):
            yield name, file.read(name)


def _damaged(path: Path, error: object) -> ConfigError:
    return ConfigError(f"{path}: damaged checkpoint: {error}: {REMEDY}")


@torch.no_grad()
def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore model and optimizer in place.

    The model must be in the phase of the checkpoint (codes frozen or not) and the optimizer made
    for it.
    """
    try:
        _load(path, model, optimizer)
    except (ConfigError, KeyError, RuntimeError) as error:  # unreadable, other names, other shapes
        raise _damaged(path, error) from error


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state, parameters = _state(model), dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    trained = {names[id(parameter)]: parameter for group in optimizer.param_groups for parameter in group["params"]}
    expected = {f"model.{name}": (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    moments: Specs = {}
    for name, parameter in trained.items():
        moments[f"optimizer.{name}.step"] = (torch.float32, ())
        for key in MOMENTS:  # a parameter without a gradient so far has none
            moments[f"optimizer.{name}.{key}"] = (parameter.dtype, tuple(parameter.shape))
    file = path / "state.safetensors"
    stored = headers(file)
    for name in trained:
        there = [f"optimizer.{name}.{key}" in stored for key in ("step", *MOMENTS)]
        if any(there) and not all(there):
            raise ConfigError(f"{file}: optimizer.{name} has some moments only")
    for name, value in read_state(file, expected, moments):
        kind, _, rest = name.partition(".")
        if kind == "model":
            state[rest].copy_(value)
            continue
        owner, _, key = rest.rpartition(".")
        parameter = parameters[owner]
        on_device = value if key == "step" and not parameter.is_cuda else value.to(parameter.device)
        optimizer.state[parameter][key] = on_device.clone()
