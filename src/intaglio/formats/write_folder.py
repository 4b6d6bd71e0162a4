"""Writes a folder with config.json, weights in one safetensors file, tokenizer and generation settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.formats.listed import ListedTensor
from intaglio.numerics.grid import Quantized
from intaglio.packed.assets import copy_assets
from intaglio.packed.model import PackedModel
from intaglio.packed.store import SafetensorsWriter, Specs, new_path

FILE_NAME = "model.safetensors"
Part = tuple[str, slice | None, Tensor]  # a tensor's name, which of its rows (None: all), and these


def silent(done_bytes: int, total_bytes: int) -> None:
    """The progress report of a caller that wants none."""


def write_folder(
    packed: PackedModel,
    path: str | Path,
    *,
    config: dict[str, Any],
    specs: Specs,
    parts: Iterable[Part],
    metadata: dict[str, str] | None = None,
    replace: bool = False,
    on_progress: Callable[[int, int], None] = silent,
) -> None:
    """Write the folder `path`: it appears when all of it is there.

    config: config.json. specs: dtype and shape of every tensor. parts: their contents, in any order, the
    rows of one in theirs. metadata: of the safetensors file.
    """
    text = json.dumps(config, indent=2) + "\n"
    total, done = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in specs.values()), 0
    # widest first, so that each is aligned
    ordered = dict(sorted(specs.items(), key=lambda item: -item[1][0].itemsize))
    with new_path(Path(path), replace=replace) as temporary:
        temporary.mkdir()
        copy_assets(packed.path, temporary)
        (temporary / "config.json").write_text(text, "utf-8")
        with SafetensorsWriter(temporary / FILE_NAME, ordered, metadata or {"format": "pt"}) as writer:
            for name, rows, data in parts:
                writer.write(name, data, rows)
                done += data.nbytes
                on_progress(done, total)


def listed_parts(
    packed: PackedModel, listed: list[ListedTensor], data_of: Callable[[ListedTensor, Quantized | Tensor], Tensor]
) -> Iterator[Part]:
    """Contents of all listed tensors, a few rows at a time; each planned tensor is read once.

    data_of: the stored form of some rows.
    """
    static = packed.read_static()
    by_source: dict[str, list[ListedTensor]] = {}
    for tensor in listed:
        if tensor.part == "static":
            # 0 says that nothing is quantized, in a format that has scales which the plan has not
            yield tensor.name, None, torch.full(tensor.shape, static.get(tensor.source, 0.0))
        elif tensor.part == "shape":
            yield tensor.name, None, torch.tensor(tensor.matrix)
        else:
            by_source.setdefault(tensor.source, []).append(tensor)
    for source, tensors in by_source.items():
        for rows, value in packed.chunks(source):
            for tensor in tensors:
                if tensor.piece is None:
                    yield tensor.name, rows, data_of(tensor, value)
                elif rows is None or tensor.piece.expert in range(rows.start, rows.stop):
                    assert isinstance(value, Quantized)
                    yield tensor.name, None, data_of(tensor, tensor.piece.of(value, rows.start if rows else 0))
