"""A folder with config.json, weights in one safetensors file, and what belongs to a model beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.packed.assets import copy_assets
from intaglio.packed.model import PackedModel
from intaglio.packed.store import SafetensorsWriter, new_path

FILE_NAME = "model.safetensors"
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
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
    metadata: str = "pt",
    replace: bool = False,
    on_progress: Callable[[int, int], None] = silent,
) -> None:
    """Write the folder `path`: it appears when all of it is there.

    config: config.json. specs: dtype and shape of every tensor; parts: their contents, in any order, the
    rows of one in theirs. metadata: what the file's header calls its format.
    """
    text = json.dumps(config, indent=2) + "\n"
    total, done = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in specs.values()), 0
    # widest first, then by name: where safetensors itself would put them, so that each is aligned
    ordered = {name: specs[name] for name in sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))}
    with new_path(Path(path), replace=replace) as temporary:
        temporary.mkdir()
        copy_assets(packed.path, temporary)
        (temporary / "config.json").write_text(text, "utf-8")
        with SafetensorsWriter(temporary / FILE_NAME, ordered, {"format": metadata}) as writer:
            for name, rows, data in parts:
                writer.write(name, data, rows)
                done += data.nbytes
                on_progress(done, total)
