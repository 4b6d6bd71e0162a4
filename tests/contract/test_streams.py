"""The command line as a process: odd locales, closed pipes, full disks, and the signals that end it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from intaglio.cli import main, streams, terminal
from tests.support.cases import Case

MAIN = [sys.executable, "-c", "from intaglio.cli import main; main()"]
NAMES = ("LC_ALL", "LC_CTYPE", "LANG")


def printed(
    monkeypatch: pytest.MonkeyPatch, encoding: str, locale: dict[str, str], *arguments: str
) -> tuple[int, bytes]:
    """Exit code of a command in this process, and the bytes that it prints to streams of this encoding."""
    raw = io.BytesIO()
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in (locale | {"COLUMNS": "120"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["intaglio", *arguments])
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        patched.setattr(sys, "stderr", sys.stdout)
        with pytest.raises(SystemExit) as ended:
            main()
        sys.stdout.flush()
        return int(ended.value.code or 0), raw.getvalue()


@pytest.mark.parametrize(
    ("encoding", "locale"),
    [
        ("utf-8", {"LC_ALL": "C"}),
        ("utf-8", {"LANG": "POSIX"}),
        ("utf-8", {"LANG": "de_DE.UTF-8", "LC_CTYPE": "C"}),
        ("ascii", {}),
        ("latin-1", {"LANG": "en_US.ISO-8859-1"}),
        ("cp1252", {}),
    ],
    ids=str,
)
def test_plan_and_help_in_any_locale(encoding: str, locale: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (
        ["plan", "e2b", "--budget=8GB"],
        ["plan", "e2b", "--tensors"],
        ["plan", "--all"],
        ["train", "--help"],
    ):
        code, out = printed(monkeypatch, encoding, locale, *command)
        assert code == 0
        out.decode("ascii")
    assert b"--------------------" in printed(monkeypatch, encoding, locale, "plan", "e2b")[1]


def test_plan_has_its_bars_where_they_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for locale in ({"LC_ALL": "C.UTF-8"}, {}, {"LANG": "C", "LC_ALL": "en_US.UTF-8"}):
        assert "━━━━━━━━━━" in printed(monkeypatch, "utf-8", locale, "plan", "e2b")[1].decode("utf-8")


def test_a_surrogate_in_a_name_is_printed_as_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    code, out = printed(monkeypatch, "utf-8", {}, "plan", "no-such-\udcff-folder")
    assert code == 2 and rb"no-such-\udcff-folder" in out


def program(command: list[str], **streams: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*MAIN, *command], timeout=240, **{"stderr": subprocess.PIPE} | streams)


@pytest.mark.parametrize("command", [["plan", "--help"], ["plan", "e2b", "--tensors"]], ids=str)
def test_a_pipe_whose_reader_is_gone(command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = program(command, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("command", [["plan", "--help"], ["inspect", "--help"]], ids=str)
def test_a_full_disk_under_standard_output(command: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = program(command, stdout=full)
    assert done.returncode == 2
    assert done.stderr.decode().strip() == "error: the output: cannot be read or written: No space left on device"


def test_a_full_disk_under_standard_error() -> None:
    with open("/dev/full", "wb") as full:
        done = program(["nonsense"], stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_stream_that_is_closed_from_the_start(closed: int) -> None:
    done = program(["plan", "--help"], stdout=subprocess.PIPE, preexec_fn=lambda: os.close(closed))
    assert done.returncode == 0 and b"Traceback" not in done.stdout + done.stderr
    assert bool(done.stdout) == (closed != 1)


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_log_gets_lines_whatever_colours_are_asked_for(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    assert terminal.Bars().bars is None


def test_every_character_has_a_plain_one() -> None:
    streams.prepare()
    for text in ("─│┼█×−…“”", "é ü ß 漢 \udc80 \U0001f600", "━╸"):
        shown = text.encode("ascii", streams.HANDLER)
        assert shown.isascii() and len(shown) >= len(text.strip())


# Signals


def half_written(folder: Path) -> bool:
    return any(path.suffix == ".partial" for path in folder.iterdir()) if folder.is_dir() else False


def test_a_signal_cleans_up_and_says_so(gemma4: Case, tmp_path: Path) -> None:
    program = (
        "import time, intaglio.train.quantize as q\n"
        "q.fit_tensor = lambda *a: (print('fitting', flush=True), time.sleep(600))\n"
        "from intaglio.cli import main; main()"
    )
    command = [sys.executable, "-c", program, "quantize", gemma4.checkpoint, f"--out={tmp_path / 'out'}"]
    # the handlers of whoever runs the tests are not what is tested: nohup has SIGHUP ignored
    reset = lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGHUP)]  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, preexec_fn=reset) as process:
        assert "fitting\n" in process.stdout, process.communicate()
        assert half_written(tmp_path)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "error: stopped by SIGTERM; what was half written is removed" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


SIGNALLED = """
import os, signal, sys
from intaglio.train.signals import Stopped, deferred, stopping
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "nohup" else signal.SIG_DFL)
def send(number): os.kill(os.getpid(), number)
try:
    with stopping():
        if sys.argv[1] == "nohup":
            send(signal.SIGHUP); print("lives")
        elif sys.argv[1] == "deferred":
            with deferred() as pending:
                send(signal.SIGTERM); print("step ends", pending.number); print("saved"); pending.stop()
        elif sys.argv[1] == "twice":
            with deferred() as pending:
                send(signal.SIGTERM); send(signal.SIGHUP); print("never")
        elif sys.argv[1] == "unasked":
            with deferred() as pending:
                send(signal.SIGTERM)
        elif sys.argv[1] == "cleanup":
            try: send(signal.SIGTERM)
            finally: send(signal.SIGHUP); send(signal.SIGTERM); print("cleaned")
except Stopped as stopped:
    print(stopped, stopped.number)
"""


@pytest.mark.parametrize(
    ("how", "printed"),
    [
        ("nohup", ["lives"]),
        ("deferred", ["step ends 15", "saved", "SIGTERM 15"]),
        ("twice", ["SIGHUP 1"]),
        ("unasked", ["SIGTERM 15"]),
        ("cleanup", ["cleaned", "SIGTERM 15"]),
    ],
)
def test_signals_are_held_back_and_ignored_where_they_should(how: str, printed: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED, how], capture_output=True, text=True)
    assert done.stdout.splitlines() == printed, done.stderr
