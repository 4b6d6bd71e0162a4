"""A compressed-tensors folder for vLLM, which transformers reads too: pack-quantized integers, symmetric.

From a Q4_0 recipe it is W4A16: 4-bit codes in groups of 32 with signed scales, embeddings as the floats of
16 bits that they decode to exactly. From a mobile recipe it is "mobile-ct": 2-, 4- and 8-bit codes with a
scale for each row, static int8 inputs and outputs of linears, and packed embeddings with a head of its own.
Experts, which a Gemma 4 holds in two tensors a layer, are linears of their own, as vLLM's loader expects them.

vLLM keeps scales in the model's dtype, bfloat16: scales that need more bits are refused, since it would
round them while loading. It has no place for the static scales of an int8 KV cache; they are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from intaglio.formats.checkpoint.write import hf_config, whole_config
from intaglio.formats.words.layout import Scheme, compressed_tensors, linears_of, schemes
from intaglio.formats.words.write import write_affine
from intaglio.formats.write_folder import silent
from intaglio.numerics.grid import BlockGrid
from intaglio.packed.model import PackedModel
from intaglio.plan.family import check_settings
from intaglio.plan.plan import HEAD, Plan
from intaglio.plan.rope import check_rope

ADVICE = (
    "vLLM would round them: pack with scales of eight significant bits, with recipe q4_0, or a mobile recipe with "
    "--set channel_scales=bf16"
)
PACKED = "pack-quantized"
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
# Linears, beside those that a plan may leave in floats one by one.
FLOAT_LINEARS = (
    *("attention", "mlp", "ple_linear", "ple_model_projection", "router", "expert"),
    *("drafter_projection", "centroids"),
)
TOWERS = ("re:.*vision_tower.*", "re:.*audio_tower.*", "re:.*embed_vision.*", "re:.*embed_audio.*")


def export_vllm(
    packed: PackedModel,
    path: str | Path,
    *,
    replace: bool = False,
    on_progress: Callable[[int, int], None] = silent,
) -> None:
    """Write the folder `path`, which `vllm serve` and `AutoModelForCausalLM.from_pretrained` open.

    on_progress is called with the bytes of tensor data written and to be written. Raises RecipeError for
    grids that the format or vLLM does not have, WeightError for scales and floats that bfloat16 does not
    hold, ConfigError for a model that vLLM would compute differently, OutputError if the folder cannot be written.
    """
    check_settings(packed.plan.model, "vLLM")
    check_rope(packed.plan.model, "vLLM")
    write_affine(
        packed,
        path,
        compressed_tensors(packed.plan),
        vllm_config(packed.plan),
        advice=ADVICE,
        replace=replace,
        on_progress=on_progress,
    )


def vllm_note(plan: Plan) -> str:
    """The note says where vLLM's folder differs from the packed model; it is empty where nothing differs."""
    notes = []
    if any("embedding" in t.spec.role and isinstance(t.grid, BlockGrid) and t.grid.portable for t in plan):
        notes.append("Embeddings are bfloat16, exactly what their codes and scales decode to.")
    if any(scheme.static for scheme in schemes(plan).values()):
        notes.append(
            "vLLM 0.32 computes q, k and v, and gate and up, as one linear, and gives all of it the output scale of "
            "the last (v, up), although the file has one for each."
        )
    if any(t.spec.role == "expert" and isinstance(t.grid, BlockGrid) for t in plan):
        notes.append("Each expert is three linears; transformers does not read them, and would make random ones.")
    if plan.recipe.kv_cache is not None:
        notes.append("The format has no place for scales of an int8 KV cache: it stays in floats.")
    return " ".join(notes)


def vllm_config(plan: Plan) -> dict[str, Any]:
    """config.json of a compressed-tensors folder."""
    whole = plan.model.whole is not None
    config = whole_config(plan.model, torch.bfloat16) if whole else hf_config(plan.model, torch.bfloat16)
    found = schemes(plan)
    if plan.model.tied_head and HEAD.removesuffix(".weight") in found:
        config["tie_word_embeddings"] = False
        if whole:
            config["text_config"] |= {"tie_word_embeddings": False}
    return config | {"quantization_config": quantization_config(plan, found)}


def quantization_config(plan: Plan, found: dict[str, Scheme]) -> dict[str, Any]:
    """The QuantizationConfig of compressed-tensors: a group for each scheme, with the modules it is for."""
    by_scheme: dict[Scheme, list[str]] = {}
    for module, scheme in found.items():
        by_scheme.setdefault(scheme, []).append(module)
    uniform = len(by_scheme) == 1
    groups = {
        f"group_{number}": _group(scheme, ["Linear"] if uniform else _patterns(modules))
        for number, (scheme, modules) in enumerate(by_scheme.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _ignored(plan, found),
        "kv_cache_scheme": None,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    channel = scheme.group_size is None
    return {
        "targets": targets,
        "format": PACKED,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if channel else "group",
            "group_size": scheme.group_size,
            "dynamic": False,
        },
        "input_activations": INT8 if scheme.static else None,
        "output_activations": INT8 if scheme.static else None,
    }


def _ignored(plan: Plan, found: dict[str, Scheme]) -> list[str]:
    """Linears that stay floats, by expressions."""
    linears = [
        module
        for tensor in plan
        if tensor.spec.role in FLOAT_LINEARS and len(tensor.spec.shape) > 1
        for module, _, _ in linears_of(plan.stored_name(tensor.name), tensor.spec)
    ]
    head = HEAD.removesuffix(".weight")
    floats = [name for name in (head, *linears) if name not in found]
    return [head] * (head in floats) + _patterns([name for name in floats if name != head]) + list(TOWERS)


def _patterns(modules: list[str]) -> list[str]:
    """Expressions for these modules and no other. A whole fused group is one, so that vLLM finds its absent members.

    vLLM puts "language_model." elsewhere than transformers does, so what stands before the layer is left open.
    """
    numbers: dict[str, list[str]] = {}  # of layers, by expression; none for a module outside of layers
    for module in modules:
        start, layer, kind = re.fullmatch(r"(?:(.*?)\blayers\.(\d+)\.)?(.+)", module).groups()  # type: ignore[union-attr]
        if layer is None:
            numbers[re.escape(kind.rpartition(".")[2])] = []
            continue
        before = r"language_model\..*" if "language_model" in start else ""
        found = numbers.setdefault(rf"{before}\blayers\.#\.{_fused(re.escape(kind))}", [])
        found += [layer] * (layer not in found)
    return [f"re:.*{pattern.replace('#', '(' + '|'.join(found) + ')')}$" for pattern, found in numbers.items()]


def _fused(kind: str) -> str:
    kind = re.sub(r"\bexperts\\\.\d+\b", r"experts\\.\\d+", kind)
    kind = re.sub(r"\b[qkv]_proj$", "[qkv]_proj", kind)
    return re.sub(r"\b(gate|up)_proj$", "(gate|up)_proj", kind)
