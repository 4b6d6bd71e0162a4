"""Size in bytes of a plan's file before it is written, from names, dtypes and shapes alone.

Nothing here is fitted to any file. What a plan cannot know is the key-value metadata of a GGUF, most of
which is the tokenizer: that is an input.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from intaglio.formats.gguf.names import GGUF_ROPE_FACTORS, gguf_name, gguf_rope_factors, in_gguf
from intaglio.formats.mobile.layout import stored_tensors
from intaglio.formats.mobile.write import mobile_tensors
from intaglio.formats.words.layout import linears_of
from intaglio.numerics.grid import BlockGrid
from intaglio.packed.store import Specs, in_file_order, safetensors_header
from intaglio.plan.family import TOWER_ROLES
from intaglio.plan.plan import Plan

GGUF_ALIGNMENT = 32  # gguf-py: GGUF_DEFAULT_ALIGNMENT
GGUF_HEADER_BYTES = 24  # magic and version, 4 each; number of tensors and of keys, 8 each
GEMMA_METADATA_BYTES = 15_800_000  # about; keys and values of a Gemma 4 GGUF, nearly all of it the tokenizer
W4A16_ROLES = ("attention", "mlp", "ple_linear", "expert")
W4A16_GROUP = 32


@dataclass(frozen=True)
class FileSize:
    """Bytes of a file: header (of a GGUF its tensor list too), metadata, tensor data, padding between these."""

    header: int
    metadata: int
    data: int
    padding: int

    @property
    def total(self) -> int:
        return self.header + self.metadata + self.data + self.padding


def gguf_size(plan: Plan, metadata_bytes: int = GEMMA_METADATA_BYTES) -> FileSize:
    """The GGUF of a plan's text model. metadata_bytes: of its keys and values."""
    tensors = [(gguf_name(t.name), len(t.spec.shape), t.size_bytes) for t in plan if in_gguf(t)]
    factors = gguf_rope_factors(plan.model)
    if factors is not None:
        tensors.append((GGUF_ROPE_FACTORS, 1, 4 * len(factors)))
    # of a tensor: length of its name and the name, number of dimensions and the dimensions, type, offset
    header = GGUF_HEADER_BYTES + sum(8 + len(name) + 4 + 8 * dimensions + 4 + 8 for name, dimensions, _ in tensors)
    padding = sum(-size % GGUF_ALIGNMENT for _, _, size in tensors) + -(header + metadata_bytes) % GGUF_ALIGNMENT
    return FileSize(header, metadata_bytes, sum(size for *_, size in tensors), padding)


def safetensors_size(specs: Specs) -> FileSize:
    """A file of these tensors, as transformers writes it."""
    header, offsets = safetensors_header(specs, {"format": "pt"})
    return FileSize(len(header), 0, sum(end - start for start, end in offsets.values()), 0)


def mobile_size(plan: Plan) -> FileSize:
    """model.safetensors of a Gemma mobile folder."""
    return safetensors_size(mobile_tensors(stored_tensors(plan)))


def w4a16_size(plan: Plan) -> FileSize:
    """model.safetensors of a compressed-tensors folder: see `w4a16_tensors`."""
    return safetensors_size(w4a16_tensors(plan))


def file_size(plan: Plan, metadata_bytes: int = GEMMA_METADATA_BYTES) -> FileSize:
    """The file that a plan is made for: mobile or GGUF; of a drafter on mobile grids the codes and scales alone."""
    if plan.mobile and plan.model.family.drafter:
        return FileSize(0, 0, plan.size_bytes, 0)
    return mobile_size(plan) if plan.mobile else gguf_size(plan, metadata_bytes)


def w4a16_tensors(plan: Plan) -> Specs:
    """compressed-tensors' pack-quantized layout of 4-bit weights in groups of 32; everything else bfloat16.

    `weight_packed` int32 [out, in / 8], `weight_scale` bfloat16 [out, in / 32], `weight_shape` int64 [2]; an
    expert is three linears of its own.
    """
    specs: Specs = {}
    for tensor in plan.everything:
        name = plan.stored_name(tensor.name)
        four_bits = isinstance(tensor.grid, BlockGrid) and tensor.spec.role in W4A16_ROLES
        for module, (rows, columns), _ in linears_of(name, tensor.spec) if four_bits else ():
            specs[f"{module}.weight_packed"] = (torch.int32, (rows, columns // 8))
            specs[f"{module}.weight_scale"] = (torch.bfloat16, (rows, columns // W4A16_GROUP))
            specs[f"{module}.weight_shape"] = (torch.int64, (2,))
        if not four_bits:
            specs[name] = (torch.bfloat16, tensor.spec.shape)
    return in_file_order(specs)


def bf16_bytes(plan: Plan, *, text_only: bool = False) -> int:
    """Tensor data of the original in bfloat16: every parameter two bytes."""
    tensors = [t.spec for t in plan.everything if not (text_only and t.spec.role in TOWER_ROLES)]
    return sum(2 * prod(tensor.shape) for tensor in tensors if not tensor.buffer)
