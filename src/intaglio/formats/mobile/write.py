"""The Gemma mobile format: a transformers folder with packed codes, their scales, and static scales of int8.

What transformers calls `quant_method: "gemma"`, and reads without any code of ours. Codes and scales are
those of the PackedModel; nothing is fitted or rounded here. The head is written beside the embedding
that it is tied to, with the same codes, as the format has no ties.

Codes lie from the lowest bits of a byte on, as code + 2 or code + 8, and those of eight bits as they are: as in
a PackedModel, so that verification has its own way to take them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.formats.checkpoint.write import hf_config, whole_config
from intaglio.formats.listed import ListedTensor
from intaglio.formats.mobile.layout import stored_tensors
from intaglio.formats.mobile.write_config import quantization_config
from intaglio.formats.write_folder import listed_parts, silent, write_folder
from intaglio.numerics.grid import Quantized
from intaglio.packed.codes import pack_codes
from intaglio.packed.model import PackedModel
from intaglio.packed.store import Specs, in_file_order
from intaglio.plan.plan import Plan


def export_mobile(
    packed: PackedModel,
    path: str | Path,
    *,
    replace: bool = False,
    on_progress: Callable[[int, int], None] = silent,
) -> None:
    """Write the folder `path`, which `AutoModelForCausalLM.from_pretrained` opens.

    on_progress is called with the bytes of tensor data written and to be written. Raises RecipeError for
    grids and families that the format does not have, InputError for scales that no runtime could use,
    OutputError if the folder cannot be written.
    """
    stored = stored_tensors(packed.plan)
    write_folder(
        packed,
        path,
        config=mobile_config(packed.plan),
        specs=mobile_tensors(stored),
        parts=listed_parts(packed, stored, _data_of),
        metadata=packed.file_metadata,
        replace=replace,
        on_progress=on_progress,
    )


def mobile_tensors(stored: list[ListedTensor]) -> Specs:
    """Dtype and shape of every tensor of a mobile folder, in the order of the file."""
    return in_file_order({tensor.name: (tensor.dtype, tensor.shape) for tensor in stored})


def mobile_config(plan: Plan) -> dict[str, Any]:
    """config.json of a mobile folder: that of the model, untied, and what the reader has to know."""
    dtype = torch.bfloat16
    config = whole_config(plan.model, dtype) if plan.model.whole else hf_config(plan.model, dtype)
    config["tie_word_embeddings"] = False
    if plan.model.whole:
        config["text_config"] |= {"tie_word_embeddings": False}
    return config | {"quantization_config": quantization_config(plan)}


def _data_of(tensor: ListedTensor, value: Quantized | Tensor) -> Tensor:
    if not isinstance(value, Quantized):
        return value
    return pack_codes(value.codes, value.grid) if tensor.part == "codes" else value.scale
