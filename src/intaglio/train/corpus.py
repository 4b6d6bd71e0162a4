"""Text in, token sequences out: what training reads and what evaluation is measured on.

    source -> pieces of documents -> batches through the tokenizer -> one stream -> sequences

A source is a file, a folder of files or a dataset's name; it is streamed, no further than needed.
Special tokens that a text spells out become those tokens, so that text in which a chat template was
applied already is read as it was meant.

Shape suffixes: N sequences, T tokens of a sequence, M tokens of a stream, B sequences of a batch.
`stream_2M` is int32: row 0 the tokens, row 1 a one where a document starts, else zero.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray

from intaglio.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

SUFFIXES = (".txt", ".txt.gz", ".txt.xz", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
DATASET_NAME = re.compile(r"([^:@]+)(?::([^:@]+))?(?:@([^@]+))?")
# Gemma's tokenizer takes what it is given for one long word. A long document goes through it in pieces of
# whole lines: memory stays bounded, and the tokens stay as they are, since none holds a line end and text.
PIECE_CHARACTERS = 1 << 16
BATCH_PIECES = 32

IntArray = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Packed training sequences.

    tokens: int32 [N, T].
    positions: int32 [N, T]; 0 at the start of a sequence and of a document. Given as position_ids
        without an attention mask, they make transformers keep the documents apart.
    source: where the text came from.
    """

    tokens: IntArray
    positions: IntArray
    source: str

    @property
    def digest(self) -> str:
        """sha256 of the shape, tokens and positions, in hexadecimal."""
        digest = hashlib.sha256(str(self.tokens.shape).encode())
        for array in (self.tokens, self.positions):
            digest.update(array.astype("<i4").tobytes())
        return digest.hexdigest()


class Piece(NamedTuple):
    """Text of a document: its start, unless `starts` is false; its end, to mark with eos, if `ends` is true."""

    text: str
    starts: bool
    ends: bool


def load_corpus(
    source: str | Path, tokenizer: Tokenizer, *, sequence_length: int, vocab_size: int, max_tokens: int | None = None
) -> Corpus:
    """Tokenize `source` and pack it into sequences of `sequence_length` tokens.

    source: a file (`SUFFIXES`; a form feed parts the documents of a .txt), a folder of such files, or a
        dataset that `datasets` can stream, as name, name:config, name@split or name:config@split.
    max_tokens: reading stops there. An incomplete last sequence is dropped.

    Each document has bos in front. Plain text has eos behind; a chat template ends its own. A document
    that is cut goes on in the next sequence. Raises CorpusError for text that cannot be read or is too
    short, ConfigError for a token that is not below `vocab_size`.
    """
    _check_sizes(sequence_length, max_tokens)
    parts = _tokenize(_read(source, tokenizer), tokenizer, str(source), vocab_size, eos=tokenizer.eos_token_id)
    return _pack(_gather(parts, str(source), sequence_length, max_tokens), sequence_length, str(source))


def held_out_windows(
    source: str | Path, tokenizer: Tokenizer, *, length: int, vocab_size: int, max_tokens: int | None = None
) -> IntArray:
    """Evaluation windows, int32 [N, length]: bos, then the next `length - 1` tokens of the stream.

    The stream is the documents, each behind a bos, and a window reads on from one into the next, as in
    llama.cpp's perplexity. (That writes a window's bos over a token of the stream; here none is lost.)
    A bos that would follow a window's bos is left out. The windows hold `max_tokens` at most. Raises
    as `load_corpus` does.
    """
    _check_sizes(length, max_tokens)
    parts = _tokenize(_read(source, tokenizer), tokenizer, str(source), vocab_size, eos=None)
    tokens_M = _gather(parts, str(source), length, max_tokens)[0]
    bos = tokenizer.bos_token_id
    head = np.array([] if bos is None else [bos], dtype=np.int32)
    body = length - len(head)
    starts = islice(_window_starts(tokens_M, bos, body), max_tokens and max_tokens // length)
    return np.stack([np.concatenate([head, tokens_M[at : at + body]]) for at in starts])


def sample_corpus(
    teacher: PreTrainedModel,
    tokenizer: Tokenizer,
    *,
    tokens: int,
    sequence_length: int,
    seed: int,
    batch_size: int = 16,
    on_progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Training text without data: documents from bos to eos that the teacher samples.

    Temperature 1, full distribution; a document has `sequence_length` tokens at most. As many sequences
    as hold `tokens` tokens, the same for a seed on one machine; torch's random state stays as it was.
    `on_progress` hears the tokens done so far after every `batch_size` documents. Raises ConfigError
    for a tokenizer without bos or eos.
    """
    from transformers import GenerationConfig

    _check_sizes(sequence_length, None)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None or eos is None:
        raise ConfigError(f"the tokenizer has bos {bos} and eos {eos}: sampling a corpus needs both")
    # generate() fills what is missing here from the model's own settings, and those narrow top_k and top_p.
    neutral: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    special = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
    settings = GenerationConfig(
        do_sample=True, use_cache=True, max_new_tokens=sequence_length - 1, **neutral, **special
    )
    start_B1 = torch.full((batch_size, 1), bos, device=teacher.device)
    generate: Any = teacher.generate
    wanted = -(-tokens // sequence_length) * sequence_length
    parts: list[IntArray] = []
    done = 0
    with torch.random.fork_rng(devices=[teacher.device] if teacher.device.type == "cuda" else []):
        torch.manual_seed(seed)
        while done < wanted:
            sampled_BT = generate(start_B1, attention_mask=torch.ones_like(start_B1), generation_config=settings)
            for ids in sampled_BT.tolist():
                end = ids.index(eos, 1) + 1 if eos in ids[1:] else len(ids)  # padding follows
                parts.append(_stream(ids[:end], starts=True))
                done += end
            if on_progress is not None:
                on_progress(min(done, wanted))
    source = f"sampled from the teacher, seed {seed}"
    return _pack(_gather(parts, source, sequence_length, wanted), sequence_length, source)


def batch_indices(n_sequences: int, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
    """The sequences of optimizer step `step`, int64 [B]: a pure function, so resuming needs no state.

    Every epoch is a permutation of its own; batches run through the epochs without a gap.
    """
    epoch, offset = divmod(step * batch_size, n_sequences)
    epochs = range(epoch, epoch - (-(offset + batch_size) // n_sequences))
    order = np.concatenate([np.random.default_rng((seed, e)).permutation(n_sequences) for e in epochs])
    return order[offset : offset + batch_size]


def _check_sizes(length: int, max_tokens: int | None) -> None:
    if length < 2:
        raise CorpusError(f"sequences of {length} tokens: expected 2 or more")
    if max_tokens is not None and max_tokens < length:
        raise CorpusError(
            f"at most {max_tokens} tokens: expected {length} or more, the length of one sequence: "
            "raise schedule.tokens, or --eval-tokens where held-out text is read"
        )


def _read(source: str | Path, tokenizer: Tokenizer) -> Iterator[Piece]:
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


def _tokenize(
    pieces: Iterable[Piece], tokenizer: Tokenizer, source: str, vocab_size: int, *, eos: int | None
) -> Iterator[IntArray]:
    """Streams [2, M_i], one a piece, with bos in front of documents and `eos`, unless it is None, behind."""
    bos = tokenizer.bos_token_id
    pieces = iter(pieces)
    while batch := list(islice(pieces, BATCH_PIECES)):
        ids_of = tokenizer([piece.text for piece in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for piece, ids in zip(batch, ids_of, strict=True):
            head = [bos] if piece.starts and bos is not None and ids[:1] != [bos] else []
            tail = [eos] if piece.ends and eos is not None else []
            stream = _stream([*head, *ids, *tail], piece.starts)
            largest = int(stream[0].max(initial=0))
            if largest >= vocab_size:
                raise ConfigError(
                    f"{source}: the tokenizer, of {len(tokenizer)} tokens, gives token {largest}, which the model's "
                    f"vocabulary of {vocab_size} has not: use the tokenizer that belongs to the model"
                )
            yield stream


def _stream(ids: list[int], starts: bool) -> IntArray:
    stream_2M = np.zeros((2, len(ids)), dtype=np.int32)
    stream_2M[0] = ids
    stream_2M[1, :1] = starts
    return stream_2M


def _gather(parts: Iterable[IntArray], source: str, length: int, max_tokens: int | None) -> IntArray:
    """One stream [2, M] of parts until `max_tokens` are there. Raises CorpusError for less than `length`."""
    taken: list[IntArray] = []
    done = 0
    for part in parts:
        taken.append(part)
        done += part.shape[1]
        if max_tokens is not None and done >= max_tokens:
            break
    if done == 0:
        raise CorpusError(f"{source}: empty: expected text")
    if done < length:
        raise CorpusError(f"{source}: got {done} tokens: expected {length} or more, the length of one sequence")
    return np.concatenate(taken, axis=1)[:, :max_tokens]


def _pack(stream_2M: IntArray, length: int, source: str) -> Corpus:
    whole = stream_2M.shape[1] // length * length
    tokens_NT, starts_NT = stream_2M[:, :whole].reshape(2, -1, length)
    index_T = np.arange(length, dtype=np.int32)
    return Corpus(tokens_NT, index_T - np.maximum.accumulate(starts_NT * index_T, axis=1), source)


def _window_starts(tokens_M: IntArray, bos: int | None, body: int) -> Iterator[int]:
    at = 0
    while at + body <= len(tokens_M):
        if tokens_M[at] == bos:
            at += 1
        else:
            yield at
            at += body
