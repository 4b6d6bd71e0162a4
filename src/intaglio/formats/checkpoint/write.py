"""A transformers folder whose weights are the trained codes times their steps.

Any tool that reads a checkpoint can read it. Where the plan is portable, such a tool may even
quantize it again: llama.cpp's own quantizer then finds the same Q4_0 codes and scales. It does not find those of
Q6_K and Q8_0 embeddings, for which it makes scales of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import WeightError
from intaglio.formats.checkpoint.kept import write_kept
from intaglio.numerics.grid import IndexGrid, Quantized
from intaglio.numerics.layout import row_chunks
from intaglio.packed.assets import copy_assets
from intaglio.packed.model import PackedModel
from intaglio.packed.store import SafetensorsWriter, Specs, new_path
from intaglio.plan.family import TOWER_ROLES, ModelSpec, build_meta_model
from intaglio.plan.plan import Plan, PlannedTensor


def export_hf(
    packed: PackedModel, path: str | Path, *, replace: bool = False, device: torch.device | str = "cpu"
) -> None:
    """Write the folder `path`: config.json, model.safetensors, tokenizer and generation files, and the scales.

    The scales are for `intaglio convert`, which gives the packed model back (see `formats.checkpoint.kept`).

    The weights are bfloat16 if the plan is portable, that is, if bfloat16 holds each code times its
    step exactly; and float32 if it is not, because a product of a 4-bit code and a float16 scale
    has up to 15 significant bits, and rounding it would move the codes that others find again.
    Towers of a multimodal model go along, each tensor in a dtype that holds it.

    device: where weights are decoded, a few rows at a time; the bits are the same on every device.
    Raises WeightError rather than round a weight; OutputError if the folder cannot be written.
    """
    plan = packed.plan
    dtype = float_dtype(plan)
    sources = hf_sources(plan)
    config = whole_config(plan.model, dtype) if plan.model.whole else hf_config(plan.model, dtype)
    with new_path(Path(path), replace=replace) as temporary:
        temporary.mkdir()
        copy_assets(packed.path, temporary)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (temporary / "config.json").write_text(text, "utf-8")
        with SafetensorsWriter(temporary / "model.safetensors", hf_tensors(plan), packed.file_metadata) as writer:
            for stored, (name, exact_in) in sources.items():
                for rows, value in packed.chunks(name, device):
                    writer.write(stored, decoded(value, exact_in, name), rows)
        write_kept(packed, temporary)


def float_dtype(plan: Plan) -> torch.dtype:
    """The dtype that holds all of a plan's text model exactly."""
    return torch.bfloat16 if plan.portable else torch.float32


def hf_sources(plan: Plan) -> dict[str, tuple[str, torch.dtype]]:
    """Every tensor of the folder: our name of what it holds, and its dtype."""
    dtypes = {t.name: torch.int64 if isinstance(t.grid, IndexGrid) else float_dtype(plan) for t in plan}
    # tensors of KV-shared layers have no place: transformers makes no module of them
    dtypes |= {t.name: _tower_dtype(t) for t in plan.carried if t.spec.role in TOWER_ROLES}
    return {plan.stored_name(name): (name, dtype) for name, dtype in dtypes.items()}


def hf_tensors(plan: Plan) -> Specs:
    """Their dtypes and shapes."""
    return {stored: (dtype, plan[name].spec.shape) for stored, (name, dtype) in hf_sources(plan).items()}


def _tower_dtype(tensor: PlannedTensor) -> torch.dtype:
    return torch.bfloat16 if tensor.grid.portable and not tensor.full_floats else torch.float32


def hf_config(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
    """The model's config as others expect it: with its class, its dtype, and both spellings.

    transformers writes what differs between layers as `per_layer_config`; mlx-lm and Ollama read
    `global_head_dim` and `num_global_key_value_heads`. A drafter's are in the config that it nests.
    """
    architecture = type(build_meta_model(spec.config)).__name__
    name = str(dtype).removeprefix("torch.")
    layers = (spec.config["text_config"] if spec.family.drafter else spec.config) | {"dtype": name}
    if spec.family.full_heads:
        config = spec.layer_config
        full = config.per_layer_config[config.layer_types.index("full_attention")]
        layers["global_head_dim"] = full.head_dim
        own_heads = full.num_key_value_heads != layers["num_key_value_heads"]
        layers["num_global_key_value_heads"] = full.num_key_value_heads if own_heads else None
    whole = spec.config | {"dtype": name, "text_config": layers} if spec.family.drafter else layers
    return whole | {"architectures": [architecture]}


def whole_config(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
    """`hf_config` for the multimodal model that the text model is part of."""
    assert spec.whole is not None
    name = str(dtype).removeprefix("torch.")
    architecture = type(build_meta_model(spec.whole)).__name__
    text = hf_config(spec, dtype)
    del text["architectures"]  # the class is the whole model's
    return spec.whole | {"architectures": [architecture], "dtype": name, "text_config": text}


def decoded(value: Quantized | Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The values of a tensor in `dtype`. WeightError, with the tensor's name, if that does not hold them exactly."""
    if not isinstance(value, Quantized):
        return value.to(dtype)
    decoded = torch.empty(value.codes.shape, dtype=dtype, device=value.codes.device)
    for rows, part in row_chunks(value):  # float32 values of a whole table take twice the room of bfloat16
        exact = part.decode()
        decoded[rows] = exact.to(dtype)
        if not torch.equal(decoded[rows].float(), exact):
            raise WeightError(
                f"{name}: {dtype} does not hold code x step of grid {value.grid.name} exactly: "
                "the packed steps have more significant bits than the grid allows"
            )
    return decoded
