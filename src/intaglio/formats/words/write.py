"""Codes in words beside their scales: what the exporters for vLLM and for MLX have in common."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import WeightError
from intaglio.formats.checkpoint.write import decoded
from intaglio.formats.listed import ListedTensor
from intaglio.formats.write_folder import listed_parts, write_folder
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.packed.codes import pack_codes
from intaglio.packed.model import PackedModel


def write_affine(
    packed: PackedModel,
    path: str | Path,
    stored: list[ListedTensor],
    config: dict[str, Any],
    *,
    advice: str,
    **options: Any,
) -> None:
    """Write the folder `path` with these tensors of the packed model and this config.json.

    advice: what to do about a scale that its dtype does not hold, for the WeightError that says so.
    options: `metadata`, `replace` and `on_progress` of `write_folder`.
    """
    specs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in sorted(stored, key=lambda tensor: tensor.name)}
    parts = listed_parts(packed, stored, partial(_data, advice))
    write_folder(packed, path, config=config, specs=specs, parts=parts, **options)


def _data(advice: str, tensor: ListedTensor, value: Quantized | Tensor) -> Tensor:
    if tensor.part == "values" or not isinstance(value, Quantized):
        return decoded(value, tensor.dtype, tensor.source)
    if tensor.part == "codes":
        return pack_words(value.codes, value.grid)
    factor = -(1 << (value.grid.code_bits - 1)) if tensor.part == "bias" else 1  # a power of two, so exact
    exact = value.step * factor
    stored = exact.to(tensor.dtype)
    if not torch.equal(stored.float(), exact):
        wrong = exact[stored.float() != exact]
        raise WeightError(
            f"{tensor.source}: {len(wrong)} of {exact.numel()} scales of grid {value.grid.name} are not exact in "
            f"{str(tensor.dtype).removeprefix('torch.')}, the first is {float(wrong[0])!r}: {advice}"
        )
    return stored.repeat_interleave(tensor.repeat, dim=-1)


def pack_words(codes: Tensor, grid: BlockGrid) -> Tensor:
    """int8 [R, C] as bytes of little-endian words, uint8 [R, C x bits / 8]: code + 2^(bits - 1), lowest bits first."""
    if grid.code_bits == 8:
        return codes.view(torch.uint8) ^ 0x80
    return pack_codes(codes, grid)
