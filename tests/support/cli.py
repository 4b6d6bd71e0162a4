"""The command line, called in this process or started as one of its own."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

from intaglio.cli import main


@dataclass(frozen=True)
class Outcome:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one message of a failure, in one line."""
        found = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(found) == 1, self.err
        assert "Traceback" not in self.err + self.out
        return found[0].removeprefix("error: ")


def intaglio(*arguments: object) -> Outcome:
    """`intaglio ARGUMENTS` in this process. An exception that main() lets through is let through."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["intaglio", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


# Training that says "held" after the log's line of a step and stands still, until a signal goes on with it.
HELD = """
import json, signal
from intaglio.train import record
plain = record.append_line
def append_line(log, line):
    plain(log, line)
    if log.name == "losses.jsonl" and json.loads(line)["step"] == {step}:
        print("held", flush=True)
        signal.signal(signal.SIGUSR1, lambda *rest: None)
        signal.pause()
record.append_line = append_line
"""


@contextmanager
def started(*arguments: object, hold_at: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """`intaglio ARGUMENTS` as a process, with as many threads as this one, so that it computes the same bits.

    hold_at: a step of training; the process is handed over once it stands still there.
    """
    held = HELD.format(step=hold_at) if hold_at else ""
    command = [sys.executable, "-c", f"{held}from intaglio.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts background jobs with SIGINT ignored, and the child would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            if hold_at:
                assert process.stdout is not None
                assert any(line == "held\n" for line in process.stdout), process.communicate()
            yield process
        finally:
            process.kill()


LOGS = {"run.json", "run.log", "losses.jsonl", "speed.jsonl", "codes.safetensors"}  # of a run that has begun


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Return as soon as a condition holds. The limit is far beyond what any machine takes, however busy it is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not after {seconds} s"
        time.sleep(0.01)


def names_of_folders(files: dict[str, bytes]) -> list[str]:
    """Those of the files that name a folder of this machine: where tests write, this repository, Python's."""
    folders = [str(folder).encode() for folder in (tempfile.gettempdir(), Path(__file__).parents[2], sys.prefix)]
    return [name for name, data in files.items() if any(folder + b"/" in data for folder in folders)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, by its path there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
