"""Folders that hold codes already: the Gemma mobile format, and compressed-tensors W4A16.

Source of the second one's layout: compressed_tensors/compressors/pack_quantized/helpers.py, `pack_to_int32`:
eight codes in an int32, each as code + 8, the first in the lowest bits. In little-endian bytes that is how
a packed model keeps four-bit codes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import ConfigError
from intaglio.formats.mobile.layout import resolve_bits
from intaglio.formats.words.layout import EXPERT_LINEARS
from intaglio.numerics.grid import Q4_0_FREE, Quantized
from intaglio.packed.codes import unpack_codes
from intaglio.packed.store import FLOATS
from intaglio.sources.stored import Stored

# Codes of four bits in blocks of 32, as Q4_0 has them, but whatever scale a folder gives them.
W4A16 = replace(Q4_0_FREE, name="w4a16", ggml_type=None, step_bits=24, scale_dtype=torch.float32)
SCALES = (("weight", "weight_scale"), ("embedding_quantized", "embedding_scale"))


def mobile_tensors(path: Path, tensors: tuple[Stored, ...], quantization: dict[str, Any]) -> tuple[Stored, ...]:
    """A mobile folder's tensors with the bits of their codes; scales stand for themselves."""
    names = {tensor.name for tensor in tensors}
    found = []
    for tensor in tensors:
        module, _, part = tensor.name.rpartition(".")
        if any(part == codes and f"{module}.{scale}" in names for codes, scale in SCALES):
            try:
                bits = resolve_bits(module, quantization)
            except Exception as error:  # of regular expressions, and of anything in the place of a table
                raise ConfigError(f"{path}: quantization_config cannot be read: {error}") from error
            if bits not in (2, 4, 8):
                raise ConfigError(f"{path}: quantization_config gives {module} {bits!r} bits: expected 2, 4 or 8")
            columns = tensor.shape[-1] * 8 // bits if tensor.kind == "U8" else tensor.shape[-1]
            tensor = replace(tensor, kind=f"int{bits}", shape=(*tensor.shape[:-1], columns), bits=bits)
        found.append(tensor)
    return tuple(found)


@dataclass(frozen=True)
class _W4A16Reader:
    packed: Stored
    scale: Stored

    def read(self, name: str, rows: slice | None = None) -> Quantized:
        data: Tensor = self.packed.reader.read(self.packed.name, rows)
        codes = unpack_codes(data.contiguous().view(torch.uint8), W4A16)
        scale = self.scale.reader.read(self.scale.name, rows).float()
        # a scale for more columns than a block has is that of each block of them
        blocks = codes.shape[1] // W4A16.block_size
        return Quantized(W4A16, codes, scale.repeat_interleave(blocks // scale.shape[1], dim=1))

    def close(self) -> None:
        self.packed.reader.close()
        self.scale.reader.close()


def w4a16_tensors(path: Path, tensors: tuple[Stored, ...], quantization: dict[str, Any]) -> tuple[Stored, ...]:
    """The tensors of such a folder, each set of codes and scales as one. ConfigError for other schemes."""
    _check_scheme(path, quantization)
    by_name = {tensor.name: tensor for tensor in tensors}
    beside = {name.removesuffix("_packed") for name in by_name if name.endswith(".weight_packed")}
    hidden = {f"{weight}_{part}" for weight in beside for part in ("packed", "scale", "shape")}
    found = []
    for tensor in tensors:
        weight = tensor.name.removesuffix("_packed")
        if tensor.name.endswith((".weight_zero_point", ".weight_g_idx")):
            raise ConfigError(f"{path}: {tensor.name}: expected symmetric codes in the order of the columns")
        if weight in beside and tensor.name != weight:
            found.append(_coded(path, weight, by_name))
        elif tensor.name not in hidden:
            found.append(tensor)
    return _with_joined_experts(path, tuple(found))


@dataclass(frozen=True)
class _ExpertsReader:
    """Linears of all experts as one tensor [E, rows, columns]: of each expert these parts, one below the other."""

    parts: tuple[tuple[Stored, ...], ...]

    def read(self, name: str, rows: slice | None = None) -> Quantized | Tensor:
        values = [[part.reader.read(part.name) for part in expert] for expert in self.parts[rows or slice(None)]]
        if not isinstance(values[0][0], Quantized):
            return torch.stack([torch.cat(expert) for expert in values])
        codes = torch.stack([torch.cat([value.codes for value in expert]) for expert in values])
        scale = torch.stack([torch.cat([value.scale for value in expert]) for expert in values])
        return Quantized(W4A16, codes, scale)

    def close(self) -> None:
        for expert in self.parts:
            for part in expert:
                part.reader.close()


EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


def _with_joined_experts(path: Path, tensors: tuple[Stored, ...]) -> tuple[Stored, ...]:
    """The tensors, with linears of single experts, as vLLM has them, joined into the tensors of a checkpoint."""
    linears: dict[str, dict[tuple[int, str], Stored]] = {}
    for tensor in tensors:
        match = EXPERT.fullmatch(tensor.name)
        if match:
            linears.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
    joined = []
    for layer, found in linears.items():
        count = 1 + max(expert for expert, _ in found)
        for name, kinds in EXPERT_LINEARS.items():
            wanted = [[(expert, kind) for kind in kinds] for expert in range(count)]
            absent = [key for expert in wanted for key in expert if key not in found]
            if absent:
                raise ConfigError(f"{path}: {layer}.{absent[0][0]}.{absent[0][1]} is missing: download it again")
            parts = tuple(tuple(found[key] for key in expert) for expert in wanted)
            first = parts[0][0]
            if any((part.kind, part.shape) != (first.kind, first.shape) for expert in parts for part in expert):
                raise ConfigError(f"{path}: experts of {layer} differ in type or shape: expected the same of all")
            shape = (count, len(kinds) * first.shape[0], first.shape[1])
            size = sum(part.size_bytes for expert in parts for part in expert)
            joined.append(Stored(f"{layer}.{name}", first.kind, shape, size, _ExpertsReader(parts), first.bits))
    return tuple(t for t in tensors if not EXPERT.fullmatch(t.name)) + tuple(joined)


def _coded(path: Path, weight: str, by_name: dict[str, Stored]) -> Stored:
    packed, scale, shape = (by_name.get(f"{weight}_{part}") for part in ("packed", "scale", "shape"))
    if packed is None or scale is None or shape is None:
        raise ConfigError(f"{path}: {weight}: expected weight_packed, weight_scale and weight_shape")
    if packed.kind != "I32" or len(packed.shape) != 2 or scale.kind not in FLOATS or shape.shape != (2,):
        raise ConfigError(f"{path}: {weight}: expected int32 codes of a matrix, float scales and the matrix's shape")
    rows, columns = (int(size) for size in shape.reader.read(shape.name))
    width = columns // scale.shape[1] if len(scale.shape) == 2 and scale.shape[1] else 0
    whole = columns % 32 == 0 and packed.shape == (rows, columns // 8)
    if not whole or scale.shape[0] != rows or width % 32 or width * scale.shape[1] != columns or not width:
        raise ConfigError(
            f"{path}: {weight}: codes {list(packed.shape)}, scales {list(scale.shape)} and shape {[rows, columns]}: "
            "expected eight codes in an int32, and a scale for 32 columns or a multiple of them"
        )
    size = packed.size_bytes + scale.size_bytes
    return Stored(weight, "W4A16", (rows, columns), size, _W4A16Reader(packed, scale), W4A16.code_bits)


def _check_scheme(path: Path, quantization: dict[str, Any]) -> None:
    groups = quantization.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    for group in groups or [{}]:
        weights = group.get("weights") if isinstance(group, dict) else None
        weights = weights if isinstance(weights, dict) else {}
        format_ = group.get("format") or quantization.get("format") if isinstance(group, dict) else None
        found = (format_, weights.get("num_bits"), weights.get("type"), weights.get("symmetric"))
        if found != ("pack-quantized", 4, "int", True) or group.get("input_activations"):
            raise ConfigError(
                f"{path}: compressed-tensors with format, bits, type and symmetry {found}: expected "
                "('pack-quantized', 4, 'int', True) and float activations, which is W4A16"
            )
