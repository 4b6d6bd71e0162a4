"""Predicted sizes of the published files of the family: writes docs/sizes.md.

    python benchmarks/sizes.py

Everything follows from configs and recipes; nothing was fitted to a file, and no file was looked at.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch

from intaglio.packed.store import Specs, in_file_order
from intaglio.plan.bundled import DRAFTER, MODELS, bundled_config
from intaglio.plan.carried import describe_whole, whole_name
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.sizing.sizes import (
    GEMMA_METADATA_BYTES,
    FileSize,
    bf16_bytes,
    gguf_size,
    mobile_size,
    safetensors_size,
    w4a16_tensors,
)

PAGE = Path(__file__).parents[1] / "docs/sizes.md"
INTRO = """# Predicted sizes

This page predicts how large the files of each model are, from the bundled configs and recipes alone.

`python benchmarks/sizes.py` writes it. Headers, tensor lists and padding are counted exactly, as the tests check on files
that are written (`tests/unit/test_sizes.py`). Nothing is fitted. Whoever has the published files can compare.
"""


def main() -> None:
    PAGE.write_text(page(), "utf-8")


def page() -> str:
    """docs/sizes.md."""
    parts = [INTRO, *_ggufs(), *_mobile(), *_w4a16(), *_bf16()]
    return "\n".join(parts).rstrip() + "\n"


def _text(paragraph: str) -> str:
    return textwrap.fill(paragraph, 120, break_on_hyphens=False) + "\n"


def _table(*headers: str) -> list[str]:
    return ["| " + " | ".join(headers) + " |", "|---" + "|--:" * (len(headers) - 1) + "|"]


def _row(*cells: object) -> str:
    return "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |"


def _ggufs() -> list[str]:
    lines = [
        "## Q4_0 GGUF\n",
        _text(
            "Text models and drafters, recipe `q4_0`. The size of the metadata is an input, here "
            f"{GEMMA_METADATA_BYTES:,} bytes. Nearly all of it is the tokenizer. A file with more metadata is larger by the "
            "difference, give or take 31 bytes of padding. The command is `intaglio plan e2b --metadata-bytes 15.8MB --json`, "
            "under `sizes`, `file`."
        ),
        *_table("model", "tensor data", "header and tensor list", "padding", "file"),
    ]
    for name in (*MODELS, *(model + DRAFTER for model in MODELS)):
        size = gguf_size(make_plan(bundled_config(name), "q4_0"))
        lines.append(_row(name, size.data, size.header, size.padding, size.total))
    return [*lines, ""]


def _unused(name: str) -> list[str]:
    """k_proj and v_proj of the layers that read another's keys and values, which published files keep."""
    model = describe_whole(bundled_config(name))
    shared = [layer for layer, donor in enumerate(model.kv_donors) if layer != donor]
    return [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in shared for kind in "kv"]


def _plan(name: str, recipe: str | Recipe, *, unused: bool = False, clipped: bool = True) -> Plan:
    config = bundled_config(name)
    if not clipped:
        for tower in ("vision_config", "audio_config"):
            config[tower] = config[tower] | {"use_clipped_linears": False}
    return make_plan(describe_whole(config, _unused(name) if unused else ()), recipe)


def _mobile() -> list[str]:
    lines = [
        "## Gemma mobile folders\n",
        _text(
            "`model.safetensors` with the bits of Google's files and towers without clip bounds. The last column is without "
            "the unused k_proj and v_proj of KV-shared layers."
        ),
        *_table("model", "tensor data", "header", "file", "file without unused"),
    ]
    for name in MODELS[:2]:
        recipe = name.replace("gemma-4-", "mobile-")
        size, without = (mobile_size(_plan(name, recipe, unused=unused, clipped=False)) for unused in (True, False))
        lines.append(_row(name, size.data, size.header, size.total, without.total))
    return [*lines, ""]


def _w4a16() -> list[str]:
    lines = [
        "## W4A16 folders\n",
        _text(
            "compressed-tensors, pack-quantized, groups of 32: `weight_packed`, bfloat16 `weight_scale`, `weight_shape`. "
            "Towers, embeddings, routers, norms and the per-layer projection are in bfloat16. Sizes are of one file; each "
            "shard of several would have its own header. The last two columns are for folders that were made otherwise: with "
            "k_proj, v_proj (4 bits) and k_norm of KV-shared layers, and also with the per-layer projection in 4 bits."
        ),
        *_table("model", "tensor data", "header", "file", "with unused", "with unused, projection in 4 bits"),
    ]
    for name in MODELS:
        size = safetensors_size(w4a16_tensors(_plan(name, "q4_0")))
        cells: list[object] = ["-", "-"]
        if _unused(name):
            quantized = Recipe.load("q4_0", ["weights.ple_model_projection.grid=q4_0"])
            cells = [
                _with_unused(_plan(name, recipe, unused=True), quantized is recipe).total
                for recipe in ("q4_0", quantized)
            ]
        lines.append(_row(name, size.data, size.header, size.total, *cells))
    return [*lines, ""]


def _with_unused(plan: Plan, projection: bool) -> FileSize:
    specs = w4a16_tensors(plan) | _k_norms(plan)
    if projection:
        module = whole_name("model.per_layer_model_projection")
        rows, columns = specs.pop(f"{module}.weight")[1]
        specs |= {
            f"{module}.weight_packed": (torch.int32, (rows, columns // 8)),
            f"{module}.weight_scale": (torch.bfloat16, (rows, columns // 32)),
            f"{module}.weight_shape": (torch.int64, (2,)),
        }
    return safetensors_size(in_file_order(specs))


def _k_norms(plan: Plan) -> Specs:
    """Keys and values of the KV-shared layers, in the shape of their donors'."""
    norms: Specs = {}
    for layer, donor in enumerate(plan.model.kv_donors):
        if layer != donor:
            shape = plan[f"model.layers.{donor}.self_attn.k_norm.weight"].spec.shape
            norms[whole_name(f"model.layers.{layer}.self_attn.k_norm.weight")] = (torch.bfloat16, shape)
    return norms


def _bf16() -> list[str]:
    lines = [
        "## bfloat16 checkpoints\n",
        _text("Parameters at two bytes each, without buffers and headers. The formats above are smaller."),
        *_table("model", "bytes", "text alone"),
    ]
    for name in MODELS:
        plan = _plan(name, "q4_0")
        lines.append(_row(name, bf16_bytes(plan), bf16_bytes(plan, text_only=True)))
    return [*lines, ""]


if __name__ == "__main__":
    main()
