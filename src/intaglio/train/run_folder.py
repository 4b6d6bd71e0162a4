"""The folder of a training run: who works in it, whose it is, and its log of losses."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from intaglio.errors import ConfigError, InputError, OutputError
from intaglio.packed.outputs import clear_leftovers, runs, started_at
from intaglio.packed.store import new_path, write_error
from intaglio.plan.files import read_json, read_text, reading, whole_number
from intaglio.progress import LOG_FILE

LOSSES_FILE = "losses.jsonl"
SPEED_FILE = "speed.jsonl"
RUN_FILE = "run.json"
LOCK_FILE = "run.lock"
LAYERS = "layers"  # folder of the packed model that the stage "layers" left
OF_THE_PROCESS = (LOCK_FILE, LOG_FILE, LAYERS)  # there before a run has begun
LONGEST_LOG = 1 << 30  # bytes


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Be the only process that works in a run folder, which is made; for the orders of `train` and its like.

    The lock is the operating system's, so that it ends with its process however that ends. A file beside says who
    holds it. Raises OutputError that names the holder. Of the processes of one distributed run the first holds it.
    """
    if os.environ.get("RANK", "0") != "0" and "WORLD_SIZE" in os.environ:
        yield
        return
    made = not run_dir.exists()
    path = run_dir / LOCK_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        try:
            _sign(descriptor)
        except OSError as error:
            raise write_error(path, error) from error
        for folder in (run_dir, run_dir / "checkpoints"):
            clear_leftovers(folder)
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)
        if made:
            with suppress(OSError):  # not empty: something was written
                run_dir.rmdir()


def _locked(path: Path) -> int:
    """A descriptor of the lock file, locked. OutputError if another process has it."""
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) and not _written_by_a_living_process(path):
                raise  # a file system without locks, or no room for one
            raise OutputError(
                f"{path.parent}: {_holder(path)} works in it: wait for it, or choose another folder"
            ) from None
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:  # else its last holder has just removed it
                return descriptor
        os.close(descriptor)


def _sign(descriptor: int) -> None:
    pid = os.getpid()
    said = {"host": socket.gethostname(), "pid": pid, "start": started_at(pid), "command": sys.argv}
    said["since"] = datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, (json.dumps(said) + "\n").encode())


def held_by_a_process(run_dir: Path) -> bool:
    """Whether a process works in a run's folder; of another host, whether one has said so and not ended in order."""
    path = run_dir / LOCK_FILE
    return path.exists() and _written_by_a_living_process(path)


def _written_by_a_living_process(path: Path) -> bool:
    with suppress(InputError, ValueError):
        said = read_json(path)
        return said.get("host") != socket.gethostname() or runs(whole_number(said, "pid"), whole_number(said, "start"))
    return False


def _holder(path: Path) -> str:
    """Who holds a lock, as far as its file says it."""
    try:
        said = read_json(path, limit=1 << 20)
        command = " ".join(map(str, said["command"]))
        return f"process {said['pid']} on {said['host']} ({command[:200]}, since {said['since']})"
    except (InputError, LookupError, TypeError):  # it has the lock and has not signed yet
        return "another process"


def check_run_dir(run_dir: Path, identity: dict[str, str], resume: bool) -> None:
    """Raise OutputError unless a run of this identity may begin in the folder, or go on there with `resume`.

    identity: settings by name. "recipe" is TOML, of which the keys that differ are named; the others are named
    with both values, or with the beginnings of both digests.
    """
    record = run_dir / RUN_FILE
    if not record.is_file():
        if run_dir.exists() and (not run_dir.is_dir() or any(p.name not in OF_THE_PROCESS for p in run_dir.iterdir())):
            raise OutputError(f"{run_dir}: is not empty and holds no run: choose another folder")
        return
    if not resume:
        raise OutputError(f"{run_dir}: holds another run: choose another folder, or continue it with --resume")
    found = read_json(record, limit=1 << 24, error=OutputError)
    for key, value in sorted(identity.items(), key=lambda item: item[0] != "recipe"):  # the recipe says most
        before = found.get(key)
        if before is None:
            raise OutputError(f"{record}: does not say {key}: another version of intaglio began it: begin a new run")
        if before != value:
            said = _differing(str(before), value) if key == "recipe" else _now(key, _short(value), _short(before))
            raise OutputError(f"{run_dir}: cannot resume: {said}: give it what it began with, or choose another folder")


def _now(key: str, value: object, before: object) -> str:
    return f"{key} is {value}, and the run there began with {before}"


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text[:80]


def _differing(before: str, now: str) -> str:
    """The first three keys in which two recipes differ, with both values."""
    try:
        old, new = (flat(tomllib.loads(text)) for text in (before, now))
    except (ValueError, RecursionError):
        return _now("recipe", "another one", "one that cannot be read")
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return ", ".join(_now(key, new.get(key), old.get(key)) for key in keys[:3]) or _now("recipe", "ordered anew", "it")


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A table of tables, for example of a recipe, as one with keys such as "schedule.lr"."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def claim(run_dir: Path, identity: dict[str, str]) -> None:
    """Make the folder this run's, and begin or go on with its log: all that may refuse the run is behind it."""
    if not (run_dir / RUN_FILE).is_file():
        with new_path(run_dir / RUN_FILE) as temporary:
            temporary.write_text(json.dumps(identity), "utf-8")
    with suppress(OutputError):
        now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        append_line(run_dir / LOG_FILE, f"{now} process {os.getpid()}: {' '.join(sys.argv)}\n")


def keep_lines(log: Path, count: int) -> None:
    """Cut a log of an interrupted run back to where its checkpoint is. ConfigError for one that is shorter."""
    lines = read_text(log, limit=LONGEST_LOG).splitlines(keepends=True) if log.is_file() else []
    if len(lines) < count:
        raise ConfigError(f"{log}: {len(lines)} lines, but there is a checkpoint after {count} steps: restore it")
    with new_path(log, replace=True, internal=True) as temporary:
        temporary.write_text("".join(lines[:count]), "utf-8")


def append_line(log: Path, line: str) -> None:
    """Add a line to the log; OutputError if it cannot be written."""
    try:
        with open(log, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise write_error(log, error) from error


def read_losses(run_dir: Path) -> list[dict[str, float]]:
    """Rows {step, tokens, loss, lr} of a run, of some steps with more figures; none if it has not begun.

    held_out_loss: the same loss on held-out text, where it was measured. codes_changed: share of codes that are not
    those which training began with; codes_moved: share that this step changed. loss and held_out_loss are of the
    model before the step, codes are of the model after it. ConfigError for a damaged log.
    """
    return list(_rows(Path(run_dir) / LOSSES_FILE, "tokens", "loss"))


def read_speed(run_dir: Path) -> list[dict[str, float]]:
    """Rows {step, time, tokens_per_s, host_bytes} of a run, on a GPU with {gpu_bytes, planned_bytes}; see `record`.

    time: in seconds since 1970. A step that was done twice has two rows. ConfigError for a damaged log.
    """
    return list(_rows(Path(run_dir) / SPEED_FILE, "time", "tokens_per_s", "host_bytes"))


def _rows(path: Path, *required: str) -> Iterator[dict[str, float]]:
    """Rows of finite numbers, each with its step and what is required; a last line without its end is being written."""
    text = read_text(path, limit=LONGEST_LOG) if path.is_file() else ""
    for number, line in enumerate(text.split("\n")[:-1], 1):
        with reading(path.with_name(f"{path.name}:{number}"), "not a line of a run's log", "remove it or the run"):
            row: dict[str, float] = json.loads(line)
            once = path.name == LOSSES_FILE
            whole_number(row, "step", least=number if once else 1, most=number)
            for key in {*row, *required}:
                if type(row[key]) not in (int, float) or not math.isfinite(row[key]):
                    raise ValueError(f"{key} = {row[key]!r}: expected a number")
            yield row
