"""Lines and records out of files, streamed and bounded.

A line that holds a record has `RECORD_BYTES` at most, a packed file grows `MAX_GROWTH` times at most, and nothing is
read that is no file.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from intaglio.errors import CorpusError
from intaglio.plan.files import once
from intaglio.train.data.sources import check_regular

RECORD_BYTES = 1 << 26
BLOCK_BYTES = 1 << 18  # longer lines of plain text are cut: for a tokenizer a line is one long word
# gzip cannot pack text to less than 1/1032, and text that is worth training on shrinks to a twentieth at most.
MAX_GROWTH = 200
GROWTH_FLOOR = 1 << 24

PACKED = {b"\x1f\x8b": ".gz", b"\xfd7zXZ": ".xz", b"BZh": ".bz2", b"\x28\xb5\x2f\xfd": ".zst"}  # how they begin
DELIMITERS = (";", "\t", "|", ",")  # of files that are called CSV all the same

Records = Iterator[tuple[str, Any]]


def text_lines(path: Path) -> Iterator[str]:
    """Lines of a text file with their ends; a line longer than `BLOCK_BYTES` comes in parts."""
    rest = ""
    for block in _blocks(path):
        *lines, rest = (rest + block).split("\n")
        for line in lines:
            yield line + "\n"
        if len(rest) >= BLOCK_BYTES:
            yield rest
            rest = ""
    if rest:
        yield rest


def json_lines(path: Path) -> Records:
    """One JSON value a line, with its place."""
    for number, line in _lines(path):
        if line.strip():
            yield f"{path}:{number}", _loads(line, f"{path}:{number}", "one object a line")


def json_records(path: Path) -> Records:
    """The values of one JSON list, or JSON values one after another, with their places."""
    blocks = _blocks(path)
    decoder, expected = json.JSONDecoder(object_pairs_hook=once), "a list of objects, or objects one after another"
    text, number, ended = "", 0, False
    in_list: bool | None = None
    while True:
        text = text.lstrip(" \t\r\n," if in_list and number else None)
        if text and in_list is None:
            in_list = text.startswith("[")
            text = text[in_list:].lstrip()
        if (in_list and text.startswith("]")) or (ended and not text and not in_list):
            return
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError) as error:
            if ended or len(text) > RECORD_BYTES or isinstance(error, RecursionError):
                raise _not_json(f"{path}: record {number}", error, expected) from None
            more = _at_least(blocks, max(BLOCK_BYTES, len(text)))  # twice as much each time: no record is parsed often
            text, ended = text + more, not more
            continue
        yield f"{path}: record {number}", value
        text, number = text[end:], number + 1


def _at_least(blocks: Iterator[str], size: int) -> str:
    parts: list[str] = []
    while size > 0 and (block := next(blocks, "")):
        parts.append(block)
        size -= len(block)
    return "".join(parts)


def csv_records(path: Path, delimiter: str, choose: Callable[[list[str]], list[str]]) -> Records:
    """Rows as objects by the header's names, with the columns that `choose` takes of them, and their places."""
    csv.field_size_limit(RECORD_BYTES)
    rows = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise CorpusError(f"{path}:1: the header has a name twice: {', '.join(header)[:200]}: rename one of them")
        other = next((mark for mark in DELIMITERS if len(header) == 1 and mark in header[0]), None)
        if other is not None:
            raise CorpusError(
                f"{path}:1: the header {header[0][:200]!r} is one field: expected {delimiter!r} between fields, as "
                "spreadsheets write that save CSV in English, or tabs in a .tsv"
            )
        columns = set(choose(header)) if header else set()
        for row in rows:
            if not row:
                continue
            where = f"{path}:{rows.line_num}"
            if len(row) != len(header):
                raise CorpusError(
                    f"{where}: got {len(row)} fields: expected {len(header)}, as in the header: put quotes around "
                    "fields that hold the delimiter or a line end"
                )
            yield where, {name: field for name, field in zip(header, row, strict=True) if name in columns}
    except csv.Error as error:
        raise CorpusError(
            f"{path}:{rows.line_num}: not valid CSV: {error}: close each quote, and double those within quotes"
        ) from None


def unreadable(path: Path, error: BaseException) -> CorpusError:
    """The message for a file that is cut off or damaged."""
    return CorpusError(
        f"{path}: cannot be read: {first_line(error)}: if the file is cut off or damaged, fetch it again"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _loads(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error, expected) from None


def _not_json(where: str, error: Exception, expected: str) -> CorpusError:
    return CorpusError(f"{where}: not valid JSON: {first_line(error)}: expected {expected}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their ends, numbered from 1; CorpusError for one that is longer than a record may be."""
    number = 0
    with _opened(path) as file:
        while line := file.read_line(RECORD_BYTES + 1):
            number += 1
            if len(line) > RECORD_BYTES:
                raise CorpusError(
                    f"{path}:{number}: a line of more than {RECORD_BYTES >> 20} MiB: expected one record a line: "
                    "divide the record, or give plain text as a .txt, whose lines may be of any length"
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, error) from None
            _check_text(path, number, text)
            yield number, text


def _blocks(path: Path) -> Iterator[str]:
    """The text of a file in blocks of about `BLOCK_BYTES`."""
    decoder, number, last = codecs.getincrementaldecoder("utf-8-sig")(), 1, False
    with _opened(path) as file:
        while not last:
            block = file.read(BLOCK_BYTES)
            last = not block
            try:
                text = decoder.decode(block, final=last)
            except UnicodeDecodeError as error:
                number += error.object.count(b"\n", 0, error.start)
                raise _not_utf8(path, number, error) from None
            _check_text(path, number, text)
            number += text.count("\n")
            if text:
                yield text


def _check_text(path: Path, number: int, text: str) -> None:
    """Raise CorpusError for NUL, which UTF-16 without its mark is full of, and text never holds."""
    if "\0" in text:
        number += text.count("\n", 0, text.index("\0"))
        advice = f"if it is UTF-16, convert the file: iconv -f UTF-16LE -t UTF-8 {path.name} > utf8-{path.name}"
        raise CorpusError(f"{path}:{number}: a NUL character, which no text holds: {advice}")


def _not_utf8(path: Path, number: int, error: UnicodeDecodeError) -> CorpusError:
    offset = error.start - (error.object.rfind(b"\n", 0, error.start) + 1)
    byte = f"byte 0x{error.object[error.start]:02x} at offset {offset} of the line"
    with open(path, "rb") as file:
        packing = next((suffix for start, suffix in PACKED.items() if file.peek(8).startswith(start)), None)
    advice = f"convert the file: iconv -f ENCODING -t UTF-8 {path.name} > utf8-{path.name}"
    if packing and path.suffix.lower() != packing:
        advice = f"it is packed: add {packing} to its name"
    return CorpusError(f"{path}:{number}: not valid UTF-8: {byte}: {advice}")


def grows(path: Path) -> CorpusError:
    """The message for a file that unpacks to far more than text would."""
    growth = f"grows to more than {MAX_GROWTH} times its size, as no text does"
    return CorpusError(f"{path}: {growth}: if it is text, unpack the file and give what comes out")


class _File:
    """A file that may be packed, read as far as it grows no more than text does."""

    def __init__(self, path: Path, file: Any, raw: BinaryIO):
        self.path, self.file, self.raw, self.done = path, file, raw, 0

    def read_line(self, limit: int) -> bytes:
        return self._checked(self.file.readline, limit)

    def read(self, size: int) -> bytes:
        return self._checked(self.file.read, size)

    def _checked(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            found = read(size)
        except (OSError, EOFError, MemoryError, lzma.LZMAError, zlib.error) as error:
            raise unreadable(self.path, error) from None
        self.done += len(found)
        if self.done > GROWTH_FLOOR and self.file is not self.raw and self.done > MAX_GROWTH * self.raw.tell():
            raise grows(self.path)
        return found


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    check_regular(path)
    with ExitStack() as stack:
        try:
            raw = stack.enter_context(open(path, "rb"))
            file = stack.enter_context(_unpacked(raw, path.suffix.lower()))
        except OSError as error:
            raise unreadable(path, error) from None
        yield _File(path, file, raw)


def _unpacked(raw: BinaryIO, suffix: str) -> Any:
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    return openers[suffix](raw, "rb") if suffix in openers else raw
