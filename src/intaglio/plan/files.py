"""Small files of a run or of other people, read with limits on their size and one typed error for all damage.

Parsers raise many types for a malformed file: json and UTF-8 decoding raise ValueError, deep nesting
RecursionError, large numbers OverflowError, and numpy's header reader errors of the tokenizer. `reading`
turns all of them into one error that names the file.
"""

from __future__ import annotations

import json
import math
import re
import stat
import struct
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from intaglio.errors import ConfigError, InputError, IntaglioError

MALFORMED = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError, EOFError),
    *(SyntaxError, struct.error, tokenize.TokenError),
)
ABSOLUTE = re.compile(r"(?<![\w./:~<])~?/[^\s'\"`,;:()]+")  # no closing tag, no address, no share
POINTER = b"version https://git-lfs"  # how the small files begin that git-lfs keeps in place of large ones
LIMIT_BYTES = 1 << 26  # of a JSON or text file; tokenizer.json of Gemma, the largest, has 2^25


def one_line(error: BaseException) -> str:
    """Type and message of someone else's error, as part of a message of ours."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def without_folders(text: str) -> str:
    """A text in which absolute paths are only their last names, for files that leave this machine."""
    return ABSOLUTE.sub(lambda found: Path(found[0]).name, text)


@contextmanager
def reading(
    path: Path, what: str = "cannot be read", advice: str = "", error: type[InputError] = ConfigError
) -> Iterator[None]:
    """Raise `error` for whatever a malformed file makes a parser raise; errors of ours pass.

    what: says what the file is not, for example "not a shard index". advice: what to do, after a colon.
    """
    try:
        yield
    except IntaglioError:
        raise
    except (*MALFORMED, OSError) as cause:
        tail = f": {advice}" if advice else ""
        raise error(f"{path}: {what}: {one_line(cause)}{tail}") from cause


def read_text(path: Path, *, limit: int = LIMIT_BYTES, error: type[InputError] = ConfigError) -> str:
    """A UTF-8 text. Raises `error` for a file that is missing, no regular file, too large or not UTF-8."""
    with reading(path, "cannot be read as UTF-8 text", error=error):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would never end
            raise error(f"{path}: not a regular file")
        if found.st_size > limit:
            raise error(f"{path}: has {found.st_size:,} bytes: expected at most {limit:,}")
        content = path.read_bytes()
        if content.startswith(POINTER):
            raise pointer(path, error)
        return content.decode("utf-8")


def pointer(path: Path, error: type[InputError] = ConfigError) -> InputError:
    """The error for a file that git-lfs has not fetched yet."""
    return error(f"{path}: is a pointer of git-lfs, not the file itself: run `git lfs pull` in its folder")


def read_json(path: Path, *, limit: int = LIMIT_BYTES, error: type[InputError] = ConfigError) -> dict[str, Any]:
    """A JSON object. Raises `error` as `read_text` does, for anything else than an object, for an object that says one
    key twice, of which readers take either, and for NaN and infinities, which JSON has not."""
    text = read_text(path, limit=limit, error=error)
    with reading(path, "not valid JSON", error=error):
        found = json.loads(text, object_pairs_hook=once, parse_constant=_no_number, parse_float=_finite)
    if not isinstance(found, dict):
        raise error(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its pairs, for json's `object_pairs_hook`. ValueError for a key that is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in found if names.count(name) > 1)[:60]!r} is said twice: remove one")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def whole_number(table: dict[str, Any], key: str, *, least: int = 0, most: int = 1 << 53) -> int:
    """The value of a key, an integer between two bounds. ValueError otherwise; True and 1.0 are no integers here."""
    value = table.get(key)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{key} = {str(value)[:40]}: expected an integer between {least} and {most}")
    return value
