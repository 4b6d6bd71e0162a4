"""Formats of packed integers beside their scales, compressed-tensors and MLX, as lists of tensors.

Shared by whoever writes or checks such a folder. Both lay codes of b bits into 32-bit words from the
lowest bits on, as code + 2^(b-1); how is not here, each side knows it by itself.

compressed-tensors (for vLLM): compressors/pack_quantized in its source, and vLLM's
layers/quantization/compressed_tensors. MLX: mlx/ops.h, and mlx_lm/utils.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from intaglio.errors import RecipeError
from intaglio.formats.listed import ListedTensor, Piece
from intaglio.numerics.grid import BlockGrid, Grid
from intaglio.numerics.rounding import BFLOAT16_SIGNIFICANT_BITS
from intaglio.plan.family import TOWER_ROLES, TensorSpec
from intaglio.plan.plan import HEAD, Plan, PlannedTensor

WORD_BITS = 32
BITS = (2, 4, 8)
MLX_GROUPS = (128, 64, 32)
# vLLM computes each of these in one kernel, under one scheme; and all experts of a layer.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
EXPERT_GROUP = ("gate_proj", "up_proj", "down_proj")
EXPERT_LINEARS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def float_dtype(grid: Grid) -> torch.dtype:
    """Narrowest dtype that holds each value of a grid exactly, code times step."""
    return torch.bfloat16 if grid.portable else torch.float32


def scale_dtype(grid: BlockGrid) -> torch.dtype:
    """Narrowest dtype that holds each step of a grid exactly, and each times a power of two."""
    return torch.bfloat16 if grid.step_bits <= BFLOAT16_SIGNIFICANT_BITS else torch.float32


def packable(grid: Grid) -> bool:
    """Whether a grid has one scale for each block and codes that fill words."""
    return isinstance(grid, BlockGrid) and grid.super_block is None and grid.code_bits in BITS


# MLX


def mlx_tensors(plan: Plan) -> list[ListedTensor]:
    """Every tensor of a plan's MLX folder. RecipeError for experts, and for blocks that MLX has no groups for."""
    if any(tensor.spec.role == "expert" for tensor in plan):
        raise RecipeError("this model has experts, which the MLX export does not write: export it to gguf, hf or vllm")
    return [part for tensor in plan for part in _mlx_parts(tensor)]


def mlx_group(tensor: PlannedTensor) -> int | None:
    """Columns of a group in MLX, of which a block of the grid has one or several; None if it is written as floats."""
    grid = tensor.grid
    if not isinstance(grid, BlockGrid) or not packable(grid):
        return None
    group = next((size for size in MLX_GROUPS if grid.block_size % size == 0), None)
    if group is None:
        raise RecipeError(
            f"{tensor.name}: scales of grid {grid.name} are for {grid.block_size} columns each: MLX has groups of "
            "32, 64 and 128 columns, so expected a multiple of 32: put it on another grid, for example bf16"
        )
    return group


def _mlx_parts(tensor: PlannedTensor) -> list[ListedTensor]:
    name, grid, shape = tensor.name, tensor.grid, tensor.spec.shape
    group = mlx_group(tensor)
    if group is None or not isinstance(grid, BlockGrid):
        return [ListedTensor(name, "values", name, float_dtype(grid), shape)]
    (rows, columns), module, dtype = shape, name.removesuffix(".weight"), scale_dtype(grid)
    groups, repeat = (rows, columns // group), grid.block_size // group
    return [
        ListedTensor(name, "codes", name, torch.uint32, (rows, columns * grid.code_bits // WORD_BITS)),
        ListedTensor(f"{module}.scales", "scale", name, dtype, groups, repeat),
        ListedTensor(f"{module}.biases", "bias", name, dtype, groups, repeat),
    ]


# compressed-tensors


@dataclass(frozen=True)
class Scheme:
    """Quantization of a module of a compressed-tensors folder. group_size: None for a scale for each row."""

    bits: int
    group_size: int | None
    static: bool


def schemes(plan: Plan) -> dict[str, Scheme]:
    """The modules that stay on their grids, by the folder's names, in state-dict order.

    Linears do. Embeddings do where a float of 16 bits could not hold them; their head is then untied.
    RecipeError for what compressed-tensors or vLLM does not have.
    """
    tower = next((t for t in plan.carried if t.spec.role in TOWER_ROLES and isinstance(t.grid, BlockGrid)), None)
    if tower is not None:
        raise RecipeError(
            f"{tower.name}: recipe {plan.recipe.name} quantizes it, and vLLM reads towers as floats only: leave them "
            "out with --text-only, or quantize by a recipe that leaves them alone"
        )
    found = {
        module: scheme
        for tensor in plan
        if (scheme := _scheme(plan, tensor)) is not None
        for module, _, _ in linears_of(plan.stored_name(tensor.name), tensor.spec)
    }
    embedding = plan.embedding
    if plan.model.tied_head and _scheme(plan, embedding) is not None:
        found[HEAD.removesuffix(".weight")] = found[plan.stored_name(embedding.name).removesuffix(".weight")]
    _check_fused(plan, found)
    return found


def linears_of(name: str, spec: TensorSpec) -> list[tuple[str, tuple[int, int], Piece | None]]:
    """The modules that compressed-tensors makes of a matrix, or of all experts: name, shape, and which part each is.

    name: the folder's, of the tensor. Of experts, gate_up_proj [E, 2I, H] is two linears for each, gate first.
    """
    if spec.role != "expert":
        rows, columns = spec.shape
        return [(name.removesuffix(".weight"), (rows, columns), None)]
    experts, rows, columns = spec.shape
    folder, _, kind = name.rpartition(".")
    own = rows // len(EXPERT_LINEARS[kind])
    return [
        (f"{folder}.{expert}.{linear}", (own, columns), Piece(expert, slice(i * own, (i + 1) * own)))
        for expert in range(experts)
        for i, linear in enumerate(EXPERT_LINEARS[kind])
    ]


def _scheme(plan: Plan, tensor: PlannedTensor) -> Scheme | None:
    grid = tensor.grid
    if not isinstance(grid, BlockGrid) or not packable(grid) or (grid.portable and not tensor.quantized_linear):
        return None
    columns = tensor.spec.shape[-1]
    if columns * grid.code_bits % WORD_BITS:
        raise RecipeError(
            f"{tensor.name}: {columns} codes of {grid.code_bits} bits do not fill words of {WORD_BITS} bits, as "
            "compressed-tensors' do: put it on another grid, for example bf16"
        )
    module = tensor.name.removesuffix(".weight")
    static = any(scale.module == module and scale.kind == "input" for scale in plan.static_scales)
    return Scheme(grid.code_bits, None if grid.block_size == columns else grid.block_size, static)


def _check_fused(plan: Plan, found: dict[str, Scheme]) -> None:
    linears = {
        module: tensor.spec.role
        for tensor in plan
        if tensor.spec.role in ("attention", "mlp", "expert")
        for module, _, _ in linears_of(plan.stored_name(tensor.name), tensor.spec)
    }
    for module, role in linears.items():
        parent, _, own = module.rpartition(".")
        group = EXPERT_GROUP if role == "expert" else next((group for group in FUSED if own in group), ())
        for name in (f"{parent}.{other}" for other in group):
            if module in found and name in linears and found.get(name) != found[module]:
                raise RecipeError(
                    f"{module} and {name} are quantized differently ({_words(found[module])}, "
                    f"{_words(found.get(name))}): vLLM computes them as one: give them the same grid"
                )


def _words(scheme: Scheme | None) -> str:
    if scheme is None:
        return "floats"
    group = "rows" if scheme.group_size is None else f"groups of {scheme.group_size}"
    return f"{scheme.bits} bits in {group}" + (", static activations" if scheme.static else "")


def compressed_tensors(plan: Plan) -> list[ListedTensor]:
    """Every tensor of a plan's compressed-tensors folder. RecipeError as `schemes`."""
    found = schemes(plan)
    towers = [t for t in plan.carried if t.spec.role in TOWER_ROLES]
    stored = []
    for tensor in (*plan.tensors, *towers):
        name = plan.stored_name(tensor.name)
        if tensor.spec.role in TOWER_ROLES or _scheme(plan, tensor) is None:
            stored.append(ListedTensor(name, "values", tensor.name, tensor.stored_dtype, tensor.spec.shape))
            continue
        for module, matrix, piece in linears_of(name, tensor.spec):
            stored += _compressed_parts(module, tensor.name, matrix, piece, found[module])
    embedding, head = plan.embedding, HEAD.removesuffix(".weight")
    if plan.model.tied_head and head in found:
        ((_, matrix, _),) = linears_of(embedding.name, embedding.spec)
        stored += _compressed_parts(head, embedding.name, matrix, None, found[head])
    return stored


def _compressed_parts(
    module: str, source: str, matrix: tuple[int, int], piece: Piece | None, scheme: Scheme
) -> list[ListedTensor]:
    """The tensors that hold a planned one, or a piece of it, as this module of the folder."""
    rows, columns = matrix
    words = columns * scheme.bits // WORD_BITS
    scales = 1 if scheme.group_size is None else columns // scheme.group_size
    parts = [
        ListedTensor(f"{module}.weight_packed", "codes", source, torch.int32, (rows, words), piece=piece),
        ListedTensor(f"{module}.weight_scale", "scale", source, torch.bfloat16, (rows, scales), piece=piece),
        ListedTensor(f"{module}.weight_shape", "shape", source, torch.int64, (2,), matrix=matrix),
    ]
    for kind in ("input", "output") if scheme.static else ():
        static = f"{source.removesuffix('weight')}{kind}_activation_scale"
        parts.append(ListedTensor(f"{module}.{kind}_scale", "static", static, torch.float32, (1,)))
    return parts
