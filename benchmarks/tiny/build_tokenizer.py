"""Train the bundled model's tokenizer and tokenize the corpus with it.

The tokenizer has the structure of Gemma 4's: a byte-fallback BPE in which spaces are U+2581, with
Gemma 4's special tokens and chat turns, and ``<bos>`` in front by default. Like Gemma's it merges
over the whole text: the split into words below shapes only which merges are learned.

    python benchmarks/tiny/build_tokenizer.py

Writes the tokenizer files, and ``tokens.npz`` with the uint16 arrays ``train`` and
``heldout/SOURCE``, in which every document is ``<bos>`` tokens ``<eos>``.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GemmaTokenizer

VOCAB_SIZE = 4096
TRAINING_CHARS = 30_000_000  # merges are learned from this much of the corpus
ALPHABET_SIZE = 192  # rarer characters are spelled in bytes
MAX_TOKEN_CHARS = 16

CONTROL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
CHAT_TOKENS = {
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "escape_token": '<|"|>',
    "think_token": "<|think|>",
    "image_token": "<|image|>",
    "audio_token": "<|audio|>",
}
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]

# Words with the space before them, single digits, runs of newlines, spaces or punctuation.
WORDS = Regex(r"\n+|▁+(?=▁[\p{L}])|▁?\p{L}+(?:['’]\p{L}+)?|\p{N}|▁?[^\p{L}\p{N}▁\n]+|▁+")  # noqa: RUF001

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- set role = 'model' if message.role == 'assistant' else message.role -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content | trim -}}
    {%- else -%}
        {%- for part in message.content if part.type == 'text' -%}
            {{- part.text | trim -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def read_jsonl(path: Path) -> Iterator[dict[str, str]]:
    """The records of a corpus file."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def training_texts(path: Path) -> Iterator[str]:
    """The first ``TRAINING_CHARS`` of the corpus, which is in random order, without chat tokens."""
    chars = 0
    for record in read_jsonl(path):
        text = record["text"]
        for token in CHAT_TOKENS.values():
            text = text.replace(token, "")
        yield text
        chars += len(text)
        if chars > TRAINING_CHARS:
            return


def alphabet(texts: list[str]) -> list[str]:
    """The most frequent characters: ties go by code point, so that the same text gives the same list."""
    counts = Counter(chain.from_iterable(texts))
    counts["▁"] = counts.pop(" ")
    return sorted(counts, key=lambda character: (-counts[character], character))[:ALPHABET_SIZE]


def learn_bpe(texts: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: control, chat and byte tokens first, then what BPE learns."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(WORDS, "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=CONTROL_TOKENS + list(CHAT_TOKENS.values()) + BYTE_TOKENS,
        initial_alphabet=alphabet(texts),
        limit_alphabet=ALPHABET_SIZE,
        max_token_length=MAX_TOKEN_CHARS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def gemma_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> GemmaTokenizer:
    """transformers' Gemma tokenizer around a vocabulary, with Gemma 4's special tokens."""
    tokenizer = GemmaTokenizer(
        vocab=vocab,
        merges=merges,
        add_bos_token=True,
        extra_special_tokens=CHAT_TOKENS,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tokenize(path: Path, tokenizer: GemmaTokenizer) -> dict[str, np.ndarray]:
    """The token stream of every source in a corpus file, in the file's order under ``"all"``."""
    records = list(read_jsonl(path))
    encoded = tokenizer._tokenizer.encode_batch_fast([record["text"] for record in records])
    documents = [[*encoding.ids, tokenizer.eos_token_id] for encoding in encoded]
    streams = {"all": documents}
    for record, document in zip(records, documents, strict=True):
        streams.setdefault(record["source"], []).append(document)
    return {name: np.concatenate(parts).astype(np.uint16) for name, parts in streams.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--corpus", type=Path, default=Path(".data/corpus"))
    parser.add_argument("--out", type=Path, default=Path(".data/tokenizer"))
    parser.add_argument("--tokens", type=Path, default=Path(".data/tokens.npz"))
    args = parser.parse_args()

    tokenizer = gemma_tokenizer(*learn_bpe(list(training_texts(args.corpus / "train.jsonl"))))
    tokenizer.save_pretrained(args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.out)

    train = tokenize(args.corpus / "train.jsonl", tokenizer)
    heldout = tokenize(args.corpus / "heldout.jsonl", tokenizer)
    for source in train:
        print(f"{source:20} {len(train[source]):11,} + {len(heldout[source]):9,} tokens")
    arrays = {f"heldout/{source}": ids for source, ids in heldout.items() if source != "all"}
    np.savez_compressed(args.tokens, train=train["all"], **arrays)


if __name__ == "__main__":
    main()
