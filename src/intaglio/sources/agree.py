"""A GGUF and the config and tokenizer that it is converted with state many things twice: both have to say the same.

Keys have the meaning that the reader gives them (`formats.gguf.read`), which shares no table with the exporter, so that
neither repeats the other's mistake.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from intaglio.errors import ConfigError
from intaglio.formats.gguf.names import GGUF_ROPE_FACTORS, gguf_rope_factors
from intaglio.formats.gguf.read import FACT_OF_KEY, model_facts, read_gguf
from intaglio.plan.family import ModelSpec
from intaglio.plan.files import read_json
from intaglio.plan.rope import KINDS, rope_parameters
from intaglio.sources.stored import Source

# Keys whose absence means 0 to llama.cpp, and keys that a file may have otherwise than the config.
ABSENT = dict.fromkeys(("block_count", "embedding_length", "expert_count", "expert_used_count"), 0)
LEFT_OPEN = ("context_length", "expert_feed_forward_length")
TOKENS, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"


def check_agreement(source: Source, model: ModelSpec, assets: Path) -> None:
    """Raise ConfigError that names both, where the file and the folder contradict each other.

    Compared are keys that the file has; and those whose absence means something to llama.cpp.
    """
    metadata = source.metadata or {}
    architecture = model.family.gguf_architecture
    if metadata.get("general.architecture") != architecture:
        _differ(source, assets, "general.architecture", metadata.get("general.architecture"), architecture)
    for key, (value, absent) in _expected(model).items():
        stated = metadata.get(f"{architecture}.{key}", absent)
        if stated is not None and not _same(stated, value):
            _differ(source, assets, f"{architecture}.{key}", stated, value)
    factors = gguf_rope_factors(model)
    stored = next((tensor for tensor in source.tensors if tensor.name == GGUF_ROPE_FACTORS), None)
    if stored is None and factors:
        _differ(source, assets, GGUF_ROPE_FACTORS, "none", "those of its rope_parameters")
    if stored is not None and not _same(stored.reader.read(stored.name).tolist(), factors or []):
        _differ(source, assets, GGUF_ROPE_FACTORS, "others", "those of its rope_parameters")
    _check_tokens(source, model, assets)


def _expected(model: ModelSpec) -> dict[str, tuple[Any, Any]]:
    """Values that the config gives llama.cpp's keys, each with what the key's absence means; None: nothing."""
    config = model.layer_config
    kinds, layers = list(config.layer_types), config.per_layer_config
    full, sliding = (layers[kinds.index(kind) if kind in kinds else 0] for kind in KINDS)
    rope = rope_parameters(config)
    family = model.family
    # scaled ropes of families with factors have no key
    factor = 1.0 if family.gguf_rope_factors else rope["full_attention"].get("factor", 1.0)
    facts = model_facts(model)
    if not getattr(config, "enable_moe_block", False):
        facts |= dict.fromkeys(facts.keys() & {"num_experts", "top_k_experts"}, 0)
    found: dict[str, tuple[Any, Any]] = {
        key: (facts[name] or 0, ABSENT.get(key)) for key, name in FACT_OF_KEY.items() if name in facts
    }
    for key in LEFT_OPEN:
        found.pop(key, None)
    found |= {
        "attention.key_length": (full.head_dim, None),
        "attention.value_length": (full.head_dim, None),
        "attention.causal": (True, None),
        "attn_logit_softcapping": (getattr(config, "attn_logit_softcapping", None) or 0.0, None),
        "vocab_size": (config.vocab_size, None),
        "rope.scaling.factor": (factor, 1.0),
        "rope.freq_base": (rope["full_attention"]["rope_theta"], None),
        "rope.freq_base_swa": (rope["sliding_attention"]["rope_theta"], None),
    }
    found |= {key: (getattr(config, key) or 0.0, absent) for key, absent in family.gguf_caps.items()}
    if not family.gguf_period:
        found["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in kinds], None
    if family.full_heads:
        found |= {
            "attention.key_length_swa": (sliding.head_dim, None),
            "attention.value_length_swa": (sliding.head_dim, None),
            "rope.dimension_count": (full.head_dim, None),
            "rope.dimension_count_swa": (sliding.head_dim, None),
        }
    return found


def _same(stated: Any, value: Any) -> bool:
    """Whether two numbers are the same float32, or two lists of them; one number stands for a list of it."""
    first, second = (np.asarray(x, dtype=np.float32).reshape(-1) for x in (stated, value))
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        return False
    return bool(np.all(first == second))


def _differ(source: Source, assets: Path, key: str, stated: Any, value: Any) -> None:
    raise ConfigError(
        f"{source.path}: {key} = {stated!r}, but the config of {assets} makes it {value!r}: "
        "expected the config of the same model"
    )


def _check_tokens(source: Source, model: ModelSpec, assets: Path) -> None:
    """Raise ConfigError for another number of tokens than the model has, and for a token that has another text or
    number in the file than in the folder's tokenizer."""
    path = assets / "tokenizer.json"
    fields = read_gguf(source.path).fields
    if TOKENS not in fields or not path.is_file():
        return
    try:
        tokenizer = read_json(path)
        ids = dict(tokenizer["model"]["vocab"]) | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["model"].get("merges", [])]
        stated = [str(token) for token in fields[TOKENS].contents()]
        stated_merges = [str(merge) for merge in fields[MERGES].contents()] if MERGES in fields else merges
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{source.path} and {path}: their tokens cannot be compared: {error}") from None
    if len(stated) != (size := model.layer_config.vocab_size):
        _differ(source, assets, f"the number of {TOKENS}", len(stated), size)
    for text, index in ids.items():
        # in the vocabulary of Gemma 3, llama.cpp has the space itself in added tokens
        if index < len(stated) and stated[index] not in (text, text.replace("\u2581", " ")):
            raise ConfigError(
                f"{source.path}: token {index} is {stated[index]!r}, but {path} has {text!r} there: "
                "expected the tokenizer of the same model"
            )
    if stated_merges != merges:
        raise ConfigError(f"{source.path}: has other merges than {path}: expected the tokenizer of the same model")
    _check_special(source, assets, ids)


def _check_special(source: Source, assets: Path, ids: dict[str, int]) -> None:
    """Raise ConfigError where the token that begins a text is another one, or that which ends it is none of theirs."""
    metadata = source.metadata or {}
    names = ("tokenizer_config.json", "generation_config.json", "config.json")
    files = {name: read_json(assets / name) if (assets / name).is_file() else {} for name in names}
    for kind in ("bos", "eos"):
        key = f"tokenizer.ggml.{kind}_token_id"
        token = files["tokenizer_config.json"].get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        allowed: set[Any] = {ids[text]} if text in ids else set()
        others = [files[name].get(f"{kind}_token_id") for name in ("generation_config.json", "config.json")]
        others.append((files["config.json"].get("text_config") or {}).get(f"{kind}_token_id"))
        for other in others if kind == "eos" or not allowed else []:
            allowed |= set(other) if isinstance(other, list) else {other}
        allowed.discard(None)
        if allowed and key in metadata and metadata[key] not in allowed:
            _differ(source, assets, key, metadata[key], sorted(allowed))
