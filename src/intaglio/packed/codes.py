"""Codes as bytes: two of four bits or four of two bits in each, the first in the lowest bits, as code - code_min."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from intaglio.numerics.grid import BlockGrid


def pack_codes(codes: Tensor, grid: BlockGrid) -> Tensor:
    """int8 [R, C] as stored: uint8 [R, C x bits / 8] where several fit in a byte, else the codes themselves."""
    bits = grid.code_bits
    if bits not in (2, 4):
        return codes
    unsigned = (codes - grid.code_min).to(torch.uint8)
    packed = unsigned[..., :: 8 // bits].clone()
    for i in range(1, 8 // bits):
        packed |= unsigned[..., i :: 8 // bits] << (bits * i)
    return packed


# A byte is widened to as many bytes as it has codes. These shifts to the left, each followed by "or", and this mask
# then leave one code in each byte, the first code in the lowest.
FIELDS: dict[int, tuple[str, tuple[int, ...], int]] = {4: ("<u2", (4,), 0x0F0F), 2: ("<u4", (12, 6), 0x03030303)}


def unpack_codes(packed: Tensor, grid: BlockGrid) -> Tensor:
    """The codes that `pack_codes` stored, back to int8 [R, C] on the same device."""
    if grid.code_bits not in FIELDS:
        return packed
    if packed.device.type != "cpu":
        return _unpack_by_shifts(packed, grid)
    wide, shifts, mask = FIELDS[grid.code_bits]
    spread = packed.numpy().astype(wide)
    for shift in shifts:
        spread |= spread << shift
    spread &= mask
    codes = spread.view(np.int8)
    codes += grid.code_min
    return torch.from_numpy(codes)


def _unpack_by_shifts(packed: Tensor, grid: BlockGrid) -> Tensor:
    """The same in operations that every device has. On a CPU the fields above are several times as fast."""
    bits = grid.code_bits
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return (codes.to(torch.int8) + grid.code_min).flatten(-2)
