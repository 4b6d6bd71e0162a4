"""A model of one of the families (see `families`) as its config describes it: every tensor with its role.

Everything else in intaglio speaks of roles. What a checkpoint holds beside its text model is in `carried`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from intaglio.errors import ConfigError
from intaglio.plan.contradictions import check_nested, check_rope_scaling, check_sizes, check_values
from intaglio.plan.families import FAMILIES, MULTIMODAL, Family, role_of
from intaglio.plan.files import one_line, read_json
from intaglio.plan.mended import mend_kv_sharing

# Beside the text model: weights of linears in vision and audio towers and their embedders, and the rest of these.
TOWER_ROLES = ("tower_linear", "tower_float")


@dataclass(frozen=True)
class TensorSpec:
    """Name in the state dict, shape, and role of one tensor. Rows are along the last dimension: of a matrix
    [rows, columns], and of experts [experts, rows, columns].

    slice_columns: width of the slices that a row consists of, in the table of per-layer embeddings
        one for each layer; None where a row is one piece.
    buffer: whether it is no parameter: a layer's scalar, a bound of a clipped linear, an order of tokens.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    slice_columns: int | None = None
    buffer: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelSpec:
    """A model as its config alone describes it.

    config: the text model's config, as JSON holds it; a drafter's nests that of its layers. tensors: every
    stored tensor of the text model, in state-dict order; a head tied to the embedding is not listed.
    carried: what a checkpoint holds beside these (see `carried`), and whole: the config of the multimodal
    model that the text model is part of. Both are empty for a model that is described by itself.
    """

    family: Family
    config: dict[str, Any]
    tensors: tuple[TensorSpec, ...]
    carried: tuple[TensorSpec, ...] = ()
    whole: dict[str, Any] | None = None

    def tensor(self, name: str) -> TensorSpec:
        return next(t for t in self.tensors if t.name == name)

    def text_only(self) -> ModelSpec:
        """The text model by itself; of what is carried, only what lies in its layers."""
        carried = tuple(t for t in self.carried if t.role not in TOWER_ROLES)
        return replace(self, carried=carried, whole=None)

    @functools.cached_property
    def layer_config(self) -> Any:
        """transformers' config of the layers: the text model's, or the one that a drafter's nests."""
        return transformers_config(self.config).get_text_config()

    @functools.cached_property
    def first_late_layer(self) -> int:
        """The first of the late layers: the KV-shared ones, or without any the second half."""
        config = self.layer_config
        layers, shared = int(config.num_hidden_layers), int(getattr(config, "num_kv_shared_layers", 0))
        return layers - shared if 0 < shared < layers else (layers + 1) // 2

    @functools.cached_property
    def kv_donors(self) -> tuple[int, ...]:
        """The layer whose keys and values each layer attends to: itself, or the last of its type that has any.

        Empty for a drafter, which attends to those of another model.
        """
        config = self.layer_config
        own = config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0)
        kinds = config.layer_types if own else []
        last = {kind: max(i for i in range(own) if kinds[i] == kind) for kind in set(kinds[:own])}
        return tuple(i if i < own else last[kind] for i, kind in enumerate(kinds))

    @property
    def tied_head(self) -> bool:
        """Whether the head is the token embedding."""
        return all(tensor.role != "head" for tensor in self.tensors)


def load_config(model_dir: str | Path) -> dict[str, Any]:
    """Read config.json of a model folder (or the file itself); ConfigError says what is wrong."""
    path = Path(model_dir)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file: expected a model folder with config.json")
    config = read_json(path)
    if "model_type" not in config:
        raise ConfigError(f"{path}: no model_type: expected the config.json of a transformers model")
    return config


def quantization_of(folder: Path, key: str = "quantization_config") -> dict[str, Any]:
    """The table of a folder's config.json that says how its weights are quantized; empty where there is none."""
    found = load_config(folder).get(key) if (folder / "config.json").is_file() else None
    return found if isinstance(found, dict) else {}


def is_mobile(model_dir: str | Path) -> bool:
    """Whether a folder's config says that its weights are in the Gemma mobile format."""
    return quantization_of(Path(model_dir)).get("quant_method") == "gemma"


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The text part of a multimodal config; a text model's or a drafter's config as it is."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and not is_drafter(config) else config


def is_drafter(config: dict[str, Any]) -> bool:
    """Whether this is a drafter's config, whose nested `text_config` is no model by itself."""
    family = FAMILIES.get(str(config.get("model_type")))
    return family is not None and family.drafter


def check_runs_alone(model: ModelSpec, where: str | Path) -> None:
    """Raise ConfigError for a drafter, which says nothing without its target."""
    if model.family.drafter:
        raise ConfigError(
            f"{where}: {model.family.model_type}: a drafter is trained and measured beside its target: use "
            "`intaglio train-drafter`"
        )


def read_spec(model_dir: str | Path) -> ModelSpec:
    """`describe` for a model folder (or its config.json); every ConfigError names it."""
    config = load_config(model_dir)
    try:
        return describe(config)
    except ConfigError as error:
        raise ConfigError(f"{model_dir}: {error}") from error


def describe(config: dict[str, Any]) -> ModelSpec:
    """List every tensor of the text model of a config, without weights.

    The model is built by transformers on the meta device, so its names and shapes are the
    library's own. Raises ConfigError for a model_type that no family covers.
    """
    check_sizes(config)
    if text_config(config) is not config:
        check_nested(config, text_config(config))
    config = text_config(config)
    check_rope_scaling(config)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = sorted({*FAMILIES, *MULTIMODAL})
        if model_type in MULTIMODAL:
            raise ConfigError(
                f"model_type {model_type!r} is that of a multimodal model, but its text_config is missing: "
                f'download config.json again, or say "model_type": "{model_type}_text" if it describes the text alone'
            )
        raise ConfigError(f"unknown model_type {model_type!r}: expected one of {', '.join(known)}")
    check_values(config.get("text_config") or config, transformers_config(config).get_text_config())
    model: Any = build_meta_model(config)
    shared = getattr(model.config, "num_kv_shared_layers", 0)
    if shared >= model.config.get_text_config().num_hidden_layers and not FAMILIES[model_type].drafter:
        raise ConfigError(
            f"num_kv_shared_layers = {shared}: no layer has keys and values to share: only a drafter may have so many"
        )
    layers = model.config.get_text_config()
    if "sliding_attention" in layers.layer_types and not layers.sliding_window:
        raise ConfigError(f"sliding_window = {layers.sliding_window}: expected a number of tokens for sliding layers")
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    stored = parameters | dict(model.named_buffers())
    order = [name for name in model.state_dict() if name in stored]  # without a tied head, and tables computed anew
    slices = {"ple_embedding": getattr(model.config, "hidden_size_per_layer_input", None)}
    tensors = tuple(
        TensorSpec(name, tuple(stored[name].shape), role := role_of(name), slices.get(role), name not in parameters)
        for name in order
    )
    return ModelSpec(FAMILIES[model_type], config, tensors)


def check_settings(model: ModelSpec, runtime: str) -> None:
    """Raise ConfigError for a field that a runtime of `Family.fixed` does not ask, and computes by another value."""
    for key, values in model.family.fixed.get(runtime, {}).items():
        check_setting(model, key, values, runtime)
    config, slides = model.layer_config, "sliding_attention" in model.layer_config.layer_types
    if runtime in model.family.plain_in and slides and config.sliding_window < config.max_position_embeddings:
        raise ConfigError(
            f"sliding_window = {config.sliding_window}: in {runtime} every layer attends to the whole text, so longer "
            f"texts give other logits: quantize it with max_position_embeddings = {config.sliding_window} in its "
            f"config.json, which says {config.max_position_embeddings}, or export it to another format"
        )


def check_setting(model: ModelSpec, key: str, values: tuple[Any, ...], runtime: str) -> None:
    """Raise ConfigError unless a field of the text config is one of these, or without any a number but 0."""
    found = getattr(model.layer_config, key)
    if found not in values if values else not found:
        expected = " or ".join(repr(value) for value in values) or "a number"
        raise ConfigError(f"{key} = {found!r}: {runtime} computes this model with {expected} only")


def build_meta_model(config: dict[str, Any]) -> torch.nn.Module:
    """The transformers model of a config, with no memory behind its weights."""
    from transformers import AutoModelForCausalLM

    hf_config = transformers_config(config)
    try:
        with torch.device("meta"):
            model: torch.nn.Module = AutoModelForCausalLM.from_config(hf_config)
            return model
    except Exception as error:  # transformers raises many types for a config that contradicts itself
        raise ConfigError(f"transformers cannot build this config: {one_line(error)}") from error


def transformers_config(config: dict[str, Any]) -> Any:
    """transformers' own config object, in which every spelling of a field reads the same."""
    from transformers import AutoConfig

    mend_kv_sharing()
    family = FAMILIES.get(config.get("model_type", ""))
    # until 5.22 transformers takes torch's fused kernels, which leave out the soft cap
    attention = {"attn_implementation": "eager"} if family and family.eager else {}
    try:
        return AutoConfig.for_model(**config, **attention)
    except Exception as error:
        raise ConfigError(f"transformers cannot read this config: {one_line(error)}") from error
