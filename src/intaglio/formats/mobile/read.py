"""Does a mobile folder hold what was packed? Its bytes are taken apart here by the reader's rule alone.

Shared with the exporter is only the list of tensors in `layout.py`. Everything is compared by
its bits, a few rows at a time, and config.json by what transformers' reader makes of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from intaglio.formats.mobile.layout import StoredTensor, module_bits, resolve_bits, stored_tensors
from intaglio.formats.tally import Tally, stored_as_listed
from intaglio.numerics.grid import Quantized
from intaglio.packed.model import PackedModel
from intaglio.packed.store import SafetensorsReader
from intaglio.plan.family import load_config


def compare_mobile(packed: PackedModel, folder: Path, tally: Tally) -> None:
    """Count into `tally` what the folder holds and what of it differs from the packed model."""
    static = packed.read_static()
    quantization = load_config(folder)["quantization_config"]
    for module, bits in module_bits(packed.plan).items():
        if resolve_bits(module, quantization) != bits:
            tally.unlike.append(f"{module} in config.json")
    for stored, file in stored_as_listed(folder, stored_tensors(packed.plan), tally):
        if stored.part == "static":
            value = torch.tensor(static.get(stored.source, 0.0), dtype=torch.float32)
            tally.compare("static_scales", value, file.read(stored.name))
        else:
            _compare(packed, stored, file, tally)


def _compare(packed: PackedModel, stored: StoredTensor, file: SafetensorsReader, tally: Tally) -> None:
    for rows, value in packed.chunks(stored.source):
        data = file.read(stored.name, rows)
        if not isinstance(value, Quantized):
            tally.compare("values", value, data)
        elif stored.part == "scale":
            tally.compare("scales", value.scale, data)
        else:
            tally.compare("codes", value.codes, unpacked(data, value.grid.code_bits))


def unpacked(data: Tensor, bits: int) -> Tensor:
    """int8 codes [R, C] of stored bytes: fields of `bits` from the lowest on, each less half of its range."""
    if bits == 8:
        return data
    low_first = np.unpackbits(data.numpy()[..., None], axis=-1, bitorder="little")
    fields = low_first.reshape(len(data), -1, bits).astype(np.int8)
    return torch.from_numpy(fields @ (1 << np.arange(bits)).astype(np.int8) - (1 << (bits - 1)))
