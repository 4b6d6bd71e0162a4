"""A folder for mlx-lm, on Apple silicon or a CPU: codes as affine groups whose bias makes them symmetric.

MLX decodes q x scale + bias with unsigned q. Here q is code + 2^(b-1) and the bias -2^(b-1) x scale, so that
scales and codes are the trained ones. A scale for whole rows is repeated for each of their groups. What MLX has
no groups for (Q6_K, with blocks of 16) is written as the floats it stands for.

MLX computes with float activations and a float KV cache: static scales of a recipe are left out, and so are
vision and audio towers, as mlx-lm is for text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from intaglio.errors import ConfigError
from intaglio.formats.checkpoint.write import hf_config
from intaglio.formats.gguf.write import sliding_period
from intaglio.formats.words.layout import mlx_group, mlx_tensors
from intaglio.formats.words.write import write_affine
from intaglio.formats.write_folder import silent
from intaglio.numerics.grid import BlockGrid
from intaglio.packed.model import PackedModel
from intaglio.plan.families import check_export
from intaglio.plan.family import check_settings, transformers_config
from intaglio.plan.plan import Plan
from intaglio.plan.rope import KINDS, check_rope, rope_parameters

ADVICE = "the packed scales have more significant bits than their grid allows: pack the model again"


def export_mlx(
    packed: PackedModel,
    path: str | Path,
    *,
    replace: bool = False,
    on_progress: Callable[[int, int], None] = silent,
) -> None:
    """Write the folder `path`, which `mlx_lm.load` opens.

    on_progress is called with the bytes of tensor data written and to be written. Raises RecipeError for
    blocks that MLX has no groups for, ConfigError for a model that mlx-lm would compute differently,
    OutputError if the folder cannot be written.
    """
    packed = packed.text_only()
    check_export(packed.plan.model.family, "mlx", "the MLX export")
    check_settings(packed.plan.model, "mlx-lm")
    check_rope(packed.plan.model, "mlx-lm")
    write_affine(
        packed,
        path,
        mlx_tensors(packed.plan),
        mlx_config(packed.plan),
        advice=ADVICE,
        metadata={"format": "mlx"},
        replace=replace,
        on_progress=on_progress,
    )


def mlx_config(plan: Plan) -> dict[str, Any]:
    """config.json of an MLX folder: the text model's, with both spellings of its fields, and the groups."""
    config = hf_config(plan.model, torch.bfloat16 if plan.portable else torch.float32)
    layers = transformers_config(plan.model.config)
    if plan.model.family.older_names:
        config |= _older_fields(layers)
    elif config["num_global_key_value_heads"] and not plan.model.config.get("attention_k_eq_v"):
        raise ConfigError(
            f"num_global_key_value_heads = {config['num_global_key_value_heads']} without attention_k_eq_v: mlx-lm "
            "takes num_key_value_heads for every layer of such a model: export it to another format"
        )
    quantization = _quantization(plan)
    # mlx-lm reads the first, and others that follow transformers the second
    return config | ({"quantization": quantization, "quantization_config": quantization} if quantization else {})


def _quantization(plan: Plan) -> dict[str, Any] | None:
    """The commonest bits and group size, and by module what differs from them; None if nothing is quantized."""
    groups = {
        tensor.name.removesuffix(".weight"): (tensor.grid.code_bits, group)
        for tensor in plan
        if isinstance(tensor.grid, BlockGrid) and (group := mlx_group(tensor)) is not None
    }
    if not groups:
        return None
    # mlx-lm takes one pair for all modules, and a table for each module that differs
    usual = max(set(groups.values()), key=lambda kind: (list(groups.values()).count(kind), kind))
    named = {module: _entry(*kind) for module, kind in groups.items() if kind != usual}
    return {**_entry(*usual), **named}


def _entry(bits: int, group: int) -> dict[str, Any]:
    return {"group_size": group, "bits": bits, "mode": "affine"}


def _older_fields(config: Any) -> dict[str, Any]:
    """Fields that mlx-lm reads under the names of older configs."""
    full, sliding = (rope_parameters(config)[kind] for kind in KINDS)
    scaling = {"type": full["rope_type"], "factor": full["factor"]} if full["rope_type"] == "linear" else None
    return {
        "rope_theta": full["rope_theta"],
        "rope_local_base_freq": sliding["rope_theta"],
        "rope_scaling": scaling,
        "sliding_window_pattern": sliding_period(config.layer_types),
    }
