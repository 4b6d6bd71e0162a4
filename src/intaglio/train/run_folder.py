"""The folder of a training run: whose it is, and its log of losses."""

from __future__ import annotations

import json
from pathlib import Path

from intaglio.errors import ConfigError, OutputError
from intaglio.packed.store import new_path, write_error

LOSSES_FILE = "losses.jsonl"
RUN_FILE = "run.json"


def check_run_dir(run_dir: Path, identity: dict[str, str], resume: bool) -> None:
    """Raise OutputError unless a run of this identity may begin in the folder, or go on there with `resume`."""
    record = run_dir / RUN_FILE
    if not record.is_file():
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise OutputError(f"{run_dir}: is not empty and holds no run: choose another folder")
        return
    if not resume:
        raise OutputError(f"{run_dir}: holds another run: choose another folder, or continue it with --resume")
    try:
        found = dict(json.loads(record.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise OutputError(f"{record}: damaged: {error}: choose another folder") from None
    for key, value in identity.items():
        if found.get(key) != value:
            raise OutputError(
                f"{run_dir}: cannot resume: the run there has another {key} ({found.get(key)}): "
                f"give it the {key} that it began with, or choose another folder"
            )


def claim(run_dir: Path, identity: dict[str, str]) -> None:
    """Make the folder this run's."""
    if not (run_dir / RUN_FILE).is_file():
        with new_path(run_dir / RUN_FILE) as temporary:
            temporary.write_text(json.dumps(identity), "utf-8")


def keep_lines(log: Path, count: int) -> None:
    """Cut a log of an interrupted run back to where its checkpoint is."""
    lines = log.read_text("utf-8").splitlines(keepends=True) if log.is_file() else []
    with new_path(log, replace=True) as temporary:
        temporary.write_text("".join(lines[:count]), "utf-8")


def append_line(log: Path, line: str) -> None:
    """Add a line to the log; OutputError if it cannot be written."""
    try:
        with open(log, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise write_error(log, error) from error


def read_losses(run_dir: Path) -> list[dict[str, float]]:
    """Rows {step, tokens, loss} of a run; none if it has not begun. ConfigError for a damaged log."""
    path = Path(run_dir) / LOSSES_FILE
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.is_file() else [], 1):
        try:
            row = json.loads(line)
            rows.append({"step": int(row["step"]), "tokens": int(row["tokens"]), "loss": float(row["loss"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number}: not a line of a loss log: {error!r}: remove it or the run") from None
    return rows
