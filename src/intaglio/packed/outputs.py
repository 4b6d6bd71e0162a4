"""Outputs: temporary names that tell their process, leftovers of dead processes, and outputs that may be replaced."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from intaglio.errors import InputError, OutputError
from intaglio.plan.files import read_json

MARKER = ".intaglio"  # in a folder that was written whole: the names of its files
PARTIAL = re.compile(
    r"\..+\.(?P<where>[0-9a-f]{8})-(?P<pid>\d{1,10})-(?P<start>\d{1,20})-[0-9a-f]{8}\.partial", re.DOTALL
)
WEEK = 7 * 86400  # seconds; nothing takes so long to be written
LONGEST_NAME = 150  # characters of an output's name in that of its temporary; file systems take 255 bytes
HEAD_BYTES = 1 << 20
# The first bytes of a file of ours, and a word that follows soon: a GGUF's key, a bundle's author, a page's heading.
SIGNS = ((b"GGUF", b"intaglio.plan"), (b"LITERTLM", b"intaglio"), (b"<!", b'class="kicker">intaglio'))


def temporary_path(path: Path) -> Path:
    """A new name beside `path` for an output that is being written; it names the writing process."""
    pid = os.getpid()
    mine = f"{_where()}-{pid}-{started_at(pid)}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f".{path.name[:LONGEST_NAME]}.{mine}.partial")


def _where() -> str:
    """Eight digits that tell this machine, or container, from others that share its disk."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def started_at(pid: int) -> int:
    """The start of a process, in ticks since the machine did; 0 where the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
        return int(stat.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def runs(pid: int, start: int) -> bool:
    """Whether a process of this machine is alive and is the one that started then."""
    try:
        os.kill(pid, 0)
    except PermissionError:  # somebody else's
        pass
    except (OSError, OverflowError):
        return False
    return 0 in (start, started_at(pid)) or started_at(pid) == start


def clear_leftovers(folder: Path) -> list[Path]:
    """Remove temporary files and folders whose processes have ended, and of other machines those of a week ago."""
    cleared = []
    for path in folder.glob(".*.partial") if folder.is_dir() else ():
        found = PARTIAL.fullmatch(path.name)
        if found is None:
            continue
        with suppress(OSError):
            here = found["where"] == _where()
            old = time.time() - path.lstat().st_mtime > WEEK
            if old or (here and not runs(int(found["pid"]), int(found["start"]))):
                remove(path)
                cleared.append(path)
    return cleared


def remove(path: Path) -> None:
    """Remove a file or a folder as far as possible; an error elsewhere matters more than one here."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def mark(folder: Path) -> None:
    """Note in a folder which files were written, so that `why_kept` knows it again."""
    text = json.dumps({"written_by": "intaglio", "files": _files(folder)}, indent=1)
    (folder / MARKER).write_text(text + "\n", "utf-8")


def _files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name != MARKER)


def why_kept(path: Path) -> str:
    """The reason why an existing output is not to be replaced; empty for what is known to be ours.

    A folder is ours if it has a marker that lists every file in it, and a file if it has one of SIGNS.
    """
    if path.is_dir():
        if not any(path.iterdir()):
            return ""
        try:
            listed = read_json(path / MARKER).get("files")
        except InputError:
            return "holds no model that intaglio wrote"
        others = set(_files(path)) - set(listed if isinstance(listed, list) else [])
        return f"holds {min(others)}, which intaglio did not write" if others else ""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    ours = not head or any(head.startswith(start) and sign in head for start, sign in SIGNS)
    return "" if ours else "is a file that intaglio did not write"


def check_output(out: str | Path, inputs: Iterable[str | Path | None]) -> None:
    """Raise OutputError where writing `out` would take an input away: where it is that input or a folder above it.

    Paths are compared with all links followed, also those inside an input's folder. What does not exist, such as
    the name of a data set, is no path.
    """
    for given in inputs:
        for source in _places(given):
            same = _resolved(out) == source or (Path(out).exists() and os.path.samefile(out, source))
            if same or source.is_relative_to(_resolved(out)):
                what = "is" if same else "holds"
                raise OutputError(f"{out}: {what} the input {given}, which it would replace: choose another output")


def _places(given: str | Path | None) -> list[Path]:
    """The path of an input, and where links of its folder lead."""
    if given is None or not os.path.exists(given):
        return []
    path = Path(given)
    links = [child for child in path.iterdir() if child.is_symlink()] if path.is_dir() else []
    return [_resolved(place) for place in (path, *links) if place.exists()]


def _resolved(path: str | Path) -> Path:
    return Path(os.path.realpath(path))
