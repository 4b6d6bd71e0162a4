"""Facts that a folder of decoded weights cannot say by itself, kept beside them: the scales, and what is in no float.

Values alone do not determine a packed model: codes 2, 4 and 6 are codes 1, 2 and 3 of twice the step, and a block of
zeros may have any scale. So a checkpoint of ours comes with the file KEPT_FILE, and `intaglio convert` gives back the
packed model bit for bit. It is a safetensors file with another ending: vLLM loads every *.safetensors of a folder.

It holds each scale, each static scale, and all of the tensors that the checkpoint leaves out (keys and values that
nobody reads); NAME.odd_at int64 [n] and NAME.odd_codes int8 [n] are positions and codes of NAME whose step is zero.
Plan and provenance stand in its metadata, as in a packed model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.packed.model import FILE_NAME, PackedModel, metadata_of, parts_of, static_names
from intaglio.packed.store import SafetensorsReader, SafetensorsWriter, Specs
from intaglio.plan.family import TOWER_ROLES
from intaglio.plan.plan import Plan, PlannedTensor

KEPT_FILE = "intaglio.scales"
Odd = dict[str, tuple[Tensor, Tensor]]


def in_checkpoint(plan: Plan, tensor: PlannedTensor) -> bool:
    """Whether a checkpoint holds this tensor: not the keys and values that a layer takes from another one."""
    return tensor in plan.tensors or tensor.spec.role in TOWER_ROLES


def kept_parts(plan: Plan) -> Specs:
    """Names, dtypes and shapes of what is kept, without the odd codes, whose number depends on the values."""
    parts: Specs = {}
    for tensor in plan.everything:
        own = parts_of(tensor)
        if in_checkpoint(plan, tensor):
            own.pop(tensor.name, None)
            own.pop(f"{tensor.name}.codes", None)
        parts |= own
    return parts | {name: (torch.float32, ()) for name in static_names(plan)}


def write_kept(packed: PackedModel, folder: Path) -> None:
    """Write KEPT_FILE for the packed model's checkpoint in `folder`."""
    parts, odd = kept_parts(packed.plan), _odd_codes(packed)
    specs = dict(parts)
    for name, (at, codes) in odd.items():
        specs |= {f"{name}.odd_at": (at.dtype, tuple(at.shape)), f"{name}.odd_codes": (codes.dtype, tuple(codes.shape))}
    metadata = metadata_of(packed.plan, packed.provenance)
    with (
        SafetensorsReader(packed.path / FILE_NAME) as file,
        SafetensorsWriter(folder / KEPT_FILE, specs, metadata) as writer,
    ):
        for part in parts:
            writer.write(part, file.read(part))
        for name, (at, codes) in odd.items():
            writer.write(f"{name}.odd_at", at)
            writer.write(f"{name}.odd_codes", codes)


def _odd_codes(packed: PackedModel) -> Odd:
    """Codes other than zero of blocks whose step is zero, as llama.cpp's quantizer leaves them."""
    odd: Odd = {}
    for tensor in packed.plan.everything:
        if not isinstance(tensor.grid, BlockGrid) or tensor.grid.positive or not in_checkpoint(packed.plan, tensor):
            continue
        found, first = [], 0
        for _, value in packed.chunks(tensor.name):
            assert isinstance(value, Quantized)
            codes = value.codes.flatten()
            zero = (value.step == 0).flatten().nonzero().squeeze(1)
            size = tensor.grid.block_size
            at = (zero.unsqueeze(1) * size + torch.arange(size)).flatten()
            at = at[codes[at] != 0]
            found.append((at + first, codes[at]))
            first += len(codes)
        at, codes = (torch.cat(parts) for parts in zip(*found, strict=True))
        if len(at):
            odd[tensor.name] = at, codes
    return odd
