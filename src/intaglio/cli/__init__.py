"""The command line: verbs and their options. What they do is elsewhere, and imported when needed."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from intaglio.cli import draft, look, make, ship
from intaglio.cli.options import app
from intaglio.errors import IntaglioError

__all__ = ["app", "draft", "look", "main", "make", "ship"]


def main() -> None:
    """Run the command line; a user's mistake is one message and an exit code, never a traceback."""
    try:
        code = app(prog_name="intaglio", standalone_mode=False)  # typer.Exit comes back as its code, and Ctrl-C as 130
    except IntaglioError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: cannot be read or written: {error.strerror or error}", 2)
    except Exception as error:
        if not hasattr(error, "show"):  # wrong options: typer has had click's exceptions and its own
            raise
        error.show()
        code = error.exit_code  # type: ignore[attr-defined]
    if code == 130:
        _fail("stopped; a training run continues from its last checkpoint with --resume", 130)
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    from rich.console import Console
    from rich.text import Text as RichText

    Console(stderr=True).print(RichText("error: ", style="bold red") + RichText(message), soft_wrap=True)
    sys.exit(code)
