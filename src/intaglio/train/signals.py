"""SIGTERM and SIGHUP end a command as Ctrl-C does: what is half written is removed, and a line says so.

`stopping` turns the first of them into `Stopped`, an exception that cleans up on its way. A loop that wants to save
its state first works inside `deferred`, and asks after each step whether a signal has come.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal ended the command. number: of the signal; a shell expects the exit code 128 + number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Pending:
    """Whether a signal has come that was held back. number: of the signal, 0 for none."""

    def __init__(self) -> None:
        self.number = 0

    def stop(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.number:
            raise Stopped(self.number)


@contextmanager
def stopping() -> Iterator[None]:
    """Raise Stopped where the main thread is when SIGTERM or SIGHUP comes; later ones are ignored while it cleans up.

    A signal that is ignored stays so: `nohup` lets a command outlive its terminal.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    with _handled(stop):
        yield


@contextmanager
def deferred() -> Iterator[Pending]:
    """Hold back the first signal within `stopping`, so that a loop can save its state; the second one stops at once.

    with deferred() as pending:
        for step in steps:
            ...
            if pending.number:
                save()
                pending.stop()
    """
    pending = Pending()

    def hold(number: int, frame: FrameType | None) -> None:
        if pending.number:
            raise Stopped(number)
        pending.number = number

    with _handled(hold):
        yield pending
    pending.stop()


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Set a handler for signals that are not ignored; only the main thread may."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, old in before.items():
        if old is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            if signal.getsignal(number) is handler:  # else a signal has come, and the others are ignored
                signal.signal(number, old)
