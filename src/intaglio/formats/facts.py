"""One table of what a model is beside its weights: a fact's name, and its value.

`config_facts` makes the table of a transformers config. Each reader of an artifact makes the same table of what the
artifact's runtime would use, and leaves out what its format does not store. `compare_facts` puts the two side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.errors import RecipeError
from intaglio.formats.tally import Tally
from intaglio.packed.assets import NAMED_TEMPLATES
from intaglio.packed.outputs import MARKER
from intaglio.plan.families import check_export
from intaglio.plan.family import ModelSpec, transformers_config
from intaglio.plan.rope import Rope, plain_rope, ropes

Facts = dict[str, Any]
CONFIG = "config"  # the groups of facts, as a person reads them
TOKENIZER, TEMPLATE, GENERATION = "tokenizer", "template", "generation settings"

# Fields of a config that do not change what a model computes, or that a format sets for itself.
UNRELATED = {
    *("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "use_cache"),
    *("quantization_config", "quantization", "return_dict", "output_hidden_states", "output_attentions"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type"),
    *("initializer_range", "attention_dropout", "tie_word_embeddings", "transformers.js_config"),
    "_sliding_window_pattern",  # what layer_types was made of
}
# Fields that are resolved for each layer, and stand in the table in that form.
PER_LAYER = {"head_dim", "num_key_value_heads", "per_layer_config", "rope_parameters"}
# Fields that other programs than transformers read, under names of their own.
OTHER_SPELLINGS = (
    *("global_head_dim", "num_global_key_value_heads", "rope_theta", "rope_local_base_freq", "rope_scaling"),
    "sliding_window_pattern",
)
CODE = ("auto_map", "custom_generate")  # which make transformers run code that lies beside the weights


def check_dense(model: ModelSpec, export: str, what: str) -> None:
    """Raise RecipeError, in the name of a format, for a family that this export is not for and for experts."""
    check_export(model.family, export, what)
    if any(tensor.role == "expert" for tensor in model.tensors):
        raise RecipeError(f"{what} has no experts, and this model does: export it to gguf, hf or vllm")


def config_facts(config: dict[str, Any], *, text_only: bool = False) -> Facts:
    """The table of a config as config.json holds it; `text_only` leaves out what is of towers.

    ConfigError where transformers cannot read it.
    """
    whole = transformers_config({key: value for key, value in config.items() if key not in UNRELATED})
    layers = whole.get_text_config()
    facts = _fields(layers.to_dict(), {*PER_LAYER, *OTHER_SPELLINGS})
    each = list(layers.per_layer_config)
    facts["head_dim"] = [layer.head_dim for layer in each]
    facts["num_key_value_heads"] = [layer.num_key_value_heads for layer in each]
    facts |= {f"rope of {kind}": rope for kind, rope in ropes(layers).items()}
    if whole is not layers and not text_only:
        outer = _fields(whole.to_dict(), {"text_config"})
        facts |= {f"{name} of the whole": value for name, value in outer.items()}
    return facts | _spelled(config.get("text_config") or config, layers)


def spelled_twice(layers: Any) -> Facts:
    """Values that the fields of OTHER_SPELLINGS need for a text config, by their names in `config_facts`."""
    full = layers.layer_types.index("full_attention") if "full_attention" in layers.layer_types else 0
    each, known = layers.per_layer_config[full], ropes(layers)
    return {
        "global_head_dim": each.head_dim,
        "num_global_key_value_heads": each.num_key_value_heads,
        "rope of full_attention by rope_theta": known.get("full_attention"),
        "rope of sliding_attention by rope_local_base_freq": known.get("sliding_attention"),
        "layer_types by sliding_window_pattern": list(layers.layer_types),
    }


def _spelled(said: Facts, layers: Any) -> Facts:
    """Values of the fields of OTHER_SPELLINGS, as far as a config has them."""
    facts = {name: said[name] for name in OTHER_SPELLINGS[:2] if said.get(name) is not None}
    pairs = layers.per_layer_config[0].head_dim // 2
    if "rope_theta" in said:
        factor = (said.get("rope_scaling") or {}).get("factor", 1.0)
        facts["rope of full_attention by rope_theta"] = plain_rope(said["rope_theta"], pairs, factor)
    if "rope_local_base_freq" in said:
        local = plain_rope(said["rope_local_base_freq"], pairs)
        facts["rope of sliding_attention by rope_local_base_freq"] = local
    period = said.get("sliding_window_pattern")
    if period is not None:
        sliding = [period == 0 or layer % period < period - 1 for layer in range(layers.num_hidden_layers)]
        kinds = ["sliding_attention" if kind else "full_attention" for kind in sliding]
        facts["layer_types by sliding_window_pattern"] = kinds
    return facts


def _fields(config: Facts, left_out: Iterable[str]) -> Facts:
    """Fields of a config, those of nested ones too, without UNRELATED ones."""
    return {
        name: _fields(value, ()) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in UNRELATED and name not in left_out
    }


def compare_facts(group: str, expected: Facts, found: Facts, tally: Tally) -> None:
    """Count the facts of `found`, and note each that is not the value that `expected` has under its name."""
    for name, value in found.items():
        tally.facts[group] += 1
        if name not in expected and value is None:
            continue
        if name not in expected:
            tally.unlike_facts.append(f"{group}: {name} is {_short(value)}, and the model has no such thing")
        elif not _same(expected[name], value):
            tally.unlike_facts.append(f"{group}: {name} is {_short(value)}, the model's is {_short(expected[name])}")


def _same(expected: Any, found: Any) -> bool:
    if isinstance(expected, Rope) and isinstance(found, Rope):
        return expected.same(found)
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(map(_same, expected, found))
    numbers = (int, float, np.integer, np.floating)
    if isinstance(expected, numbers) and isinstance(found, numbers):
        return bool(expected == found or np.float32(expected) == np.float32(found))  # files hold float32
    return bool(expected == found)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, Rope) else str(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def strange_files(folder: Path, known: Iterable[str]) -> list[str]:
    """Files of a folder, by their paths there, that are neither known nor text for a person.

    A runtime may load, or run, what lies beside the weights.
    """
    allowed = {*known, MARKER}
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir())
        and path.relative_to(folder).as_posix() not in allowed
        and not (path.suffix == ".jinja" and path.parent == folder / NAMED_TEMPLATES)
        and not (path.is_file() and _for_people(path.name))
    )


def _for_people(name: str) -> bool:
    return name.lower().endswith(".md") or name.upper().startswith(("LICENSE", "NOTICE")) or name == ".gitattributes"
