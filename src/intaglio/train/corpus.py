"""Text in, token sequences out: what training reads and what evaluation is measured on.

    source -> pieces of documents -> batches through the tokenizer -> one stream -> sequences

A source is a file, a folder of files or a dataset's name; it is streamed, no further than needed.
Special tokens that a text spells out become those tokens, so that text in which a chat template was
applied already is read as it was meant.

Shape suffixes: N sequences, T tokens of a sequence, M tokens of a stream, B sequences of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from intaglio.errors import ConfigError, CorpusError
from intaglio.progress import Progress
from intaglio.train.data.pieces import read_pieces
from intaglio.train.data.reading import Reading
from intaglio.train.data.sources import Data, as_source
from intaglio.train.data.tokens import IntArray, Stream, tokenize
from intaglio.train.sharding import from_all, rank, settle, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True, eq=False)
class Corpus:
    """Packed training sequences.

    tokens: int32 [N, T].
    positions: int32 [N, T]; 0 at the start of a sequence and of a document. Given as position_ids
        without an attention mask, they make transformers keep the documents apart.
    source: where the text came from.
    loss_mask: bool [N, T], true where the token at this place is a label that counts in the loss. The logits of
        place t are those of the label at t + 1. None: every token counts.
    reading: what was read, and what was not.
    """

    tokens: IntArray
    positions: IntArray
    source: str
    loss_mask: NDArray[np.bool_] | None = None
    reading: Reading | None = None

    @property
    def digest(self) -> str:
        """sha256 of the shape, tokens, positions and loss mask, in hexadecimal."""
        digest = hashlib.sha256(str(self.tokens.shape).encode())
        for array in (self.tokens, self.positions):
            digest.update(array.astype("<i4").tobytes())
        if self.loss_mask is not None:
            digest.update(b"loss mask" + np.packbits(self.loss_mask).tobytes())
        return digest.hexdigest()

    def rows(self, chosen: slice | NDArray[np.int64]) -> Corpus:
        """The corpus of these sequences."""
        mask = None if self.loss_mask is None else self.loss_mask[chosen]
        return replace(self, tokens=self.tokens[chosen], positions=self.positions[chosen], loss_mask=mask)


def load_corpus(
    source: Data,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    vocab_size: int,
    max_tokens: int | None = None,
    assistant_only: bool = False,
) -> Corpus:
    """Tokenize `source` and pack it into sequences of `sequence_length` tokens.

    source: a file (`data.sources.KINDS`; a form feed parts the documents of a .txt), a folder of such files, of which
        its train split is read if it has splits, or a dataset that `datasets` can stream, as name, name:config,
        name@split or name:config@split; as a `Source` with names of columns.
    max_tokens: reading stops there. An incomplete last sequence is dropped.
    assistant_only: fill `loss_mask`, so that only what an assistant says in chats counts, with the token that ends its
        turn, and the completions of prompts.

    Each document has one bos in front. Plain text has one eos behind; a chat template ends its own. A document
    that is cut goes on in the next sequence. Raises CorpusError for text that cannot be read, is too short or has no
    token that counts, ConfigError for a token that is not below `vocab_size`.
    """
    _check_sizes(sequence_length, max_tokens)
    if assistant_only and not tokenizer.is_fast:
        raise ConfigError(
            "assistant_only needs to know where tokens lie in the text: save the tokenizer as tokenizer.json"
        )
    reading = Reading(str(source))
    pieces = read_pieces(as_source(source), tokenizer, reading, spans=assistant_only)
    parts = tokenize(pieces, tokenizer, reading, vocab_size, eos=tokenizer.eos_token_id, masked=assistant_only)
    with closing(parts):
        stream = _gather(parts, reading, sequence_length, max_tokens)
    corpus = _pack(stream, sequence_length, str(source))
    reading.tokens = reading.counted = corpus.tokens.size
    if assistant_only:
        assert corpus.loss_mask is not None
        reading.counted = int(corpus.loss_mask.sum())
        if not reading.counted:
            raise CorpusError(
                f"{source}: no token counts in the loss: assistant_only learns what assistants say in chats and the "
                "completions of prompts, and there is none: leave it out with --set schedule.assistant_only=false"
            )
    return replace(corpus, loss_mask=corpus.loss_mask if assistant_only else None, reading=reading)


def held_out_windows(
    source: Data, tokenizer: Tokenizer, *, length: int, vocab_size: int, max_tokens: int | None = None
) -> IntArray:
    """Evaluation windows, int32 [N, length]: bos, then the next `length - 1` tokens of the stream.

    The stream is the documents, each behind a bos, and a window reads on from one into the next, as in
    llama.cpp's perplexity. (That writes a window's bos over a token of the stream; here none is lost.)
    A bos that would follow a window's bos is left out. The windows hold `max_tokens` at most. Of a folder
    with splits the validation split is read, else the test split. Raises as `load_corpus` does.
    """
    _check_sizes(length, max_tokens)
    reading = Reading(str(source))
    pieces = read_pieces(as_source(source), tokenizer, reading, purpose="evaluation")
    with closing(tokenize(pieces, tokenizer, reading, vocab_size, eos=None)) as parts:
        tokens_M = _gather(parts, reading, length, max_tokens).tokens_M
    bos = tokenizer.bos_token_id
    head = np.array([] if bos is None else [bos], dtype=np.int32)
    body = length - len(head)
    starts = islice(_window_starts(tokens_M, bos, body), max_tokens and max_tokens // length)
    return np.stack([np.concatenate([head, tokens_M[at : at + body]]) for at in starts])


SEEDS_APART = 1_000_003  # between processes that sample


def sample_corpus(
    teacher: PreTrainedModel,
    tokenizer: Tokenizer,
    *,
    tokens: int,
    sequence_length: int,
    seed: int,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Corpus:
    """Training text without data: documents from bos to eos that the teacher samples.

    Temperature 1, full distribution; a document has `sequence_length` tokens at most. As many sequences
    as hold `tokens` tokens, the same for a seed on one machine; torch's random state stays as it was. Of several
    processes each samples documents of its own, and all have the same corpus, which is another one for another number.
    progress: shows the tokens that are done, after every `batch_size` documents. Raises ConfigError for a tokenizer
    without bos or eos.
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
    parts: list[Stream] = []
    done = 0
    with torch.random.fork_rng(devices=[teacher.device] if teacher.device.type == "cuda" else []):
        torch.manual_seed(seed + SEEDS_APART * rank())
        while done < wanted:
            sampled_BT = generate(
                start_B1,
                attention_mask=torch.ones_like(start_B1),
                generation_config=settings,
                synced_gpus=world_size() > 1,  # a sharded teacher's forward needs all processes
            )
            for ids in (ids for sampled in from_all(sampled_BT.tolist()) for ids in sampled):
                end = ids.index(eos, 1) + 1 if eos in ids[1:] else len(ids)  # padding follows
                starts = np.arange(end) == 0
                parts.append(Stream(np.array(ids[:end], dtype=np.int32), starts, np.ones(end, dtype=bool)))
                done += end
            if progress is not None:
                progress.part(min(done, wanted), tokens, "tokens of its own")
    settle(teacher)
    source = f"sampled from the teacher, seed {seed}"
    corpus = _pack(_gather(parts, Reading(source), sequence_length, wanted), sequence_length, source)
    return replace(corpus, loss_mask=None)


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


def _gather(parts: Iterable[Stream], reading: Reading, length: int, max_tokens: int | None) -> Stream:
    """One stream of parts until `max_tokens` are there. Raises CorpusError for less than `length`."""
    taken: list[Stream] = []
    done = 0
    for part in parts:
        taken.append(part)
        done += len(part.tokens_M)
        if max_tokens is not None and done >= max_tokens:
            reading.complete = False
            break
    if done == 0:
        raise CorpusError(f"{reading.source}: empty: expected text")
    if done < length:
        raise CorpusError(f"{reading.source}: got {done} tokens: expected {length} or more, the length of one sequence")
    return Stream(*(np.concatenate(arrays)[:max_tokens] for arrays in zip(*taken, strict=True)))


def _pack(stream: Stream, length: int, source: str) -> Corpus:
    whole = len(stream.tokens_M) // length * length
    tokens_NT, counted_NT = stream.tokens_M[:whole].reshape(-1, length), stream.counted_M[:whole].reshape(-1, length)
    starts_NT = stream.starts_M[:whole].reshape(-1, length)
    index_T = np.arange(length, dtype=np.int32)
    positions_NT = index_T - np.maximum.accumulate(starts_NT * index_T, axis=1)
    return Corpus(tokens_NT, positions_NT, source, counted_NT)


def _window_starts(tokens_M: IntArray, bos: int | None, body: int) -> Iterator[int]:
    at = 0
    while at + body <= len(tokens_M):
        if tokens_M[at] == bos:
            at += 1
        else:
            yield at
            at += body
