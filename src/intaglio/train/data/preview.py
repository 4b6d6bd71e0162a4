"""A look at what a model would be trained on, without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.errors import ConfigError
from intaglio.train.corpus import Corpus, load_corpus
from intaglio.train.data.reading import Reading
from intaglio.train.data.sources import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

SAMPLE_TOKENS = 200
COUNTS, ENDS = "[[", "]]"  # around what counts in the loss


@dataclass(frozen=True)
class Preview:
    """A record of the reading, the first documents as the model sees them, and warnings."""

    reading: Reading
    samples: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The preview as values of JSON."""
        return {"read": self.reading.lines(), "samples": list(self.samples), "warnings": list(self.warnings)}


def preview(data: Data, tokenizer: Tokenizer, *, max_tokens: int, assistant_only: bool, samples: int = 3) -> Preview:
    """Read `data` as training does, up to `max_tokens`. Samples show special tokens, and in brackets what counts.

    Raises ConfigError for a tokenizer without bos, which tells documents apart; else as `load_corpus` does.
    """
    if tokenizer.bos_token_id is None:
        raise ConfigError("the tokenizer has no bos, so documents cannot be shown one by one: add bos_token to it")
    corpus = load_corpus(
        data,
        tokenizer,
        sequence_length=2,
        vocab_size=len(tokenizer),
        max_tokens=max_tokens,
        assistant_only=assistant_only,
    )
    assert corpus.reading is not None
    tokens_M = corpus.tokens.reshape(-1)
    starts = np.flatnonzero(tokens_M == tokenizer.bos_token_id)
    shown = tuple(
        _shown(corpus, tokenizer, int(begin), int(end))
        for begin, end in zip(starts[:samples], [*starts[1:], len(tokens_M)], strict=False)
    )
    return Preview(corpus.reading, shown, tuple(_warnings(corpus, tokenizer, len(starts))))


def _shown(corpus: Corpus, tokenizer: Tokenizer, begin: int, end: int) -> str:
    stop = min(end, begin + SAMPLE_TOKENS)
    ids = corpus.tokens.reshape(-1)[begin:stop]
    counted = np.ones(len(ids), dtype=bool) if corpus.loss_mask is None else corpus.loss_mask.reshape(-1)[begin:stop]
    edges = np.flatnonzero(np.diff(counted.astype(np.int8))) + 1
    parts = []
    for part, counts in zip(np.split(ids, edges), np.split(counted, edges), strict=True):
        text = str(tokenizer.decode(part, skip_special_tokens=False))
        parts.append(f"{COUNTS}{text}{ENDS}" if counts[0] and corpus.loss_mask is not None else text)
    return "".join(parts) + (f" ... {end - stop} tokens more" if stop < end else "")


def _warnings(corpus: Corpus, tokenizer: Tokenizer, starts: int) -> list[str]:
    reading = corpus.reading
    assert reading is not None
    found = []
    if starts > reading.documents:
        found.append(f"{starts - reading.documents} bos tokens lie inside documents: are several joined into one?")
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    own = [token for token in tokenizer.added_tokens_decoder if token not in ends]
    if reading.chats and not np.isin(corpus.tokens, own).any():
        found.append("chats have no special tokens but bos and eos: is the chat template that of this model?")
    share = reading.counted / reading.tokens
    if share < 0.05:
        found.append(f"only {share:.1%} of the tokens count in the loss")
    return found
