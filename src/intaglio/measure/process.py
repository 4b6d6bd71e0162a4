"""Native code that is not ours, in a process of its own: one that dies, hangs or is killed does not end a run.

`Child` talks with a Python script of ours by lines of JSON. The rest serves any program: why it ended, its last
words, and how long it may take.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from intaglio.errors import InputError, RuntimeFailureError

CPUINFO = Path("/proc/cpuinfo")
PATIENCE = "INTAGLIO_PATIENCE"  # environment variable: a factor for every time limit
# Time limits are far above what a slow machine needs, since they are there for a process that hangs.
START_SECONDS = 60.0
DISK_BYTES_SECOND = 10e6  # a slow network disk; weights are read from it when they are first used
# A token passes through nearly every byte of the weights: about 4 operations a byte in 4 bits, so 4 GFLOP/s.
WORK_BYTES_SECOND = 1e9
SLICE_SECONDS = 1.0  # a limit is counted in these, so that a run which was suspended has not run out of time
END_SECONDS = 5.0  # between the end of the conversation and that of the process
KILL_SECONDS = 30.0  # until the system has cleared away a killed process of many gigabytes
MOST_BYTES = 1 << 26  # of an answer
SHOWN = 200  # characters of what was not understood
HINT = "see docs/gguf.md"
# No debugger is started to print where it crashed; numpy, which comes along, keeps no memory for each core.
SETTINGS = {"GGML_NO_BACKTRACE": "1", "OPENBLAS_NUM_THREADS": "1"}


class Child:
    """A script of ours in a process of its own, with memory that both see; a context manager.

    It is told its end of a socket, the memory and our process id, as file descriptors and a number, and ends when
    the socket closes. name: what messages call it. patience: a factor for every time limit; None for the
    environment's.
    """

    def __init__(self, name: str, script: Path, *, patience: float | None = None):
        self.name, self._rest, self._failure, self._count = name, bytearray(), "", 0
        self._patience = read_patience() if patience is None else patience
        with contextlib.ExitStack() as stack:
            try:
                self._start(script, stack)
            except OSError as error:  # no memory, no descriptors or no processes left
                raise RuntimeFailureError(f"{name} cannot be started: {error.strerror or error}") from None
            self._end = weakref.finalize(self, _end, self._process, stack.pop_all())

    def _start(self, script: Path, stack: contextlib.ExitStack) -> None:
        self._socket, theirs = map(stack.enter_context, socket.socketpair())
        self._log = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        self._memory = stack.enter_context(memory_file())
        with above_standard(theirs) as their_socket, above_standard(self._memory) as their_memory:
            numbers = (their_socket, their_memory, os.getpid())
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(script), *map(str, numbers)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=numbers[:2],
                env=os.environ | SETTINGS | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, answers: dict[str, type], *, seconds: float, where: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a request, which has these keys with values of these types.

        seconds: how long it may take. where: goes into messages, "at the first window". Raises InputError if the
        child refuses the request, with its reason; RuntimeFailureError if it dies, hangs or answers nonsense, and
        at every request from then on.
        """
        if not self._end.alive:
            raise RuntimeFailureError(self._failure) if self._failure else ValueError(f"this {self.name} is closed")
        self._count += 1
        request = {"number": self._count, "do": do, **arguments}
        try:
            line = self._exchange(json.dumps(request).encode() + b"\n", seconds * self._patience)
        except TimeoutError:
            self._fail(hanging(self.name, seconds * self._patience, where))
        except OSError:
            self._fail(self._ending(where))
        except BaseException:  # Ctrl-C between request and answer: the next answer would be the wrong one
            self.close()
            raise
        try:
            answer: dict[str, Any] = json.loads(line)
        except (ValueError, RecursionError):
            answer = {}
        mine = isinstance(answer, dict) and answer.get("number") == self._count
        if mine and "refused" in answer:
            raise InputError(str(answer["refused"]))
        if not mine or not all(isinstance(answer.get(key), kind) for key, kind in answers.items()):
            shown = line[:SHOWN].decode("utf-8", "replace")
            self._fail(f"{self.name} answered {shown!r} {where}, which is no answer to {do!r}, and was stopped; {HINT}")
        return answer

    def share(self, size_bytes: int) -> mmap.mmap:
        """Memory of this size that the child sees too. RuntimeFailureError if there is none."""
        try:
            self._memory.truncate(size_bytes)
            return mmap.mmap(self._memory.fileno(), size_bytes)
        except OSError as error:
            self._fail(f"{self.name} gets no shared memory of {size_bytes:,} bytes: {error.strerror or error}")

    def close(self) -> None:
        """End the process. May be called twice."""
        self._end()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _exchange(self, request: bytes, seconds: float) -> bytes:
        """Send a line and return one. TimeoutError, or ConnectionError if the other side is gone."""
        left, unsent = seconds, memoryview(request)
        while unsent or b"\n" not in self._rest:
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(min(SLICE_SECONDS, left))
            began = time.monotonic()
            with contextlib.suppress(TimeoutError):
                if unsent:
                    unsent = unsent[self._socket.send(unsent) :]
                elif got := self._socket.recv(1 << 16):
                    self._rest += got
                else:
                    raise ConnectionError
            left -= min(SLICE_SECONDS, time.monotonic() - began)
            if len(self._rest) > MOST_BYTES:
                break
        line, _, self._rest = self._rest.partition(b"\n")
        return bytes(line)

    def _ending(self, where: str) -> str:
        """The reason why a process that hung up is gone."""
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{self.name} hung up {where} and was stopped; {HINT}"
        return ending(self.name, code, where, read_log(self._log))

    def _fail(self, message: str) -> NoReturn:
        self._failure = message
        self.close()
        raise RuntimeFailureError(message) from None


def _end(process: subprocess.Popen[bytes], files: contextlib.ExitStack) -> None:
    process.kill()  # it has nothing to save
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk ends when that answers
        process.wait(KILL_SECONDS)
    files.close()


def memory_file() -> IO[bytes]:
    """An empty file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("intaglio"), "r+b", buffering=0)  # /dev/shm holds 64 MB in many containers
    return tempfile.TemporaryFile(buffering=0)


@contextlib.contextmanager
def above_standard(file: IO[bytes] | socket.socket) -> Iterator[int]:
    """A second descriptor of the file that is none of the standard streams, where those were closed."""
    number = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
    try:
        yield number
    finally:
        os.close(number)


def read_patience() -> float:
    """The factor of the environment variable INTAGLIO_PATIENCE. InputError if it is no number above 0."""
    text = os.environ.get(PATIENCE, "1")
    try:
        patience = float(text)
    except ValueError:
        patience = 0.0
    if not 0 < patience < float("inf"):
        raise InputError(f"{PATIENCE}={text!r}: expected a factor for time limits, a number above 0")
    return patience


def work_seconds(size_bytes: int, tokens: int = 0) -> float:
    """Limit for reading weights of this size and passing tokens through them, before the factor of patience."""
    return START_SECONDS + size_bytes / DISK_BYTES_SECOND + tokens * size_bytes / WORK_BYTES_SECOND


def has_amx() -> bool:
    """Whether this machine's processor multiplies matrices in tiles (Intel AMX)."""
    try:
        lines = CPUINFO.read_text("ascii", "replace").splitlines()
    except OSError:
        return False
    return any("amx_tile" in line.split() for line in lines if line.startswith("flags"))


def ending(name: str, code: int, where: str, log: str) -> str:
    """A line that says how a process ended, with what is known about such an end.

    code: as `subprocess` has it, minus the signal for one that died of a signal.
    """
    words = last_words(log)
    said = f"; its last words: {words}" if words else ""
    if code >= 0:
        return f"{name} ended with code {code} {where}{said}; {HINT}"
    if code == -signal.SIGKILL:
        known = "systems do this to the largest process when memory runs out"
    elif code == -signal.SIGILL:
        known = f"it was built for another processor, {HINT}"
    else:
        known = f"known on processors with AMX, {HINT}" if has_amx() else HINT
    return f"{name} ended with signal {-code} {where}; {known}{said}"


def hanging(name: str, seconds: float, where: str) -> str:
    """A line that says that a process has run out of time."""
    return (
        f"{name} gave no answer for {seconds:,.1f} s {where} and was stopped; if this machine is only slow, "
        f"{PATIENCE}=10 makes every limit ten times as long"
    )


def read_log(log: IO[bytes]) -> str:
    """The end of what a process has printed into this file."""
    most = 1 << 16
    start = max(0, os.fstat(log.fileno()).st_size - most)
    return os.pread(log.fileno(), most, start).decode("utf-8", "replace")  # its position is the writer's too


def last_words(log: str) -> str:
    """The lines of a log that say why a program ended: its errors, or the last lines. Empty for an empty log."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if any(word in line.lower() for word in ("error", "failed", "assert", "invalid"))]
    return " | ".join((errors or lines)[-3:])[:600]
