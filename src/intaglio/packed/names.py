"""Names of stored tensors: as wrappers and multimodal models spell them, and those without a part in the text model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Container
from pathlib import Path

from intaglio.errors import ConfigError
from intaglio.plan.carried import TOWERS, is_shared_kv
from intaglio.plan.family import TOWER_ROLES, ModelSpec, TensorSpec
from intaglio.plan.plan import HEAD

# A multimodal checkpoint nests its text model; the text model alone does not.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.")
# Words that wrappers put into the names of a model: DataParallel and DDP, PEFT without adapters, torch.compile,
# FSDP, activation checkpointing, Lightning.
WRAPPED = re.compile(
    r"^(?:(?:module|base_model\.model|_forward_module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
    r"|(?<=\.)(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
)
# Towers and their projectors, also those of Gemma 3, whose text model alone is taken.
TOWER_PREFIXES = (
    *TOWERS,
    *("vision_tower.", "multi_modal_projector.", "model.multi_modal_projector."),
    *("audio_tower.", "embed_vision.", "embed_audio."),
)
# Buffers that older versions of transformers saved, and that every version computes from the config.
COMPUTED = re.compile(r"(rotary_emb(_local)?\.(\w+_)?inv_freq|\.embed_scale|\.position_ids)$")
SHOWN = 3  # names in a message


def missing(wanted: dict[str, TensorSpec], names: list[str], known: Container[str]) -> str:
    """Message for tensors that no file has, whose first reason a person can mend.

    names: in the files. known: those of the model, by our names.
    """
    first = wanted[min(wanted)]
    text = f"{len(wanted)} tensors are missing, the first is {first.name}"
    prefix = next((n.removesuffix(first.name) for n in names if n.endswith("." + first.name)), "")
    if prefix:
        return f"{text}: names begin with {prefix!r}, which belongs to another program: save the model that it wraps"
    if first.role == "head" and len(wanted) == 1:
        return f'{text}: if the head is the embedding, set "tie_word_embeddings": true in config.json'
    if first.role in TOWER_ROLES:
        return f"{text}: to do without towers, say --text-only"
    others = [name for name in names if own_name(name) not in known and not is_tower(own_name(name))]
    near = difflib.get_close_matches(first.name, others, 1)
    return f"{text}, and {near[0]} has no place: rename what the files hold, or save the model again" if near else text


def check_rest(model_dir: Path, rest: dict[str, str], spec: ModelSpec) -> None:
    """Raise ConfigError for tensors that would be lost though nobody knows them to be unused.

    rest: tensors outside of the plan, by our names, with those of the files.
    """
    odd = sorted(stored for name, stored in rest.items() if not is_unused(name, spec))
    if odd:
        some = ", ".join(odd[:SHOWN]) + (", ..." if len(odd) > SHOWN else "")
        raise ConfigError(
            f"{model_dir}: {len(odd)} tensors have no place in a {spec.family.model_type} of this config and would be "
            f"lost: {some}: expected the tensors of the model alone; merge them into its weights, or remove them from "
            "the files if nothing needs them"
        )


def is_unused(name: str, spec: ModelSpec) -> bool:
    """Whether the text model is known to compute without a tensor outside of the plan, by our name."""
    return is_tower(name) or COMPUTED.search(name) is not None or is_shared_kv(name, spec)


def is_tower(name: str) -> bool:
    """Whether a tensor, by our name, is part of a tower or joins one to the text."""
    return name.startswith(TOWER_PREFIXES)


def untied(model_dir: Path, head: str, embedding: str) -> ConfigError:
    """The error for a head that is not the embedding, although config.json says so; with both ways out."""
    return ConfigError(
        f'{model_dir}: config.json says "tie_word_embeddings": true, but {head} has other values than {embedding}: '
        f'set "tie_word_embeddings": false in config.json to keep this head, or remove {head} from the files'
    )


def own_name(stored_name: str) -> str:
    """Our name of a tensor that a checkpoint's file calls so."""
    stored_name = WRAPPED.sub("", stored_name)
    for prefix in TEXT_PREFIXES:
        if stored_name.startswith(prefix):
            return "model." + stored_name.removeprefix(prefix)
    return HEAD if stored_name == f"language_model.{HEAD}" else stored_name
