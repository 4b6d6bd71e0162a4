"""Progress of a run: bars on a terminal, lines in a log, and the same lines in its folder."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Protocol

LOG_FILE = "run.log"  # in a run folder
SECONDS = 30.0  # between two lines, at most


@dataclass(frozen=True)
class StepInfo:
    """Progress after an optimizer step: index, total, mean loss in nats, tokens seen, seconds.

    figures: what else was recorded of it, by name; see `train.record`.
    """

    step: int
    total_steps: int
    loss: float
    tokens: int
    seconds: float
    phase: str
    figures: Mapping[str, float] = field(default_factory=dict)


class Listener(Protocol):
    """Whoever shows progress; see `Progress` for the events."""

    def stage(self, name: str) -> None: ...
    def step(self, info: StepInfo) -> None: ...
    def part(self, done: int, total: int, figures: str) -> None: ...
    def note(self, line: str) -> None: ...


class Progress:
    """Takes the events of a run and hands them to whoever shows them; without listeners it is silent."""

    def __init__(self, *listeners: Listener):
        self.listeners = list(listeners)

    def stage(self, name: str) -> None:
        """The stage of this name begins, and the one before is done."""
        for listener in self.listeners:
            listener.stage(name)

    def step(self, info: StepInfo) -> None:
        """An optimizer step is done."""
        for listener in self.listeners:
            listener.step(info)

    def part(self, done: int, total: int, figures: str = "") -> None:
        """`done` of `total` of the stage is done, in the stage's own unit; figures: a line to show beside it."""
        for listener in self.listeners:
            listener.part(done, total, figures)

    def note(self, line: str) -> None:
        """A line that stays readable, such as the place of a file, or a warning that is due at once."""
        for listener in self.listeners:
            listener.note(line)

    @contextmanager
    def logged(self, run_dir: Path) -> Iterator[None]:
        """Write lines into the log of a run folder too, with how the run ended.

        They wait until the run has claimed the folder, which begins its log: a run that is refused leaves no trace.
        """
        waiting: list[str] = []
        before = _sizes_of_logs(run_dir)

        def write(line: str) -> None:
            waiting.append(line)
            if _sizes_of_logs(run_dir) != before:
                with suppress(OSError), open(run_dir / LOG_FILE, "a", encoding="utf-8", errors="replace") as file:
                    file.write("".join(f"{line}\n" for line in waiting))
                waiting.clear()

        lines = Lines(write)
        self.listeners.append(lines)
        try:
            yield
            lines.say("done")
        except BaseException as error:
            lines.say(f"ended: {type(error).__name__}: {error}")
            raise
        finally:
            self.listeners.remove(lines)
            lines.close()


class Lines:
    """A line at each stage, and every 30 seconds one that says how far the stage is, also when nothing happens in it.

    write: takes a line without its end. Lines that cannot be written are dropped: a log never ends a run.
    """

    def __init__(self, write: Callable[[str], None], seconds: float = SECONDS):
        self.write, self.seconds = write, seconds
        self.name, self.latest = "", ""
        self.first: StepInfo | None = None
        self.began = self.said_at = time.monotonic()
        self.closed = threading.Event()
        self.lock = threading.Lock()
        threading.Thread(target=self._beat, daemon=True).start()

    def stage(self, name: str) -> None:
        """Say what ends and what begins."""
        if self.name:
            self.say(f"{self.name}: done in {_duration(time.monotonic() - self.began)}")
        self.name, self.latest, self.first, self.began = name, "", None, time.monotonic()
        self.say(name)

    def step(self, info: StepInfo) -> None:
        """Remember step, loss, tokens a second and the time left; say them at the first step, the last, and in time."""
        begins, self.first = self.first is None, self.first or info
        seconds, steps = info.seconds - self.first.seconds, info.step - self.first.step
        text, held_out = (
            f"step {info.step:,} of {info.total_steps:,}, loss {info.loss:.4f}",
            "held_out_loss" in info.figures,
        )
        text += f", {info.figures['held_out_loss']:.4f} on held-out text" if held_out else ""
        if steps and seconds > 0:
            left = (info.total_steps - info.step) * seconds / steps
            text += f", {(info.tokens - self.first.tokens) / seconds:,.0f} tokens/s, {_duration(left)} left"
        self._remember(text, now=begins or held_out or info.step == info.total_steps)

    def part(self, done: int, total: int, figures: str) -> None:
        """Remember how far the stage is; say it in time."""
        self._remember(", ".join(filter(None, (f"{done:,} of {total:,}", figures))))

    def note(self, line: str) -> None:
        """Say it."""
        self.say(line)

    def _remember(self, text: str, now: bool = False) -> None:
        self.latest = text
        if now or time.monotonic() - self.said_at >= self.seconds:
            self._say_latest()

    def _say_latest(self) -> None:
        text = self.latest or f"at it for {_duration(time.monotonic() - self.began)}"
        self.say(f"{self.name or 'Working'}: {text}, {_memory()}")

    def say(self, text: str) -> None:
        """Write a line with the time."""
        with self.lock:
            if self.closed.is_set():
                return
            self.said_at = time.monotonic()
            with suppress(OSError, ValueError):  # a full disk, a reader that is gone, a closed file
                self.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def _beat(self) -> None:
        """Say where the work is when no event has for a while."""
        while not self.closed.wait(max(0.01, self.said_at + self.seconds - time.monotonic())):
            if time.monotonic() - self.said_at >= self.seconds:
                self._say_latest()

    def close(self) -> None:
        """Say no more, not even a line that is on its way."""
        with self.lock:
            self.closed.set()


def _sizes_of_logs(run_dir: Path) -> dict[Path, int]:
    """Log of a run folder, or of the runs in it where it has several."""
    return {path: path.stat().st_size for path in (*run_dir.glob(LOG_FILE), *run_dir.glob(f"*/{LOG_FILE}"))}


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else str(timedelta(seconds=round(seconds)))


def host_peak_bytes() -> int:
    """Memory of this process at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _memory() -> str:
    """Memory of this process at its peak, and what is allocated on a GPU."""
    text = f"{host_peak_bytes() / 1e9:.1f} GB of memory"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        text += f", {torch.cuda.memory_allocated() / 1e9:.1f} GB on the GPU"
    return text
