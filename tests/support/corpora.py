"""A tokenizer with a token a byte, and helpers to load small corpora with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from intaglio.train.corpus import Corpus, load_corpus

PAD, EOS, BOS, LINE_ENDS = 0, 1, 2, 3
SPECIAL = ["<pad>", "<eos>", "<bos>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = len(SPECIAL) + 1 + len(BYTES)
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LINE_END = "\u010a"  # how byte-level tokenizers spell "\n"


def byte_tokenizer(template: str | None = TEMPLATE, **special: str | None) -> PreTrainedTokenizerFast:
    """A token a byte, except that two line ends are one token."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, LINE_END * 2, *BYTES])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(LINE_END, LINE_END)]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names)
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = byte_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def load(source: Any, length: int = 4, tokenizer: PreTrainedTokenizerFast = TOKENIZER, **kwargs: Any) -> Corpus:
    return load_corpus(source, tokenizer, **{"sequence_length": length, "vocab_size": VOCAB} | kwargs)


def texts_of(corpus: Corpus) -> list[str]:
    """The documents of a corpus of `length` 2 tokens a sequence, less the last token of an odd number of them."""
    whole = TOKENIZER.decode(corpus.tokens.reshape(-1), skip_special_tokens=False)
    return [text for text in whole.split("<bos>") if text]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path
