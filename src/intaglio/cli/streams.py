"""Standard streams in any locale, to a pipe, a closed stream or a full disk."""

from __future__ import annotations

import codecs
import logging
import os
import select
import sys
import unicodedata
from typing import Any

from rich.console import Console

PLAIN = {
    **dict.fromkeys("─━═╌┄╴╶╸╺\u2013—−", "-"),
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯╇╈┏┓┗┛┡┩╞╡╪", "+"),
    **dict.fromkeys("█▉▊▋▌▐▄▀", "#"),
    **dict.fromkeys("▍▎▏ ░", " "),
    **dict.fromkeys("“”", '"'),
    **dict.fromkeys("\u2018\u2019", "'"),
    **{"×": "x", "…": "...", "•": "*", "→": "->"},
}
HANDLER = "intaglio-plain"


class Printer(Console):
    """A console whose broken pipe is an error like any other, and no exit with the code of a missed quality gate."""

    def on_broken_pipe(self) -> None:
        """Let the BrokenPipeError through."""
        raise


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that a stream cannot show by ASCII that looks alike, or by an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


def _ascii(character: str) -> str:
    if character in PLAIN:
        return PLAIN[character]
    simpler = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return simpler or character.encode("ascii", "backslashreplace").decode()


def prepare() -> None:
    """Let nothing that is printed fail: streams that are closed lead nowhere, and odd characters become ASCII."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # else the next file that is opened would get its number, and what is printed there
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries, which fill a log
    for name in ("torchao", "torch.utils._pytree"):  # they warn of their own parts wherever torchao is installed
        logging.getLogger(name).setLevel(logging.ERROR)
    codecs.register_error(HANDLER, _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(**({"encoding": "ascii"} if _c_locale() else {}), errors=HANDLER)


def _c_locale() -> bool:
    """Whether the user has asked for the C locale, where Python prints UTF-8 all the same."""
    named = next((value for name in ("LC_ALL", "LC_CTYPE", "LANG") if (value := os.environ.get(name))), "")
    return named in ("C", "POSIX")


def reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    try:
        poll: Any = select.poll()
        poll.register(1, 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, AttributeError):
        return False


def give_up() -> None:
    """Send standard output nowhere: what is buffered would fail again when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
