"""Checks that a GGUF file reads and writes text as the packed model does: tokens, special ids, templates, settings.

The vocabulary is compared token by token. The fixed texts are run by llama.cpp itself, where llama-cpp-python is
installed, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gguf import TokenType

from intaglio.formats.facts import GENERATION, TOKENIZER, compare_facts
from intaglio.formats.gguf.names import (
    END_KEYS,
    END_TEXTS,
    PLACEHOLDER,
    SAMPLING_KEYS,
    SUPPRESSED,
    gguf_end_keys,
    gguf_template_name,
)
from intaglio.formats.speech import Speech, compare_templates, compare_tokens
from intaglio.formats.tally import Tally
from intaglio.plan.families import GgufTokenizer
from intaglio.plan.family import ModelSpec

TOKENS = "tokenizer.ggml"
TEMPLATE_KEY, TEMPLATES_KEY = "tokenizer.chat_template", "tokenizer.chat_templates"
# Special tokens, and the words of their keys.
KINDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}
# Settings that change what transformers writes, and that llama.cpp's files have no place for.
NO_KEY = (
    *("typical_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "bad_words_ids", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "penalty_alpha", "sequence_bias", "guidance_scale"),
)
LLAMACPP_SECONDS = 300


def compare_text(speech: Speech, spec: ModelSpec, keys: dict[str, Any], path: Path, tally: Tally) -> None:
    """Count what `keys`, those of the file `path`, say of text, and note what differs from the packed model's."""
    kind = spec.family.gguf_tokenizer
    taken = {name: keys.pop(f"{TOKENS}.{name}", None) for name in ("tokens", "token_type", "scores", "merges")}
    steps = {name: keys.pop(f"{TOKENS}.{name}", None) for name in ("model", "pre", "add_space_prefix", "add_eos_token")}
    expected = {"model": kind.model, "pre": kind.pre, "add_space_prefix": False, "add_eos_token": None}
    compare_facts(TOKENIZER, expected, steps, tally)
    _compare_vocabulary(speech, taken, kind, spec.layer_config.vocab_size, tally)
    _compare_ids(speech, keys, taken["tokens"] if isinstance(taken["tokens"], list) else [], tally)
    compare_templates(speech, _templates(speech, keys), tally)
    sampling = {name: keys.pop(f"general.sampling.{key}", None) for name, key in SAMPLING_KEYS.items()}
    sampling["suppress_tokens"] = keys.pop(SUPPRESSED, None)
    compare_facts(GENERATION, {name: speech.settings.get(name) or None for name in sampling}, sampling, tally)
    tally.unsaid += [f"generation setting {name}" for name in NO_KEY if speech.settings.get(name)]
    strange = [name for name in keys if name.startswith(("tokenizer.", "general.sampling.", "split."))]
    tally.unlike_facts += [f"{TOKENIZER}: the file has {name}, the model not" for name in sorted(strange)]
    if not tally.unlike_facts:  # else it is known to read otherwise
        _run_texts(speech, path, tally)


def _run_texts(speech: Speech, path: Path, tally: Tally) -> None:
    texts = speech.texts()
    ran = llamacpp_tokens(path, texts)
    if ran is None:
        tally.unsaid.append("fixed texts were not run: llama-cpp-python is not installed, or did not load the file")
    else:
        compare_tokens(speech.tokens(texts, add_special=False), ran, texts, tally)


def _templates(speech: Speech, keys: dict[str, Any]) -> dict[str, str]:
    """Chat templates of the file under the model's own names; takes them out of `keys`."""
    names = {gguf_template_name(name): name for name in speech.templates}
    keys.pop(TEMPLATES_KEY, None)
    found = {"default": keys.pop(TEMPLATE_KEY)} if TEMPLATE_KEY in keys else {}
    for key in [key for key in keys if key.startswith(f"{TEMPLATE_KEY}.")]:
        name = key.removeprefix(f"{TEMPLATE_KEY}.")
        found[names.get(name, name)] = keys.pop(key)
    return found


def _compare_ids(speech: Speech, keys: dict[str, Any], tokens: list[str], tally: Tally) -> None:
    """Special tokens, the first token of a text, and where answers end by llama.cpp's rules."""
    tokenizer = speech.tokenizer
    found = {kind: keys.pop(f"{TOKENS}.{word}_token_id", None) for kind, word in KINDS.items()}
    found["a first token"] = keys.pop(f"{TOKENS}.add_bos_token", None)
    expected = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in KINDS} | {"a first token": True}
    wanted = gguf_end_keys(speech.end_ids, tokenizer.get_vocab(), tokenizer.eos_token_id)
    ends = {kind: keys.pop(f"{TOKENS}.{kind}_token_id", None) for kind in END_KEYS}
    compare_facts(TOKENIZER, expected | {kind: wanted.get(kind) for kind in END_KEYS}, found | ends, tally)
    if not speech.adds_bos:
        tally.unsaid.append("llama.cpp puts a first token before every text, this tokenizer does not")
    ending = {index for index, text in enumerate(tokens) if text in END_TEXTS} | {found["eos"], *ends.values()}
    lost = [tokenizer.convert_ids_to_tokens(index) for index in speech.end_ids if index not in ending]
    added = [tokens[index] for index in range(len(tokens)) if index in ending and index not in speech.end_ids]
    tally.unsaid += [f"end token {text!r}: llama.cpp goes on after it" for text in lost]
    tally.unsaid += [f"llama.cpp ends at {text!r} too" for text in added]


def _compare_vocabulary(speech: Speech, taken: dict[str, Any], kind: GgufTokenizer, size: int, tally: Tally) -> None:
    """Compare text and type of each token, and the merges, or the order of scores that stands for them."""
    backend = json.loads(speech.tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in backend["added_tokens"]}
    ids = {index: text for text, index in backend["model"]["vocab"].items()}
    ids |= {index: token["content"] for index, token in added.items()}
    texts = [ids.get(index, f"[PAD{index}]") for index in range(size)]
    types = [_type(ids.get(index), added.get(index), kind) for index in range(size)]
    if kind.by_scores:  # llama.cpp looks for these before spaces become U+2581
        user_defined = [found == TokenType.USER_DEFINED for found in types]
        texts = [t.replace("\u2581", " ") if own else t for t, own in zip(texts, user_defined, strict=True)]
    for name, wanted in (("tokens", texts), ("token_type", types)):
        found = taken[name] if isinstance(taken[name], list) else []
        wrong = [index for index in range(size) if index >= len(found) or found[index] != wanted[index]]
        tally.facts[TOKENIZER] += size
        if wrong or len(found) != size:
            first = f"the first is {wrong[0]}, {texts[wrong[0]]!r}" if wrong else f"there are {len(found)}"
            tally.unlike_facts.append(f"{TOKENIZER}: {len(wrong)} of {size} entries of {name} differ: {first}")
    merges = backend["model"]["merges"]
    if kind.by_scores:
        scores = taken["scores"] if isinstance(taken["scores"], list) else []
        same = len(scores) == size and _in_order(merges, scores, backend["model"]["vocab"], added)
    else:
        same = taken["merges"] == [" ".join(pair) for pair in merges]
    if not same:
        tally.unlike_facts.append(f"{TOKENIZER}: tokens are merged in another order")


def _in_order(
    merges: list[list[str]], scores: list[float], vocabulary: dict[str, int], added: dict[int, dict[str, Any]]
) -> bool:
    """Whether the scores of merged tokens fall in the order of the merges."""
    merged = [vocabulary[left + right] for left, right in merges]
    found = [scores[index] for index in merged if index not in added]
    return found == sorted(found, reverse=True)


def _type(text: str | None, added: dict[str, Any] | None, kind: GgufTokenizer) -> TokenType:
    if text is None:
        return TokenType.UNUSED
    if added is None:
        return TokenType.BYTE if text.startswith("<0x") and len(text) == 6 else TokenType.NORMAL
    control = (added["special"] or PLACEHOLDER.fullmatch(text)) and text not in kind.visible
    return TokenType.CONTROL if control else TokenType.USER_DEFINED


def llamacpp_tokens(path: Path, texts: list[str]) -> list[list[int]] | None:
    """Tokens of each text without a first token, by llama.cpp in a process of its own; None where it does not run."""
    request = json.dumps({"path": str(path), "texts": texts})
    try:
        done = subprocess.run(
            [sys.executable, "-c", LLAMACPP], input=request, capture_output=True, text=True, timeout=LLAMACPP_SECONDS
        )
        found: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
        return found
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return None


LLAMACPP = """
import json, sys
import llama_cpp as lib
request = json.loads(sys.stdin.read())
quiet = lib.llama_log_callback(lambda level, text, data: None)
lib.llama_log_set(quiet, None)
params = lib.llama_model_default_params()
params.vocab_only = True
model = lib.llama_model_load_from_file(request["path"].encode(), params)
vocab = lib.llama_model_get_vocab(model)
found = []
for text in request["texts"]:
    data = text.encode("utf-8", "surrogatepass")
    size = 4 * len(data) + 8
    buffer = (lib.llama_token * size)()
    count = lib.llama_tokenize(vocab, data, len(data), buffer, size, False, True)
    found.append(list(buffer[:count]))
print(json.dumps(found))
"""
