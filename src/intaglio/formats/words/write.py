"""Codes in words beside their scales: what the exporters for vLLM and for MLX have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import WeightError
from intaglio.formats.checkpoint.write import decoded
from intaglio.formats.words.layout import AffineTensor
from intaglio.formats.write_folder import Part, write_folder
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.packed.codes import pack_codes
from intaglio.packed.model import PackedModel


def write_affine(
    packed: PackedModel,
    path: str | Path,
    stored: list[AffineTensor],
    config: dict[str, Any],
    *,
    advice: str,
    **options: Any,
) -> None:
    """Write the folder `path` with these tensors of the packed model and this config.json.

    advice: what to do about a scale that its dtype does not hold, for the WeightError that says so.
    options: `metadata`, `replace` and `on_progress` of `write_folder`.
    """
    specs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in stored}
    write_folder(packed, path, config=config, specs=specs, parts=_parts(packed, stored, advice), **options)


def _parts(packed: PackedModel, stored: list[AffineTensor], advice: str) -> Iterator[Part]:
    """Everything a folder holds, a few rows at a time; each planned tensor is read once."""
    static = packed.read_static()
    by_source: dict[str, list[AffineTensor]] = {}
    for tensor in stored:
        if tensor.part == "static":
            yield tensor.name, None, torch.tensor([static[tensor.source]], dtype=torch.float32)
        elif tensor.part == "shape":
            yield tensor.name, None, torch.tensor(tensor.matrix)
        else:
            by_source.setdefault(tensor.source, []).append(tensor)
    for source, tensors in by_source.items():
        for rows, value in packed.chunks(source):
            for tensor in tensors:
                if tensor.piece is None:
                    yield tensor.name, rows, _data(tensor, value, advice)
                elif rows is None or tensor.piece.expert in range(rows.start, rows.stop):
                    assert isinstance(value, Quantized)
                    piece = tensor.piece.of(value, rows.start if rows else 0)
                    yield tensor.name, None, _data(tensor, piece, advice)


def _data(tensor: AffineTensor, value: Quantized | Tensor, advice: str) -> Tensor:
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
