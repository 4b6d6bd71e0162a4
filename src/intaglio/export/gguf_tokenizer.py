"""The tokenizer of a GGUF file, out of tokenizer.json.

Gemma 4 is a byte-fallback BPE, and llama.cpp's `gemma4` tokenizer takes its merges. Gemma 3 came
from SentencePiece, and llama.cpp's `llama` tokenizer takes a score for each token: it joins the
pair whose joint token scores highest. Both are what llama.cpp's own converter writes, with one
exception: it makes Gemma 4's added tokens normal ones where they are not special, and llama.cpp
then spells `<table>` in letters where transformers finds a token. Here they are user-defined.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from intaglio.errors import ConfigError

# Special to transformers, but a chat parser has to see them in the output.
VISIBLE = {
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
}
# Gemma's placeholders are control tokens even where tokenizer.json does not call them special.
PLACEHOLDER = re.compile(r"<unused\d+>|<mask>")
SPECIAL_SCORE = -1000.0  # of tokens that are found in the text before any merge: never compared


def add_tokenizer(writer: GGUFWriter, folder: Path, architecture: str, vocab_size: int) -> None:
    """Add the keys `tokenizer.*` for the tokenizer of `folder`.

    Ids that the model has but the tokenizer lacks are filled with unused tokens. Raises ConfigError
    for a missing or malformed tokenizer, for one that is no byte-fallback BPE, and for one with ids
    that the model lacks, placeholders of images and sounds excepted: no text reaches those.
    """
    vocabulary, merges, added = _load(folder / "tokenizer.json")
    ids = vocabulary | {text: token["id"] for text, token in added.items()}
    _check_ids(folder, ids, vocab_size, {text for text in added if added[text]["special"] and text not in vocabulary})
    gemma4 = architecture != "gemma3"
    scores = {} if gemma4 else sentencepiece_scores(vocabulary, merges, set(added), folder)

    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    token_scores = [SPECIAL_SCORE] * vocab_size
    for text, index in ids.items():
        if index < vocab_size:
            types[index] = _token_type(text, added.get(text), gemma4)
            token_scores[index] = scores.get(text, SPECIAL_SCORE)
            # llama.cpp looks for added tokens in the raw text, where SentencePiece's U+2581 is still a space
            spaced = not gemma4 and types[index] is TokenType.USER_DEFINED
            texts[index] = text.replace("\u2581", " ") if spaced else text

    writer.add_tokenizer_model("gemma4" if gemma4 else "llama")
    writer.add_token_list(texts)
    writer.add_token_scores(token_scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(False)
    if gemma4:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        writer.add_tokenizer_pre("default")
    _add_special(writer, folder, ids)


def _check_ids(folder: Path, ids: dict[str, int], vocab_size: int, placeholders: set[str]) -> None:
    for text, index in ids.items():
        if not 0 <= index < vocab_size and text not in placeholders:
            raise ConfigError(
                f"{folder}: token {text!r} has id {index}, but the model has {vocab_size} embeddings: "
                "the tokenizer belongs to another model"
            )


def sentencepiece_scores(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], added: set[str], folder: Path
) -> dict[str, float]:
    """A score for each token that is not added: minus its place among the merged ones, and 0 for bytes.

    Scores say the same as merges only if the merges of a token stand together and list each of its
    splits, as they do where they were made from SentencePiece's scores. ConfigError if not.
    """
    merged = [left + right for left, right in merges if left + right not in added]
    place: dict[str, int] = {}
    previous = ""
    for token in merged:
        if token != previous and token in place:
            raise ConfigError(_not_sentencepiece(folder, f"merges of {token!r} stand apart"))
        place.setdefault(token, len(place))
        previous = token
    for token, listed in Counter(merged).items():
        splits = sum(token[:i] in vocabulary and token[i:] in vocabulary for i in range(1, len(token)))
        if splits != listed:
            raise ConfigError(_not_sentencepiece(folder, f"{listed} of {splits} splits of {token!r} are listed"))
    scores = {token: -float(rank) for token, rank in place.items()}
    scores |= {f"<0x{byte:02X}>": 0.0 for byte in range(256)}
    single = (token for token in vocabulary if token not in scores and token not in added)
    return scores | {token: -float(len(place) + i) for i, token in enumerate(single)}


def _not_sentencepiece(folder: Path, reason: str) -> str:
    return (
        f"{folder}/tokenizer.json: {reason}: llama.cpp runs Gemma 3 tokenizers by scores, which cannot say what "
        "these merges do; use a tokenizer that was converted from SentencePiece"
    )


def _token_type(text: str, added: dict[str, Any] | None, gemma4: bool) -> TokenType:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
        return TokenType.BYTE
    if added is None:
        return TokenType.NORMAL
    if gemma4 and text in VISIBLE:
        return TokenType.USER_DEFINED
    # llama.cpp finds both kinds in the text before any merge, as transformers does with added tokens
    return TokenType.CONTROL if added["special"] or PLACEHOLDER.fullmatch(text) else TokenType.USER_DEFINED


def _load(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, dict[str, Any]]]:
    """Vocabulary, merges, and added tokens by their text."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file: llama.cpp needs the tokenizer in the same file as the weights")
    try:
        tokenizer = json.loads(path.read_text("utf-8"))
        model = tokenizer["model"]
        if model["type"] != "BPE" or not model["byte_fallback"]:
            raise ConfigError(f"{path}: not a byte-fallback BPE: this is no Gemma tokenizer")
        vocabulary = {str(text): int(index) for text, index in model["vocab"].items()}
        # older files write a merge as one string
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        pairs = [(left, right) for left, right in merges]
        added = {t["content"]: {"id": int(t["id"]), "special": bool(t["special"])} for t in tokenizer["added_tokens"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a tokenizer.json: {type(error).__name__}: {error}") from None
    return vocabulary, pairs, added


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return config


def _add_special(writer: GGUFWriter, folder: Path, ids: dict[str, int]) -> None:
    """Which ids <bos> and its like have, and the chat template."""
    config = _read_config(folder / "tokenizer_config.json")
    for kind in ("bos", "eos", "unk", "pad", "mask"):
        token = config.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            getattr(writer, f"add_{kind}_token_id")(ids[text])
    writer.add_add_bos_token(True)  # Gemma has never seen a text without
    template_file = folder / "chat_template.jinja"
    try:
        template = template_file.read_text("utf-8") if template_file.is_file() else config.get("chat_template")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{template_file}: not UTF-8 text: {error}") from None
    if template:
        writer.add_chat_template(template)
