"""A drafter's model: what a target's looks like, a new one, one from a folder, and whether it fits.

A drafter reads the keys and values of its target, so its heads, their sizes and its window are the
target's; its width, its MLP and the number of its queries are its own. (transformers: models/gemma4_assistant.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.drafter.clusters import assign_clusters
from intaglio.errors import ConfigError
from intaglio.packed.checkpoint import TextModel, load_model
from intaglio.packed.decoded import load_packed
from intaglio.packed.identity import CHECKPOINT, PACKED, expect
from intaglio.packed.model import FILE_NAME as PACKED_FILE
from intaglio.packed.model import PackedModel
from intaglio.plan.families import FAMILIES, drafter_of
from intaglio.plan.family import build_meta_model, is_drafter, load_config, text_config, transformers_config

LAYER_TYPES = ("sliding_attention", "sliding_attention", "sliding_attention", "full_attention")
SMALL_TARGET = 2560  # E4B's width; drafters up to there are 256 wide, those of larger models 1024
# Settings that a layer's keys and values depend on, and the tokens: drafter and target must agree in them.
SHARED_FIELDS = ("vocab_size", "sliding_window", "rope_parameters")
TAKEN = (
    *SHARED_FIELDS,
    *("attention_bias", "attention_k_eq_v", "head_dim", "hidden_activation", "max_position_embeddings"),
    *("num_key_value_heads", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"),
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of a new drafter's layers, and the number of clusters in its head (0: none).

    width: of the hidden states. mlp: of the MLP. heads: of the queries. top_clusters: how many of the clusters
    are looked into for each token.
    """

    width: int
    mlp: int
    heads: int
    clusters: int = 0
    top_clusters: int = 32

    @classmethod
    def official(cls, target: dict[str, Any], **changes: int) -> Shape:
        """The shape of Google's drafter for a text model's config of this width, with `changes`."""
        small = target["hidden_size"] <= SMALL_TARGET
        own = {"width": 256, "mlp": 2048, "heads": 4} if small else {"width": 1024, "mlp": 8192}
        return cls(**{"heads": target["num_attention_heads"]} | own | changes)


def drafter_config(target: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """The config of a drafter for a text model's config. ConfigError where a target cannot have this one."""
    target = text_config(target)
    kind = target["model_type"]
    family = drafter_of(kind)
    if family is None:
        known = ", ".join(other.drafts_for for other in FAMILIES.values() if other.drafts_for)
        raise ConfigError(f"{kind}: only {known} hand out the keys and values that a drafter reads")
    layers = transformers_config(target)
    for needed in set(LAYER_TYPES):
        if needed not in _stored(layers):
            raise ConfigError(
                f"the target has no {needed} layer with keys and values of its own, which a drafter reads"
            )
    full = layers.per_layer_config[layers.layer_types.index("full_attention")]
    own_heads = full.num_key_value_heads != target["num_key_value_heads"]
    text = {key: target[key] for key in TAKEN if key in target} | {
        "model_type": kind,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_attention_heads": shape.heads,
        "layer_types": list(LAYER_TYPES),
        "num_hidden_layers": len(LAYER_TYPES),
        "num_kv_shared_layers": len(LAYER_TYPES),
        "global_head_dim": full.head_dim,
        "num_global_key_value_heads": full.num_key_value_heads if own_heads else None,
        "final_logit_softcapping": None,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "tie_word_embeddings": True,
    }
    if shape.clusters and text["vocab_size"] % shape.clusters:
        raise ConfigError(
            f"{shape.clusters} clusters: expected a divisor of the vocabulary's {text['vocab_size']} tokens"
        )
    return {
        "model_type": family.model_type,
        "backbone_hidden_size": target["hidden_size"],
        "use_ordered_embeddings": bool(shape.clusters),
        "num_centroids": shape.clusters or 2048,
        "centroid_intermediate_top_k": min(shape.top_clusters, shape.clusters or 2048),
        "tie_word_embeddings": True,
        "text_config": text,
    }


def config_of(path: str | Path) -> dict[str, Any]:
    """The config of a packed model or of a checkpoint folder."""
    found = expect(path, PACKED, CHECKPOINT)
    return PackedModel.open(path).plan.model.config if found.kind == PACKED else load_config(path)


def target_config(path: str | Path) -> dict[str, Any]:
    """The text model's config of what drafts are for. ConfigError for a drafter."""
    config = config_of(path)
    if is_drafter(config):
        raise ConfigError(f"{path}: is a drafter itself: expected the model that it is to draft for")
    return text_config(config)


def load_drafter(path: str | Path) -> TextModel:
    """A drafter of a transformers folder or of a packed model, float32, in eval mode. ConfigError for another model."""
    config = config_of(path)
    if not is_drafter(config):
        raise ConfigError(f"{path}: model_type {config.get('model_type')!r} is no drafter: expected an assistant model")
    return load_packed(PackedModel.open(path)) if (Path(path) / PACKED_FILE).is_file() else load_model(path)


def check_fits(drafter: TextModel, target: TextModel) -> None:
    """Raise ConfigError for a drafter that cannot read what the target hands out."""
    own, other = drafter.config.get_text_config(), target.config.get_text_config()
    pairs = [("backbone_hidden_size", drafter.config.backbone_hidden_size, other.hidden_size)]
    pairs += [(field, getattr(own, field), getattr(other, field)) for field in SHARED_FIELDS]
    stored = _stored(other)
    for number, kind in enumerate(own.layer_types):
        if kind not in stored:
            raise ConfigError(
                f"drafter's layer {number} reads the keys and values of {kind} layers, of which the target stores none"
            )
        mine, theirs = own.per_layer_config[number], other.per_layer_config[stored[kind]]
        for field in ("head_dim", "num_key_value_heads"):
            pairs.append((f"{field} of {kind} layers", getattr(mine, field), getattr(theirs, field)))
    for field, mine, theirs in pairs:
        if mine != theirs:
            raise ConfigError(
                f"{field} is {mine} in the drafter and {theirs} in the target: they were not made for each other"
            )


def _stored(config: Any) -> dict[str, int]:
    """The layer of each type whose keys and values others may read: the last that has its own."""
    own = config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0)
    return {kind: number for number, kind in enumerate(config.layer_types[:own])}


def new_drafter(target: TextModel, shape: Shape) -> TextModel:
    """A drafter that begins with the sum of its two inputs, the newest token and the target's state, float32.

    Its projections are the directions in which the rows of the target's head spread most, as many as it is wide,
    and its head is the target's in these; its layers add little.
    """
    config = drafter_config(target.config.to_dict(), shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class: Any = type(build_meta_model(config))
        drafter = model_class(transformers_config(config)).float().eval()
    with torch.no_grad():
        _quiet_layers(drafter)
        _pass_through(drafter, target)
        if shape.clusters:
            assign_clusters(drafter)
    return drafter


def _quiet_layers(drafter: TextModel) -> None:
    """Let each layer begin as a small change: what it adds is scaled by its last norm."""
    for layer in drafter.model.layers:
        for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
            getattr(layer, name).weight.fill_(0.1)


def _pass_through(drafter: TextModel, target: TextModel) -> None:
    head: Tensor = target.get_output_embeddings().weight.float()
    width, own = head.shape[1], drafter.config.get_text_config().hidden_size
    directions = torch.linalg.eigh(head.T @ head).eigenvectors.flip(1)[:, :own]  # [D, W], the largest first
    kept = directions.shape[1]
    state_size, embed_size = _rms(target.model.norm.weight), _rms(target.get_input_embeddings().weight) * width**0.5
    drafter.pre_projection.weight.mul_(0.1)
    drafter.pre_projection.weight[:kept, :width] += directions.T * (state_size / embed_size)
    drafter.pre_projection.weight[:kept, width:] += directions.T
    drafter.post_projection.weight[:, :kept] = directions
    drafter.model.embed_tokens.weight[:, :kept] = head @ directions
    # as long as the target's state these would be certain of their first guesses, which are wrong
    drafter.model.norm.weight.fill_(0.2 * state_size * (width / own) ** 0.5)


def _rms(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())
