"""The tokenizer of a GGUF file, from the tokenizer that transformers builds of the folder's files.

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

from gguf import GGUFWriter, Keys, TokenType

from intaglio.errors import ConfigError
from intaglio.formats.gguf.names import (
    PLACEHOLDER,
    SAMPLING_KEYS,
    SUPPRESSED,
    gguf_end_keys,
    gguf_template_name,
)
from intaglio.formats.speech import Speech, read_speech
from intaglio.plan.families import GgufTokenizer
from intaglio.plan.family import ModelSpec
from intaglio.plan.files import read_json

SPECIAL_SCORE = -1000.0  # of tokens that are found in the text before any merge: never compared
SPACE = {"String": " "}
# llama.cpp replaces spaces before any merge; tokenizer.json writes that so. No spaces are then left to split.
NORMALIZER = {"type": "Replace", "pattern": SPACE, "content": "\u2581"}
SPLIT = {"type": "Split", "pattern": SPACE, "behavior": "MergedWithPrevious", "invert": False}


def add_tokenizer(writer: GGUFWriter, folder: Path, spec: ModelSpec) -> None:
    """Add the keys of the tokenizer, chat template and sampling settings of `folder`.

    Ids that the model has but the tokenizer lacks are filled with unused tokens. Raises ConfigError
    for a missing or malformed tokenizer, for one that llama.cpp would run otherwise, and for one with ids
    that the model lacks, placeholders of images and sounds excepted: no text reaches those.
    """
    vocab_size, kind = spec.layer_config.vocab_size, spec.family.gguf_tokenizer
    speech = _speech(folder, spec)
    vocabulary, merges, added = _load(folder, speech)
    ids = vocabulary | {text: token["id"] for text, token in added.items()}
    _check_ids(folder, ids, vocab_size, {text for text in added if added[text]["special"] and text not in vocabulary})
    scores = sentencepiece_scores(vocabulary, merges, set(added), folder) if kind.by_scores else {}

    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    token_scores = [SPECIAL_SCORE] * vocab_size
    for text, index in ids.items():
        if index < vocab_size:
            types[index] = _token_type(text, added.get(text), kind)
            token_scores[index] = scores.get(text, SPECIAL_SCORE)
            # llama.cpp looks for added tokens in the raw text, where SentencePiece's U+2581 is still a space
            spaced = kind.by_scores and types[index] is TokenType.USER_DEFINED
            texts[index] = text.replace("\u2581", " ") if spaced else text

    writer.add_tokenizer_model(kind.model)
    writer.add_token_list(texts)
    writer.add_token_scores(token_scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(False)
    if not kind.by_scores:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    if kind.pre is not None:
        writer.add_tokenizer_pre(kind.pre)
    _add_special(writer, speech, ids)
    _add_settings(writer, speech)


def _speech(folder: Path, spec: ModelSpec) -> Speech:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file: llama.cpp needs the tokenizer in the same file as the weights")
    model = read_json(path).get("model")
    if not isinstance(model, dict) or "type" not in model:
        raise ConfigError(f"{path}: not a tokenizer.json: it has no model with a type")
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise ConfigError(f"{path}: not a byte-fallback BPE: this is no Gemma tokenizer")
    speech = read_speech(folder, spec.layer_config.to_dict())
    assert speech is not None  # there is a tokenizer.json
    return speech


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
        f"{folder}/tokenizer.json: {reason}: llama.cpp runs this family's tokenizers by scores, which cannot say what "
        "these merges do; use a tokenizer that was converted from SentencePiece"
    )


def _token_type(text: str, added: dict[str, Any] | None, kind: GgufTokenizer) -> TokenType:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
        return TokenType.BYTE
    if added is None:
        return TokenType.NORMAL
    if text in kind.visible:
        return TokenType.USER_DEFINED
    # llama.cpp finds both kinds in the text before any merge, as transformers does with added tokens
    return TokenType.CONTROL if added["special"] or PLACEHOLDER.fullmatch(text) else TokenType.USER_DEFINED


def _load(folder: Path, speech: Speech) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, dict[str, Any]]]:
    """Vocabulary, merges, and added tokens by their text, as transformers has them.

    Raises ConfigError for a tokenizer whose steps before and beside the merges llama.cpp does not have.
    """
    found = json.loads(speech.tokenizer.backend_tokenizer.to_str())
    model = found["model"]
    expected: dict[str, Any] = {
        "normalizer": [NORMALIZER],
        "pre_tokenizer": [SPLIT],
        "dropout": [None, 0.0],
        "ignore_merges": [False],
        "continuing_subword_prefix": [None, ""],
        "end_of_word_suffix": [None, ""],
        "byte_fallback": [True],
    }
    for name, values in expected.items():
        value = _one_step(found[name]) if name in found else model.get(name)
        if value not in values and not (name == "pre_tokenizer" and value is None):
            raise ConfigError(_not_expressed(folder, f"{name} is {value}", f"knows {values[0]!r} only"))
    added = {token["content"]: token for token in found["added_tokens"]}
    for text, token in added.items():
        odd = [key for key in ("single_word", "lstrip", "rstrip") if token[key]]
        if odd:
            raise ConfigError(_not_expressed(folder, f"token {text!r} is {' and '.join(odd)}", "has no such tokens"))
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]
    if missing:
        raise ConfigError(_not_expressed(folder, f"{len(missing)} bytes have no token", f"needs {missing[0]}"))
    return dict(model["vocab"]), [(left, right) for left, right in model["merges"]], added


def _one_step(step: Any) -> Any:
    """A step of tokenizer.json; the only one of a sequence of one."""
    inner = step.get("normalizers", step.get("pretokenizers")) if isinstance(step, dict) else None
    return inner[0] if isinstance(inner, list) and len(inner) == 1 else step


def _not_expressed(folder: Path, found: str, runtime: str) -> str:
    return (
        f"{folder}/tokenizer.json: {found}: llama.cpp {runtime} and would read other tokens: export it to hf, vllm or "
        "mlx, whose runtimes use this file"
    )


def _add_special(writer: GGUFWriter, speech: Speech, ids: dict[str, int]) -> None:
    """Write the ids of <bos> and its like, the tokens at which answers end, and the chat templates."""
    tokenizer = speech.tokenizer
    if tokenizer.bos_token_id is None:
        raise ConfigError(
            f"{speech.folder}: the tokenizer has no bos_token, and llama.cpp puts one before every text: name it in "
            "tokenizer_config.json"
        )
    for kind in ("bos", "eos", "unk", "pad", "mask"):
        index = getattr(tokenizer, f"{kind}_token_id")
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    for kind, index in gguf_end_keys(speech.end_ids, ids, tokenizer.eos_token_id).items():
        getattr(writer, f"add_{kind}_token_id")(index)
    writer.add_add_bos_token(True)  # Gemma has never seen a text without
    names = {name: gguf_template_name(name) for name in speech.templates}
    for name, own in names.items():
        key = Keys.Tokenizer.CHAT_TEMPLATE if name == "default" else Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=own)
        writer.add_string(key, speech.templates[name])
    if set(names) - {"default"}:
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, sorted(own for name, own in names.items() if name != "default"))


def _add_settings(writer: GGUFWriter, speech: Speech) -> None:
    """Sampling settings of generation_config.json, as far as llama.cpp has keys for them."""
    for name, key in SAMPLING_KEYS.items():
        value = speech.settings.get(name)
        if value is not None:
            getattr(writer, f"add_sampling_{key}")(value)
    suppressed = speech.settings.get("suppress_tokens")
    if suppressed:
        writer.add_array(SUPPRESSED, suppressed)
