"""The command line: verbs and their options. What they do is elsewhere, and imported when needed.

Imports everything, the heavy part inside functions.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress

import typer

from intaglio.cli import draft, look, make, ship, streams, talk
from intaglio.cli.options import app
from intaglio.errors import IntaglioError
from intaglio.train.signals import Stopped, stopping

__all__ = ["app", "draft", "look", "main", "make", "ship", "talk"]
UNTIL_STOPPED = 10.0  # seconds that other processes wait before they speak
RESUMED = "a training run continues from its last checkpoint with --resume"


def main() -> None:
    """Run the command line; a user's mistake is one message and an exit code, never a traceback.

    Of several processes the first says what all have met: torchrun then stops the others, which stay quiet.
    A signal ends it with 128 and the signal's number, and so does a pipe whose reader is gone (`| head`).
    """
    streams.prepare()
    with stopping():
        try:
            code, message = _run()
            if message and _number() > 0:
                time.sleep(UNTIL_STOPPED)
                message = f"process {_number()}: {message}"
        except Stopped as stopped:
            code = 128 + stopped.number
            message = f"stopped by {stopped}; what was half written is removed; {RESUMED}" if _number() == 0 else ""
        if message:
            with suppress(OSError):  # the terminal may be what has ended
                _print_error(message)
    sys.exit(code)


def _number() -> int:
    """This process's number among those that torchrun or accelerate started."""
    return int(os.environ.get("RANK", "0"))


def _run() -> tuple[int, str]:
    """Exit code and message of the command; the message is empty where it is fine or was printed."""
    try:
        # typer.Exit comes back as its code, and Ctrl-C as 130
        code = int(app(prog_name="intaglio", standalone_mode=False) or 0)
        sys.stdout.flush()
    except IntaglioError as error:
        return error.exit_code, str(error)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except (OSError, SystemExit) as error:
        # click and rich exit where a pipe is broken, and nothing else here does
        if isinstance(error, SystemExit) or streams.reader_is_gone():
            streams.give_up()
            return 128 + signal.SIGPIPE, ""
        if error.filename is None:
            streams.give_up()
        return 2, f"{error.filename or 'the output'}: cannot be read or written: {error.strerror or error}"
    except Exception as error:
        if not hasattr(error, "show"):  # wrong options: typer has had click's exceptions and its own
            raise
        with suppress(OSError):
            error.show()
        return int(error.exit_code), ""  # type: ignore[attr-defined]
    return code, f"stopped; {RESUMED}" if code == 130 else ""


def _print_error(message: str) -> None:
    from rich.text import Text as RichText

    printer = streams.Printer(stderr=True)
    printer.print(RichText("error: ", style="bold red") + RichText(message), soft_wrap=True)
