"""Text in, token sequences out: what training reads and what evaluation is measured on.

    source -> pieces of documents -> batches through the tokenizer -> one stream -> sequences

A source is a file, a folder of files or a dataset's name; it is streamed, no further than needed.
Special tokens that a text spells out become those tokens, so that text in which a chat template was
applied already is read as it was meant.

Shape suffixes: N sequences, T tokens of a sequence, M tokens of a stream, B sequences of a batch.
`stream_2M` is int32: row 0 the tokens, row 1 a one where a document starts, else zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from intaglio.errors import ConfigError, CorpusError
from intaglio.train.text import Piece, read_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

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
    parts = _tokenize(read_pieces(source, tokenizer), tokenizer, str(source), vocab_size, eos=tokenizer.eos_token_id)
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
    parts = _tokenize(read_pieces(source, tokenizer), tokenizer, str(source), vocab_size, eos=None)
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
