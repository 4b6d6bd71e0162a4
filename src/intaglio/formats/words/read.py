"""Compares a compressed-tensors or an MLX folder with a packed model. Its words are taken apart here bit by bit.

Shared with the exporters are only the lists of tensors in `layout.py`. Everything is compared by its bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from intaglio.errors import ConfigError
from intaglio.formats.listed import codes_in_bytes, compare_listed
from intaglio.formats.tally import Tally
from intaglio.formats.words.layout import (
    Scheme,
    compressed_tensors,
    linears_of,
    mlx_tensors,
    schemes,
)
from intaglio.numerics.grid import BlockGrid
from intaglio.packed.model import PackedModel
from intaglio.plan.family import load_config, quantization_of
from intaglio.plan.patterns import pattern


def is_compressed(path: Path) -> bool:
    """Whether a folder's config says that its weights are compressed-tensors'."""
    return quantization_of(path).get("quant_method") == "compressed-tensors"


def is_mlx(path: Path) -> bool:
    """Whether a folder's config has groups as mlx-lm writes them."""
    return "group_size" in quantization_of(path, "quantization")


def compare_compressed(packed: PackedModel, folder: Path, tally: Tally) -> None:
    """Count into `tally` what the folder holds and what of it differs from the packed model."""
    _check_schemes(packed, folder, tally)
    compare_listed(packed, folder, compressed_tensors(packed.plan), words_unpacked, tally)


def compare_mlx(packed: PackedModel, folder: Path, tally: Tally) -> None:
    """The same for an MLX folder, which holds the text model alone."""
    packed = packed.text_only()
    quantization = load_config(folder)["quantization"]
    stored = mlx_tensors(packed.plan)
    for scale in (tensor for tensor in stored if tensor.part == "scale"):
        module, grid = scale.name.removesuffix(".scales"), packed.plan[scale.source].grid
        assert isinstance(grid, BlockGrid)
        said = quantization.get(module, quantization)
        if (said.get("bits"), said.get("group_size")) != (grid.code_bits, grid.block_size // scale.repeat):
            tally.unlike.append(f"{module} in config.json")
    compare_listed(packed, folder, stored, words_unpacked, tally)


def _check_schemes(packed: PackedModel, folder: Path, tally: Tally) -> None:
    """Count modules that config.json gives other bits, groups or activations than planned."""
    plan, quantization = packed.plan, load_config(folder)["quantization_config"]
    planned = schemes(plan)
    matrices = {
        module: tensor
        for tensor in plan
        if len(tensor.spec.shape) == 2 or tensor.spec.role == "expert"
        for module, _, _ in linears_of(plan.stored_name(tensor.name), tensor.spec)
    }
    for module in {**matrices, **planned}:
        linear = module not in matrices or "embedding" not in matrices[module].spec.role
        if _scheme_of(module, linear, quantization) != planned.get(module):
            tally.unlike.append(f"{module} in config.json")


def _scheme_of(module: str, linear: bool, quantization: dict[str, Any]) -> Scheme | None:
    """Scheme that compressed-tensors' readers give a module: the first target that matches it, unless it is ignored."""

    def matches(target: str) -> bool:
        if target[:3] == "re:":
            return pattern(target[3:]).match(module, error=ConfigError) is not None
        return target == module or (linear and target == "Linear")

    # "ignore" comes first, then the groups in their order, as in the library's own search
    if any(map(matches, quantization.get("ignore") or [])):
        return None
    for group in (quantization.get("config_groups") or {}).values():
        if any(map(matches, group["targets"])):
            weights = group["weights"]
            return Scheme(weights["num_bits"], weights.get("group_size"), group.get("input_activations") is not None)
    return None


def words_unpacked(words: Tensor, bits: int) -> Tensor:
    """int8 codes [R, C] of little-endian words [R, C x bits / 32]."""
    return codes_in_bytes(words.numpy().view(np.uint8), bits)
