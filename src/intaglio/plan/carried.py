"""Tensors that a checkpoint holds beside its text model: towers with their embedders, and keys and values nobody reads.

A multimodal Gemma 4 nests its text model; vision and audio towers stand beside it and are carried
along: planned and quantized by the recipe, never trained. The k_proj and v_proj of KV-shared layers
have no use, and transformers makes no module of them, but Google's mobile files keep them. (Other
checkpoints also have a k_norm there, which is left out as it is in these files.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from intaglio.errors import ConfigError
from intaglio.plan.families import WHOLES, Family, role_of
from intaglio.plan.family import ModelSpec, TensorSpec, build_meta_model, describe

TEXT_PREFIX = "model.language_model."  # of the text model's tensors within the whole; alone they begin with "model."
TOWER_KINDS = ("vision", "audio")
TOWERS = (
    *("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio."),
    "model.vision_embedder.",  # of a model without encoders
)
UNUSED = re.compile(r"model\.layers\.(\d+)\.self_attn\.(k_proj|v_proj)\.weight")
SHARED_NORM = re.compile(r"model\.layers\.(\d+)\.self_attn\.(k_norm|v_norm)\.weight")


def whole_name(name: str) -> str:
    """Name in a multimodal checkpoint of the tensor, module or static scale that we call `name`."""
    inside = name.startswith("model.") and not name.startswith(TOWERS)
    return TEXT_PREFIX + name.removeprefix("model.") if inside else name


def text_name(name: str) -> str:
    """Our name of the tensor that a checkpoint of either kind calls `name`: the inverse of `whole_name`."""
    return "model." + name.removeprefix(TEXT_PREFIX) if name.startswith(TEXT_PREFIX) else name


def tower_kind(name: str) -> str:
    """The kind, of TOWER_KINDS, of the tower or embedder that a tensor belongs to; empty for other tensors."""
    part = name.removeprefix("model.").partition(".")[0]
    return next((kind for kind in TOWER_KINDS if part in (f"{kind}_tower", f"{kind}_embedder", f"embed_{kind}")), "")


def scales_in_use(carried_scales: Iterable[str], values: dict[str, float]) -> dict[str, tuple[int, int]]:
    """The activation scales of each kind of tower: how many are known, and how many there are."""
    found = [(tower_kind(name), bool(values[name])) for name in carried_scales]
    totals = {kind: [known for of, known in found if of == kind] for kind in TOWER_KINDS}
    return {kind: (sum(known), len(known)) for kind, known in totals.items() if known}


def describe_whole(config: dict[str, Any], unused: Iterable[str] = ()) -> ModelSpec:
    """`describe`, with all that the checkpoint holds beside its text model.

    config: of a text model, of a drafter, or of a multimodal model; of one that is not in WHOLES the text
    alone is taken. unused: names of tensors of KV-shared layers that the checkpoint holds.
    """
    model = describe(config)
    multimodal = config.get("model_type") in WHOLES
    towers = _towers(config, model.family) if multimodal else ()
    carried = (*(_unused(model, name) for name in unused), *towers)
    return replace(model, carried=carried, whole=config if multimodal else None)


def unused_names(names: Iterable[str], model: ModelSpec) -> list[str]:
    """Those of a checkpoint's tensors that belong to KV-shared layers and have no use, in their order."""
    return [name for name in names if _is_unused(name, model)]


def is_shared_kv(name: str, model: ModelSpec) -> bool:
    """Whether a tensor, by our name, is a projection or norm of keys or values that a layer takes from another one."""
    norm = SHARED_NORM.fullmatch(name)
    return _is_unused(f"model.layers.{norm[1]}.self_attn.k_proj.weight" if norm else name, model)


def _is_unused(name: str, model: ModelSpec) -> bool:
    match = UNUSED.fullmatch(name)
    layer = int(match[1]) if match else -1
    return 0 <= layer < len(model.kv_donors) and model.kv_donors[layer] != layer


def _unused(model: ModelSpec, name: str) -> TensorSpec:
    """Such a tensor has the shape of its donor's; ConfigError where the donor has none."""
    match = UNUSED.fullmatch(name)
    if match is None or not _is_unused(name, model):
        raise ConfigError(f"{name}: no tensor of a KV-shared layer of this model")
    donor = f"model.layers.{model.kv_donors[int(match[1])]}.self_attn.{match[2]}.weight"
    shape = next((tensor.shape for tensor in model.tensors if tensor.name == donor), None)
    if shape is None:
        raise ConfigError(f"{name}: the layer whose keys and values are shared has no {match[2]}")
    return TensorSpec(name, shape, role_of(name))


def _towers(config: dict[str, Any], family: Family) -> tuple[TensorSpec, ...]:
    """Every stored tensor of towers and embedders, under the names that files give them, in transformers' shapes."""

    def stored(name: str) -> str:
        prefix = next((prefix for prefix in family.stored_names if name.startswith(prefix)), "")
        return family.stored_names.get(prefix, "") + name.removeprefix(prefix)

    model = build_meta_model(config)
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    parameters = {name for name, _ in model.named_parameters()}
    return tuple(
        TensorSpec(
            stored(name),
            tuple(tensor.shape),
            "tower_linear" if name in linears else "tower_float",
            buffer=name not in parameters,
        )
        for name, tensor in model.state_dict().items()
        if name.startswith(TOWERS)
    )
