"""The Gemma mobile format as a list of tensors: what each is called, its dtype, its shape, and where it comes from.

Shared by whoever writes, reads or checks such a folder; how codes lie in bytes is not here, each knows
it by itself. Names and dtypes are those that transformers reads (integrations/gemma_quant.py) and that
Google's files have.
"""

from __future__ import annotations

from typing import Any

import torch

from intaglio.errors import ConfigError, RecipeError
from intaglio.formats.facts import check_dense
from intaglio.formats.listed import ListedTensor
from intaglio.numerics.grid import BlockGrid
from intaglio.plan.patterns import pattern
from intaglio.plan.plan import HEAD, Plan, PlannedTensor
from intaglio.plan.static import kv_scales

FORMAT_BITS = (2, 4, 8)
# Roles of tensors that are weights of linears and embeddings; the reader looks at no other.
LINEAR_OR_EMBEDDING = (
    "attention",
    "mlp",
    "ple_linear",
    "ple_model_projection",
    "token_embedding",
    "ple_embedding",
    "head",
    "tower_linear",
)


def stored_tensors(plan: Plan) -> list[ListedTensor]:
    """Every tensor of a plan's mobile folder. RecipeError for a grid that the format does not have."""
    check_mobile(plan)
    stored = [part for tensor in plan.everything for part in _parts(plan, tensor, tensor.name)]
    if plan.model.tied_head:  # the format has no ties, so the embedding's codes stand there twice
        stored += _parts(plan, plan.embedding, HEAD)
    for scale in kv_scales(plan.model):  # of every layer, whether the recipe quantizes the cache or not
        stored.append(ListedTensor(plan.stored_name(scale.name), "static", scale.name, torch.float32, ()))
    return stored


def check_mobile(plan: Plan) -> None:
    """Raise RecipeError for a family or a grid that the mobile format does not have."""
    check_dense(plan.model, "gemma-mobile", "the mobile format")
    for tensor in plan.everything:
        grid = tensor.grid
        if isinstance(grid, BlockGrid) and not (
            grid.positive and grid.ggml_type is None and grid.code_bits in FORMAT_BITS
        ):
            raise RecipeError(
                f"{tensor.name}: recipe {plan.recipe.name} puts it on grid {grid.name}, which the mobile format does "
                "not have: choose a recipe for it, for example mobile"
            )


def _parts(plan: Plan, tensor: PlannedTensor, ours: str) -> list[ListedTensor]:
    """The tensors that hold a planned one under our name `ours`, which for a tied head is not its own."""
    name, source, shape = plan.stored_name(ours), tensor.name, tensor.spec.shape
    grid = tensor.grid
    if not isinstance(grid, BlockGrid):
        return [ListedTensor(name, "values", source, tensor.stored_dtype, shape)]
    module = name.removesuffix(".weight")
    rows, columns = shape
    # codes of eight bits are signed bytes; others are fields of unsigned ones
    codes = torch.int8 if grid.code_bits == 8 else torch.uint8
    packed, scales = (rows, columns * grid.code_bits // 8), (rows, columns // grid.block_size)
    if tensor.quantized_linear or ours == HEAD:
        names = [name, f"{module}.weight_scale"]
        # each linear has both scales, used or not; a value of 0 says that nothing is quantized
        statics = [f"{kind}_activation_scale" for kind in ("input", "output")]
    else:
        names, statics = [f"{module}.embedding_quantized", f"{module}.embedding_scale"], []
    return [
        ListedTensor(names[0], "codes", source, codes, packed),
        ListedTensor(names[1], "scale", source, torch.float32, scales),
        *(
            ListedTensor(f"{module}.{static}", "static", f"{ours.removesuffix('weight')}{static}", torch.float32, ())
            for static in statics
        ),
    ]


def module_bits(plan: Plan) -> dict[str, int | None]:
    """Bits of every linear and embedding by its module's name in the folder; None for one that stays float."""
    bits = {}
    for tensor in plan.everything:
        if tensor.spec.role in LINEAR_OR_EMBEDDING:
            bits[plan.stored_name(tensor.name)] = _bits(tensor)
    if plan.model.tied_head:
        bits[HEAD] = _bits(plan.embedding)
    return {name.removesuffix(".weight"): value for name, value in bits.items()}


def _bits(tensor: PlannedTensor) -> int | None:
    return tensor.grid.code_bits if isinstance(tensor.grid, BlockGrid) else None


def resolve_bits(module: str, quantization: dict[str, Any]) -> int | None:
    """Bits that transformers' reader gives a linear or embedding by this `quantization_config`; None: it stays float.

    The reader joins the patterns into one alternation: at the first place in the name where any of
    them matches, the first of them that does wins.
    """
    # transformers' should_convert_module: a pattern from the start up to a module's boundary, or a suffix
    for entry in quantization.get("modules_to_not_convert") or []:
        if module.endswith(entry) or pattern(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))").match(module, error=ConfigError):
            return None
    default: int = quantization.get("num_bits", 4)
    patterns: dict[str, dict[str, Any]] = quantization.get("module_quant_configs") or {}
    joined = "|".join(f"(?P<g{i}>{p})" for i, p in enumerate(patterns))
    found = pattern(joined).search(module, error=ConfigError) if patterns else None
    if found is None:
        return default
    group = next(i for i in range(len(patterns)) if found[f"g{i}"] is not None)
    return int(list(patterns.values())[group].get("num_bits", default))
