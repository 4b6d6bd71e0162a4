"""Documents out of files, folders and datasets: plain text, records with text, and chats.

A source is streamed, no further than needed. Chats pass the tokenizer's own template.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from intaglio.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

SUFFIXES = (".txt", ".txt.gz", ".txt.xz", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
DATASET_NAME = re.compile(r"([^:@]+)(?::([^:@]+))?(?:@([^@]+))?")
# Gemma's tokenizer takes what it is given for one long word. A long document goes through it in pieces of
# whole lines: memory stays bounded, and the tokens stay as they are, since none holds a line end and text.
PIECE_CHARACTERS = 1 << 16


class Piece(NamedTuple):
    """Text of a document: its start, unless `starts` is false; its end, to mark with eos, if `ends` is true."""

    text: str
    starts: bool
    ends: bool


def read_pieces(source: str | Path, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The documents of a file, a folder or a dataset in pieces. CorpusError says what cannot be read, and where."""
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _suffix(file) and not file.name.startswith("."))
        if not files:
            raise CorpusError(f"{path}: no text in this folder: expected files that end in {', '.join(SUFFIXES)}")
        for file in files:
            yield from _read_file(file, tokenizer)
    elif path.exists():
        yield from _read_file(path, tokenizer)
    elif isinstance(source, Path) or _suffix(path) or source.startswith((".", "/", "~")):
        raise CorpusError(f"{source}: no such file or folder")
    else:
        yield from _read_records(_dataset_records(source), tokenizer)


def _suffix(path: Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def _read_file(path: Path, tokenizer: Tokenizer) -> Iterator[Piece]:
    suffix = _suffix(path)
    if not suffix:
        raise CorpusError(f"{path}: unknown kind of file: expected a name that ends in {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        yield from _read_records(_parquet_records(path), tokenizer)
    elif suffix.startswith(".jsonl"):
        yield from _read_records(_json_records(path), tokenizer)
    else:
        for _, lines in groupby(_text_lines(path), key=itemgetter(0)):
            yield from _pieces((line for _, line in lines), ends=True)


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line with the number of its document; a form feed begins the next document."""
    document = 0
    for _, line in _lines(path):
        for i, part in enumerate(line.split("\f")):
            document += i > 0
            yield document, part


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their ends, numbered from 1."""
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    number = 0
    try:
        with openers.get(path.suffix.lower(), open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start} of the line"
        raise CorpusError(f"{path}:{number}: not valid UTF-8: {byte}: convert the file to UTF-8") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise _unreadable(path, error) from None


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{path}:{number}: not valid JSON: {error}: expected one object a line") from None
        yield f"{path}:{number}", record


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in ("messages", "text") if name in file.schema_arrow.names]
            if not columns:
                got = ", ".join(file.schema_arrow.names)
                raise CorpusError(f"{path}: got the columns {got}: expected text or messages")
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for record in batch.to_pylist():
                    yield f"{path}: row {row}", record
                    row += 1
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from None


def _dataset_records(source: str) -> Iterator[tuple[str, Any]]:
    import datasets

    match = DATASET_NAME.fullmatch(source)
    if match is None:
        raise CorpusError(f"{source!r}: no such file, and no dataset: expected name, name:config or name:config@split")
    name, config, split = match.groups()
    try:
        for number, record in enumerate(datasets.load_dataset(name, config, split=split or "train", streaming=True)):
            yield f"{source}: record {number}", record
    except Exception as error:  # every layer below, down to the socket, has exceptions of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        advice = "check the name, config, split and network, or give a local file"
        raise CorpusError(f"{source}: no such file, and no dataset that loads: {reason}: {advice}") from None


def _unreadable(path: Path, error: Exception) -> CorpusError:
    return CorpusError(f"{path}: cannot be read: {error}: if the file is cut off or damaged, fetch it again")


def _read_records(records: Iterable[tuple[str, Any]], tokenizer: Tokenizer) -> Iterator[Piece]:
    for where, record in records:
        if not isinstance(record, dict):
            raise CorpusError(f"{where}: got {type(record).__name__}: expected an object with text or messages")
        chat = record.get("messages") is not None
        if not chat and "text" not in record:
            raise CorpusError(f"{where}: got the keys {', '.join(record) or 'none'}: expected text or messages")
        text = _render(record["messages"], where, tokenizer) if chat else record["text"]
        if not isinstance(text, str):
            raise CorpusError(f"{where}: text is of type {type(text).__name__}: expected a string")
        if re.search("[\ud800-\udfff]", text):
            raise CorpusError(f"{where}: the text has half of a surrogate pair: expected valid Unicode")
        yield from _pieces(io.StringIO(text), ends=not chat)


def _render(messages: Any, where: str, tokenizer: Tokenizer) -> str:
    """The text of a chat, by the tokenizer's template."""
    if not isinstance(messages, list) or not messages:
        raise CorpusError(f"{where}: messages is {str(messages)[:80]!r}: expected a list of messages")
    for message in messages:
        pair = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(value, str) for value in pair):
            raise CorpusError(f"{where}: got message {str(message)[:80]}: expected strings role and content in it")
    if tokenizer.chat_template is None:
        raise CorpusError(f"{where}: messages, but the tokenizer has no chat template: give text, or add a template")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        raise CorpusError(f"{where}: the tokenizer's chat template refuses these messages: {error}") from None


def _pieces(lines: Iterable[str], *, ends: bool) -> Iterator[Piece]:
    """One document in pieces; none if it is blank. Blank lines stay with the line before: line ends merge."""
    buffer: list[str] = []
    size, starts = 0, True
    for line in lines:
        if size >= PIECE_CHARACTERS and line.strip():
            yield Piece("".join(buffer), starts, ends=False)
            buffer, size, starts = [], 0, False
        buffer.append(line)
        size += len(line)
    text = "".join(buffer)
    if text.strip():
        yield Piece(text, starts, ends)
