"""Training checkpoints: safetensors and JSON, nothing pickled, each complete or absent.

Data order and learning rates are functions of the step, and training draws no other random numbers, so latents and
optimizer moments are the whole state: a resumed run repeats the uninterrupted one bit for bit on a CPU. Moments in 8
bits are written as the float32 values that they stand for, and are rounded once more when they are read: their blocks
do not end where rows do. Each process writes its own rows; any number of processes can go on from them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from intaglio.errors import ConfigError
from intaglio.packed.hashes import Hashes
from intaglio.packed.store import SAFETENSORS_DTYPES, SafetensorsWriter, Specs, headers, new_path, open_safetensors
from intaglio.plan.files import read_json, reading, whole_number
from intaglio.train.grid_optimizer import GridOptimizer
from intaglio.train.latents import Latents
from intaglio.train.lean import MOMENTS, plain
from intaglio.train.sharding import from_main, is_main, rank, wait_for_all, world_size

FIRST_ROWS = "first_rows"  # key of a file's metadata: where the rows of each shard begin in the whole tensor
NAME = re.compile(r"step-\d{8,}")
REMEDY = "remove it to resume from the one before"
KEEP = 2  # the newest, and one before it in case the newest turns out to hold a diverged state


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, if any."""
    found = _checkpoints(run_dir / "checkpoints")
    return found[-1] if found else None


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints from the oldest on; anything else in the folder is no checkpoint."""
    found = folder.glob("step-*") if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and NAME.fullmatch(path.name))


def save(run_dir: Path, step: int, latents: Latents, optimizer: torch.optim.Optimizer) -> Path:
    """Write the state after `step` optimizer steps; older checkpoints but one are removed.

    Of several processes all must call this: each writes the rows that it owns into a file of its own.
    """
    own, first_rows = _own_state(latents, optimizer)
    path = run_dir / "checkpoints" / f"step-{step:08d}"
    with ExitStack() as stack:
        temporary = stack.enter_context(new_path(path, replace=True, internal=True)) if is_main() else None
        if temporary is not None:
            temporary.mkdir()
        folder = from_main(temporary)
        number = f"-{rank() + 1:05d}-of-{world_size():05d}" if world_size() > 1 else ""
        write_state(folder / f"state{number}.safetensors", own, {FIRST_ROWS: json.dumps(first_rows)})
        wait_for_all()
        if temporary is not None:
            (temporary / "meta.json").write_text(json.dumps({"step": step, "torch": torch.__version__}), "utf-8")
    for old in _checkpoints(path.parent)[:-KEEP] if is_main() else ():
        shutil.rmtree(old)
    wait_for_all()
    return path


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


def write_state(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors into a safetensors file with the SHA-256 of each."""
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, specs, dict(metadata or {}), hashed=True) as writer:
        for name, tensor in tensors.items():
            writer.write(name, plain(tensor))


def read_step(path: Path) -> int:
    """Number of steps before a checkpoint. Raises ConfigError if it is damaged."""
    try:
        step = int(path.name.removeprefix("step-"))
        return whole_number(read_json(path / "meta.json", limit=1 << 16), "step", least=step, most=step)
    except (ConfigError, ValueError) as error:
        raise _damaged(path, error) from error


def read_state(
    files: Path | Sequence[Path],
    expected: Specs,
    optional: Specs | None = None,
    first_rows: Mapping[str, int] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of files that `write_state` wrote, one at a time, on the CPU.

    expected: dtype and shape by name of what must be there; optional: of what may be. first_rows: of a tensor of which
    only some rows are wanted, the first; the files may hold it in other parts. All names, dtypes, shapes and hashes
    are compared before the first tensor is given. ConfigError names what is missing, unknown or different.
    """
    files = [files] if isinstance(files, Path) else list(files)
    known, first_rows, parts = expected | (optional or {}), first_rows or {}, _parts(files)
    for name in (*expected, *parts):
        if name not in parts:
            raise ConfigError(f"{files[0]}: {name} is missing")
        if name not in known:
            raise ConfigError(f"{files[0]}: {name} is not of this run")
        _check_part(files[0], name, parts[name], known[name], first_rows.get(name))
    for file in files:
        hashes = Hashes(file)
        if hashes.digests.keys() != headers(file).keys():
            raise ConfigError(f"{file}: has hashes of other tensors than it holds")
        hashes.check_all()
    return _tensors(parts, known, first_rows)


Part = tuple[int, Path, str, tuple[int, ...]]  # first row, file, dtype and shape of a part of a tensor


def _parts(files: Sequence[Path]) -> dict[str, list[Part]]:
    """The parts of each tensor, in the order of their rows."""
    parts: dict[str, list[Part]] = {}
    for path in files:
        with open_safetensors(path) as file, reading(path, "damaged header", REMEDY):
            rows = json.loads((file.metadata() or {}).get(FIRST_ROWS, "{}"))
            for name, (dtype, shape) in headers(path).items():
                parts.setdefault(name, []).append((int(rows.get(name, 0)), path, dtype, shape))
    return {name: sorted(found) for name, found in parts.items()}


def _check_part(
    file: Path, name: str, parts: list[Part], wanted: tuple[torch.dtype, tuple[int, ...]], first: int | None
) -> None:
    """Raise ConfigError unless the parts follow each other and hold the wanted rows."""
    dtype, shape = SAFETENSORS_DTYPES[wanted[0]], tuple(wanted[1])
    stop = 0
    for row, _, found, part in parts:
        if found != dtype or part[1:] != shape[1:] or len(part) != len(shape) or (part and row != stop):
            raise ConfigError(f"{file}: {name} is {found} {list(part)} from row {row}, expected {dtype} {list(shape)}")
        stop = row + part[0] if part else 0
    whole = shape and (stop != shape[0] if first is None else stop < first + shape[0])
    if whole or (not shape and len(parts) > 1):
        raise ConfigError(f"{file}: {name} has {stop} rows, expected {dtype} {list(shape)}")


def _tensors(parts: dict[str, list[Part]], known: Specs, first_rows: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
    with ExitStack() as stack:
        paths = {path for found in parts.values() for _, path, _, _ in found}
        files = {path: stack.enter_context(open_safetensors(path)) for path in paths}
        for name, found in parts.items():
            if not known[name][1]:
                yield name, files[found[0][1]].get_tensor(name)
                continue
            first = first_rows.get(name, 0)
            stop = first + known[name][1][0]
            pieces = [
                files[path].get_slice(name)[max(first - row, 0) : max(min(stop - row, shape[0]), 0)]
                for row, path, _, shape in found
            ]
            yield name, torch.cat(pieces)


def _damaged(path: Path, error: object) -> ConfigError:
    return ConfigError(f"{path}: damaged checkpoint: {error}: {REMEDY}")


@torch.no_grad()
def load(path: Path, latents: Latents, optimizer: GridOptimizer) -> None:
    """Restore latents, what they decode to, and the optimizer, in place.

    The latents must be in the phase of the checkpoint (codes frozen or not) and the optimizer made for it.
    """
    try:
        _load(path, latents, optimizer)
    except (ConfigError, KeyError, RuntimeError) as error:  # unreadable, other names, other shapes
        raise _damaged(path, error) from error
    latents.decode()


def _load(path: Path, latents: Latents, optimizer: GridOptimizer) -> None:
    state, first_rows = latents.state(), latents.first_rows()
    names = {id(parameter): (name, parameter) for name, parameter in latents.named_parameters()}
    trained = dict(names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"])
    expected = {f"latents.{name}": (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    moments: Specs = {}
    for name, parameter in trained.items():
        moments[f"optimizer.{name}.step"] = (torch.float32, ())
        for key in MOMENTS:  # a parameter without a gradient so far has none
            moments[f"optimizer.{name}.{key}"] = (optimizer.moments, tuple(parameter.shape))
    rows = {f"latents.{name}": row for name, row in first_rows.items()}
    rows |= {f"optimizer.{name}.{key}": row for name, row in first_rows.items() for key in MOMENTS}
    files = sorted(path.glob("state*.safetensors"))
    if not files:
        raise ConfigError("state.safetensors is missing")
    _check_moments(files, trained)
    for key, value in read_state(files, expected, moments, rows):
        kind, _, rest = key.partition(".")
        if kind == "latents":
            state[rest].copy_(value)
            continue
        name, _, moment = rest.rpartition(".")
        parameter = trained[name]
        step = torch.zeros((), device=parameter.device)
        kept = step if moment == "step" else optimizer.new_moment(parameter, moment)
        optimizer.state[parameter][moment] = kept.copy_(value)


def _check_moments(files: Sequence[Path], trained: Mapping[str, Tensor]) -> None:
    """Raise ConfigError for a parameter that has some of its moments only."""
    stored = {name for file in files for name in headers(file)}
    for name in trained:
        there = [f"optimizer.{name}.{key}" in stored for key in ("step", *MOMENTS)]
        if any(there) and not all(there):
            raise ConfigError(f"{files[0]}: optimizer.{name} has some moments only")
