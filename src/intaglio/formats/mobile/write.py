"""The Gemma mobile format: a transformers folder with packed codes, their scales, and static scales of int8.

What transformers calls `quant_method: "gemma"`, and reads without any code of ours. Codes and scales are
those of the PackedModel; nothing is fitted or rounded here. The head is written beside the embedding
that it is tied to, with the same codes, as the format has no ties.

Codes lie from the lowest bits of a byte on, as code + 2 or code + 8, and those of eight bits as they are: as in
a PackedModel, so that verification has its own way to take them apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.formats.checkpoint.write import hf_config, whole_config
from intaglio.formats.mobile.layout import StoredTensor, stored_tensors
from intaglio.formats.mobile.write_config import quantization_config
from intaglio.numerics.grid import Quantized
from intaglio.packed.assets import copy_assets
from intaglio.packed.codes import pack_codes
from intaglio.packed.model import PackedModel
from intaglio.packed.store import SafetensorsWriter, Specs, new_path
from intaglio.plan.plan import Plan

FILE_NAME = "model.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)


def export_mobile(
    packed: PackedModel,
    path: str | Path,
    *,
    replace: bool = False,
    on_progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> None:
    """Write the folder `path`, which `AutoModelForCausalLM.from_pretrained` opens.

    on_progress is called with the bytes of tensor data written and to be written. Raises RecipeError for
    grids and families that the format does not have, InputError for scales that no runtime could use,
    OutputError if the folder cannot be written.
    """
    plan = packed.plan
    stored = stored_tensors(plan)
    specs = mobile_tensors(stored)
    config = json.dumps(mobile_config(plan), indent=2) + "\n"
    total, done = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in specs.values()), 0
    with new_path(Path(path), replace=replace) as temporary:
        temporary.mkdir()
        copy_assets(packed.path, temporary)
        (temporary / "config.json").write_text(config, "utf-8")
        with SafetensorsWriter(temporary / FILE_NAME, specs, packed.file_metadata) as writer:
            for tensor, rows, data in _contents(packed, stored):
                writer.write(tensor.name, data, rows)
                done += data.nbytes
                on_progress(done, total)


def mobile_tensors(stored: list[StoredTensor]) -> Specs:
    """Dtype and shape of every tensor of a mobile folder, in the order of the file."""
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in sorted(stored, key=_place)}


def _place(tensor: StoredTensor) -> tuple[int, str]:
    """A tensor's place in the file: where safetensors itself would put it, so that each is aligned."""
    return DTYPES.index(tensor.dtype), tensor.name


def mobile_config(plan: Plan) -> dict[str, Any]:
    """config.json of a mobile folder: that of the model, untied, and what the reader has to know."""
    dtype = torch.bfloat16
    config = whole_config(plan.model, dtype) if plan.model.whole else hf_config(plan.model, dtype)
    config["tie_word_embeddings"] = False
    if plan.model.whole:
        config["text_config"] |= {"tie_word_embeddings": False}
    return config | {"quantization_config": quantization_config(plan)}


def _contents(packed: PackedModel, stored: list[StoredTensor]) -> Iterator[tuple[StoredTensor, slice | None, Tensor]]:
    """Everything the folder holds, a few rows at a time; each planned tensor is read once."""
    static = packed.read_static()
    by_source: dict[str, list[StoredTensor]] = {}
    for tensor in stored:
        if tensor.part == "static":
            # without a scale in the plan nothing is quantized, which the format says by 0
            yield tensor, None, torch.tensor(static.get(tensor.source, 0.0), dtype=torch.float32)
        else:
            by_source.setdefault(tensor.source, []).append(tensor)
    for source, parts in by_source.items():
        for rows, value in packed.chunks(source):
            data = _data_of(value)
            for tensor in parts:
                yield tensor, rows, data[tensor.part]


def _data_of(value: Quantized | Tensor) -> dict[str, Tensor]:
    """The bytes of some rows, by the parts they belong to."""
    if not isinstance(value, Quantized):
        return {"values": value}
    return {"codes": pack_codes(value.codes, value.grid), "scale": value.scale}
