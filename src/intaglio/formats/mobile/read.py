"""Compares a mobile folder with a packed model. Its bytes are taken apart by the rule of transformers' reader alone.

Shared with the exporter is only the list of tensors in `layout.py`. Everything is compared by
its bits, a few rows at a time, and config.json by what transformers' reader makes of it.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from intaglio.formats.listed import codes_in_bytes, compare_listed
from intaglio.formats.mobile.layout import module_bits, resolve_bits, stored_tensors
from intaglio.formats.tally import Tally
from intaglio.packed.model import PackedModel
from intaglio.plan.family import load_config


def compare_mobile(packed: PackedModel, folder: Path, tally: Tally) -> None:
    """Count into `tally` what the folder holds and what of it differs from the packed model."""
    quantization = load_config(folder)["quantization_config"]
    for module, bits in module_bits(packed.plan).items():
        if resolve_bits(module, quantization) != bits:
            tally.unlike.append(f"{module} in config.json")
    compare_listed(packed, folder, stored_tensors(packed.plan), unpacked, tally)


def unpacked(data: Tensor, bits: int) -> Tensor:
    """int8 codes [R, C] of stored bytes; those of eight bits are stored as they are."""
    return data if bits == 8 else codes_in_bytes(data.numpy(), bits)
