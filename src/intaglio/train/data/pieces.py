"""Documents in pieces for the tokenizer, from whatever a source is."""

from __future__ import annotations

import io
from collections.abc import Generator, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from intaglio.errors import CorpusError
from intaglio.packed.template import Renderer
from intaglio.train.data import files, tables
from intaglio.train.data.reading import Reading
from intaglio.train.data.records import Document, Reader, Spans
from intaglio.train.data.sources import (
    Source,
    choose,
    expected_kinds,
    find_files,
    kind_of,
    located,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# Gemma's tokenizer takes what it is given for one long word. A long document goes through it in pieces of
# whole lines: memory stays bounded, and the tokens stay as they are, since none holds a line end and text.
# Only lines and blank stretches that are longer than four pieces are cut where it may show.
PIECE_CHARACTERS = 1 << 16
LONGEST_PIECES = 4


class Piece(NamedTuple):
    """Text of a document: its start, unless `starts` is false; its end, to mark with eos, if `ends` is true.

    last: whether it is the document's last. spans: parts of the text that an assistant wrote.
    """

    text: str
    starts: bool
    ends: bool
    last: bool
    spans: Spans


def read_pieces(
    source: Source, tokenizer: Tokenizer, reading: Reading, *, purpose: str = "training", spans: bool = False
) -> Generator[Piece]:
    """The documents of a source in pieces; `reading` is filled on the way. CorpusError says what cannot be read, where.

    purpose: "training" or "evaluation", which takes other splits. spans: find out what an assistant wrote.
    """
    with Renderer(tokenizer) as renderer:
        reader = Reader(renderer, source.columns, reading, spans=spans)
        for document in _documents(source, reader, reading, purpose):
            yield from document
    if not reading.documents and reading.empty:
        raise CorpusError(f"{source}: no text in any of {len(reading.empty):,} rows, the first is {reading.empty[0]}")


def _documents(source: Source, reader: Reader, reading: Reading, purpose: str) -> Iterator[Iterator[Piece]]:
    path, split = located(source)
    if path.is_dir():
        saved = _saved_folders(path, split, purpose, reading)
        if saved is not None:
            for folder in saved:
                reading.files.append(folder.name)
                rows = tables.saved_records(folder, lambda names, at=folder: reader.columns(names, str(at)))  # type: ignore[misc]
                yield from _of_records(rows, reader, reading)
            return
        for file in find_files(path, split, purpose, reading):
            reading.files.append(file.relative_to(path).as_posix())
            yield from _of_file(file, reader, reading)
    elif path.exists():
        reading.files.append(path.name)
        yield from _of_file(path, reader, reading)
    elif isinstance(source.name, Path) or kind_of(path) or source.name.startswith((".", "/", "~")):
        raise CorpusError(f"{source}: no such file or folder")
    else:
        reading.files.append(str(source))
        rows = tables.named_records(str(source), lambda names: reader.columns(names, str(source)))
        yield from _of_records(rows, reader, reading)


def _saved_folders(path: Path, split: str | None, purpose: str, reading: Reading) -> list[Path] | None:
    """Folders that `save_to_disk` wrote; None if `path` is another kind of folder."""
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return [path]
    if not (path / "dataset_dict.json").is_file():
        return None
    splits = [inner.name for inner in sorted(path.iterdir()) if (inner / "state.json").is_file()]
    named: dict[str, str | None] = {name: name for name in splits}
    return [path / name for name in choose(named, path, split, purpose, reading)]


def _of_file(path: Path, reader: Reader, reading: Reading) -> Iterator[Iterator[Piece]]:
    kind = kind_of(path)
    if not kind:
        raise CorpusError(f"{path}: unknown kind of file: expected a name that ends in {expected_kinds()}")
    if kind in (".txt", ".md"):
        for _, lines in groupby(_text_lines(path), key=itemgetter(0)):
            yield _counted(_pieces((line for _, line in lines), [], ends=True), reading)
        return

    def columns(names: list[str]) -> list[str]:
        return reader.columns(names, str(path))

    if kind == ".parquet":
        records = tables.parquet_records(path, columns)
    elif kind == ".json":
        records = files.json_records(path)
    elif kind in (".csv", ".tsv"):
        records = files.csv_records(path, "\t" if kind == ".tsv" else ",", columns)
    else:
        records = files.json_lines(path)
    yield from _of_records(records, reader, reading)


def _of_records(records: files.Records, reader: Reader, reading: Reading) -> Iterator[Iterator[Piece]]:
    for where, record in records:
        document = reader.document(record, where)
        if document is not None:
            yield _counted(_in_pieces(document), reading)


def _counted(pieces: Iterator[Piece], reading: Reading) -> Iterator[Piece]:
    for piece in pieces:
        reading.documents += piece.starts
        yield piece


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line with the number of its document; a form feed begins the next document."""
    document = 0
    for line in files.text_lines(path):
        first, *others = line.split("\f")
        yield document, first
        for part in others:
            document += 1
            yield document, part


def _in_pieces(document: Document) -> Iterator[Piece]:
    longest = LONGEST_PIECES * PIECE_CHARACTERS
    lines = (line[at : at + longest] for line in io.StringIO(document.text) for at in range(0, len(line), longest))
    return _pieces(lines, document.spans, ends=document.ends)


def _pieces(lines: Iterable[str], spans: Spans, *, ends: bool) -> Iterator[Piece]:
    """One document in pieces; none if it is blank. Blank lines stay with the line before: line ends merge."""
    buffer: list[str] = []
    size, begin, starts = 0, 0, True

    def piece(*, last: bool) -> Piece:
        text = "".join(buffer)
        inside = [
            (max(b - begin, 0), min(e - begin, len(text))) for b, e in spans if b < begin + len(text) and e > begin
        ]
        return Piece(text, starts, ends=ends and last, last=last, spans=inside)

    for line in lines:
        blank = not line.strip()
        if (size >= PIECE_CHARACTERS and not blank) or size >= LONGEST_PIECES * PIECE_CHARACTERS:
            found = piece(last=False)
            if not (starts and blank and not found.text.strip()):  # a long blank stretch in front is left out
                yield found
                starts = False
            buffer, begin, size = [], begin + size, 0
        buffer.append(line)
        size += len(line)
    found = piece(last=True)
    if not starts or found.text.strip():
        yield found
