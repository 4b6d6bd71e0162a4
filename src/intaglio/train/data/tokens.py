"""Tokens out of pieces of documents, with where documents start and which tokens count in the loss.

Shape suffix: M tokens of a stream.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from intaglio.errors import ConfigError
from intaglio.train.data.pieces import Piece
from intaglio.train.data.reading import Reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

BATCH_PIECES = 32

IntArray = NDArray[np.int32]


class Stream(NamedTuple):
    """tokens_M: int32 [M]. starts_M: bool [M], true where a document starts. counted_M: bool [M], true for labels."""

    tokens_M: IntArray
    starts_M: NDArray[np.bool_]
    counted_M: NDArray[np.bool_]


def tokenize(
    pieces: Generator[Piece],
    tokenizer: Tokenizer,
    reading: Reading,
    vocab_size: int,
    *,
    eos: int | None,
    masked: bool = False,
) -> Generator[Stream]:
    """Streams, one a piece, with one bos in front of documents and one `eos`, unless it is None, behind.

    masked: let only tokens in a piece's spans count.
    """
    bos = tokenizer.bos_token_id
    counts = False
    with closing(pieces):
        while batch := [_trimmed(piece, tokenizer) for piece in islice(pieces, BATCH_PIECES)]:
            texts = [piece.text for piece in batch]
            found = tokenizer(texts, add_special_tokens=False, verbose=False, return_offsets_mapping=masked)
            for at, piece in enumerate(batch):
                ids = np.array(found["input_ids"][at], dtype=np.int32)
                counted = np.full(len(ids), not masked)
                if masked and len(ids):
                    begins = np.array(found["offset_mapping"][at])[:, 0]
                    for begin, end in piece.spans:
                        counted |= (begins >= begin) & (begins < end)
                stream = _with_ends(ids, counted, piece, bos, eos)
                _check_vocabulary(stream.tokens_M, vocab_size, len(tokenizer), reading.source)
                counts = bool(stream.counted_M.any()) or (counts and not piece.starts)
                reading.masked += piece.last and not counts
                yield stream


def _trimmed(piece: Piece, tokenizer: Tokenizer) -> Piece:
    """A piece without white space around the bos and eos that it spells out, such as the line end of its file."""
    text, spans = piece.text, piece.spans
    if piece.last and tokenizer.eos_token and text.rstrip().endswith(tokenizer.eos_token):
        text = text.rstrip() if piece.ends else text
    if piece.starts and tokenizer.bos_token and text.lstrip().startswith(tokenizer.bos_token):
        cut = len(text) - len(text.lstrip())
        text, spans = text[cut:], [(begin - cut, end - cut) for begin, end in spans]
    return piece._replace(text=text, spans=spans)


def _with_ends(ids: IntArray, counted: NDArray[np.bool_], piece: Piece, bos: int | None, eos: int | None) -> Stream:
    """A piece with exactly one bos and eos where they belong, however many the text spells out there."""
    if piece.starts and bos is not None:
        first = int(np.argmax(np.append(ids, ~bos) != bos))
        ids, counted = np.append(np.int32(bos), ids[first:]), np.append(False, counted[first:])
    if piece.ends and eos is not None:
        rest = len(ids) - int(np.argmax(np.append(ids[::-1], ~eos) != eos))
        counts = bool(counted[:rest].any() and counted[rest - 1])
        ids, counted = np.append(ids[:rest], np.int32(eos)), np.append(counted[:rest], counts)
    starts = np.zeros(len(ids), dtype=bool)
    starts[:1] = piece.starts
    return Stream(ids, starts, counted)


def _check_vocabulary(ids: IntArray, vocab_size: int, known: int, source: str) -> None:
    largest = int(ids.max(initial=0))
    if largest >= vocab_size:
        raise ConfigError(
            f"{source}: the tokenizer, of {known} tokens, gives token {largest}, which the model's "
            f"vocabulary of {vocab_size} has not: use the tokenizer that belongs to the model"
        )
