"""Statements that no config.json may make: sizes that no model has, useless numbers, and contradictions."""

from __future__ import annotations

import json
from typing import Any

from intaglio.errors import ConfigError

# Bounds of what is allocated by a config alone. The largest Gemma has 62 layers and a vocabulary of 2^18.
COUNTED = ("layers", "experts", "heads", "_size", "head_dim", "_dims", "hidden_size_per_layer_input")
MOST_LAYERS, MOST_ELEMENTS, MOST_ENTRIES, DEEPEST = 512, 1 << 24, 1 << 16, 16

# Numbers without which, or with 0 or less in their place, no layer computes anything.
POSITIVE = (
    *("rms_norm_eps", "sliding_window", "max_position_embeddings", "query_pre_attn_scalar"),
    *("final_logit_softcapping", "attn_logit_softcapping"),
)

# Keys that a multimodal config may say twice, for itself and in its text_config; both have to say the same.
SAID_TWICE = (
    *("tie_word_embeddings", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "global_head_dim", "num_kv_shared_layers"),
    *("hidden_size_per_layer_input", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling"),
    *("sliding_window", "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar"),
    *("hidden_activation", "max_position_embeddings"),
)


def check_sizes(config: dict[str, Any], depth: int = 0) -> None:
    """Raise ConfigError for a config, or one nested in it, with a size that no such model has.

    transformers makes an object for each layer and expert, so a false number would take all memory.
    """
    if depth > DEEPEST:
        raise ConfigError(f"a config nested more than {DEEPEST} times: expected that of a transformers model")
    for key, value in config.items():
        if isinstance(value, dict):
            check_sizes(value, depth + 1)
        elif isinstance(value, list) and len(value) > MOST_ENTRIES:
            raise ConfigError(f"{key}: a list of {len(value):,} entries: expected at most {MOST_ENTRIES:,}")
        elif isinstance(value, int) and key.endswith(COUNTED):
            most = MOST_LAYERS if key.endswith("layers") else MOST_ELEMENTS
            if not 0 <= value <= most:
                raise ConfigError(f"{key} = {str(value)[:40]}: expected a number between 0 and {most:,}")


def check_nested(config: dict[str, Any], nested: dict[str, Any]) -> None:
    """Raise ConfigError where a multimodal config and its text_config contradict each other."""
    for key in SAID_TWICE:
        default = True if key == "tie_word_embeddings" else None  # of every family here
        whole, text = config.get(key, default), nested.get(key, default)
        if whole != text and (key in config and (key in nested or default is not None)):
            raise ConfigError(
                f"config.json says {key} = {json.dumps(whole)}, and its text_config {json.dumps(text)}: "
                "set both to the one that is right"
            )


def check_rope_scaling(config: dict[str, Any]) -> None:
    """Raise ConfigError where rope_scaling, the older name, says other things than rope_parameters."""
    older, newer = config.get("rope_scaling"), config.get("rope_parameters")
    if isinstance(older, dict) and isinstance(newer, dict) and older != newer:
        full = newer.get("full_attention")
        if not isinstance(full, dict) or {**full, **older} != full:
            raise ConfigError(
                f"rope_scaling = {json.dumps(older)} and rope_parameters = {json.dumps(newer)}: expected one of them, "
                "or the same in both"
            )


def check_values(said: dict[str, Any], config: Any) -> None:
    """Raise ConfigError for numbers with which no layer computes, and for older spellings that contradict the newer.

    said: as config.json has it. config: transformers' object of it, which ignores older spellings beside newer ones.
    """
    for key in POSITIVE:
        value = getattr(config, key, None)
        if value is not None and not value > 0:
            instead = ", or null for logits that are not capped" if key.endswith("capping") else ""
            raise ConfigError(f"{key} = {value}: expected a number above 0{instead}")
    if getattr(config, "use_bidirectional_attention", None) in ("all", True):
        raise ConfigError(
            "use_bidirectional_attention: this is an encoder, which sees the text behind a token too: expected a model "
            "that continues text"
        )
    kinds = list(config.layer_types)
    full = kinds.index("full_attention") if "full_attention" in kinds else 0
    bases = {kind: (config.rope_parameters.get(kind) or {}).get("rope_theta") for kind in set(kinds)}
    period = said.get("sliding_window_pattern")
    newer = {
        "rope_theta": ("rope_parameters of full_attention", bases.get("full_attention")),
        "rope_local_base_freq": ("rope_parameters of sliding_attention", bases.get("sliding_attention")),
        "global_head_dim": ("per_layer_config", config.per_layer_config[full].head_dim),
        "hidden_act": ("hidden_activation", config.hidden_activation),
    }
    if type(period) is int and period > 0:
        rule = ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(len(kinds))]
        newer["sliding_window_pattern"] = "layer_types", period if rule == kinds else kinds
    for key, (name, value) in newer.items():
        if said.get(key) is not None and value is not None and said[key] != value:
            raise ConfigError(
                f"{key} = {json.dumps(said[key])}, but {name} says {json.dumps(value)}: set both to the one that is "
                f"right, or remove {key}"
            )
