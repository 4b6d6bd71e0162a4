"""Compares a .litertlm bundle with a packed model: codes, scales and floats by name; static scales where they act.

Its models are taken apart by `tflite`, which shares no code with the exporter. A scale of activations is compared at
the linear that uses it, and one of keys or values at the cache, in every signature.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from intaglio.formats.litert.read_facts import compare_litert_facts
from intaglio.formats.litert.read_flatbuffer import Bytes
from intaglio.formats.litert.read_tflite import Signature, TfliteTensor, read_bundle
from intaglio.formats.tally import Tally
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.packed.model import PackedModel
from intaglio.plan.files import reading
from intaglio.plan.plan import HEAD, PlannedTensor

DEQUANTIZE, FULLY_CONNECTED = 6, 9  # builtin operators
CODE_BITS = {"int2": 2, "int4": 4, "int8": 8}
CACHE_NAME = re.compile(r"kv_cache_(k|v)_(\d+)")


def compare_litert(packed: PackedModel, path: Path, tally: Tally) -> None:
    """Count into `tally` what the bundle holds and what of it differs from the packed model's text model."""
    packed = packed.text_only()
    bundle = read_bundle(path)
    models = bundle.models
    expected = {name: (tensor, column) for tensor, name, column in _expected(packed)}
    found: dict[str, TfliteTensor] = {}
    for tensor in (tensor for signatures in models.values() for s in signatures for tensor in s.tensors):
        if tensor.name in expected and tensor.data.size:
            if not _same(found.setdefault(tensor.name, tensor), tensor):
                tally.unlike.append(tensor.name)  # not the same in all signatures
        elif tensor.type in CODE_BITS and tensor.data.size:
            tally.extra.append(tensor.name)
    tally.missing += [name for name in expected if name not in found]
    for name, tensor in found.items():
        tally.counts["tensors"] += 1
        _compare(packed, *expected[name], tensor, tally)
    static, linears = packed.read_static(), set()
    for signature in models.get("tf_lite_prefill_decode", []):
        linears |= _compare_static(signature, static, tally)
    planned = {tensor.name for tensor in packed.plan if tensor.quantized_linear}
    tally.missing += sorted(f"{name} as a linear" for name in planned - linears)
    with reading(path, "not a valid bundle", "export it again"):
        compare_litert_facts(packed, bundle, tally)


def _same(one: TfliteTensor, other: TfliteTensor) -> bool:
    """Whether two tensors of different signatures are one: the same bytes of the file, read in the same way."""
    return (
        (one.shape, one.type, one.zero) == (other.shape, other.type, other.zero)
        and one.data.ctypes.data == other.data.ctypes.data
        and np.array_equal(one.scale.view(np.uint8), other.scale.view(np.uint8))
    )


def _expected(packed: PackedModel) -> Iterator[tuple[PlannedTensor, str, int | None]]:
    """Each tensor that a bundle has: planned tensor, name in the file, and for a slice of a table its number."""
    for tensor in packed.plan:
        width = tensor.spec.slice_columns
        if tensor.spec.role == "ple_embedding" and width:
            for number in range(tensor.spec.shape[1] // width):
                yield tensor, f"{tensor.name}.{number}", number
        else:
            yield tensor, tensor.name, None
            if tensor.spec.role == "token_embedding" and packed.plan.model.tied_head:
                yield tensor, HEAD, None


def _compare(
    packed: PackedModel, planned: PlannedTensor, column: int | None, found: TfliteTensor, tally: Tally
) -> None:
    grid, shape = planned.grid, planned.spec.shape
    width = (planned.spec.slice_columns or 0) if column is not None else shape[-1] if shape else 1
    bits = grid.code_bits if isinstance(grid, BlockGrid) else None
    kind = "float32" if bits is None else f"int{bits}"
    size = math.prod(shape[:-1]) * width * (bits or 32) // 8
    if found.type != kind or found.shape != (*shape[:-1], *((width,) if shape else ())) or found.data.size != size:
        tally.unlike.append(found.name)
        return
    columns = slice(None) if column is None else slice(column * width, (column + 1) * width)
    for rows, value in packed.chunks(planned.name):
        rows = rows or slice(0, shape[0] if shape else 1)
        row_bytes = size // (shape[0] if shape else 1)
        data = found.data[rows.start * row_bytes : rows.stop * row_bytes]
        if not isinstance(value, Quantized):
            expected = (value[..., columns] if column is not None else value).float()
            tally.compare("values", expected, torch.from_numpy(data.view("<f4").copy()).reshape(expected.shape))
            continue
        tally.compare("codes", value.codes[:, columns], _codes(data, value.grid.code_bits, width))
        own = column is not None and value.scale.shape[1] > 1  # a slice with a scale of its own
        scale = value.scale[:, [column]] if own else value.scale
        stored = found.scale[rows].reshape(len(scale), -1)
        if not found.zero or stored.shape != tuple(scale.shape):
            tally.unlike.append(found.name)
            return
        tally.compare("scales", scale, torch.from_numpy(stored.astype(stored.dtype, copy=True)))


def _codes(data: Bytes, bits: int, width: int) -> torch.Tensor:
    """int8 [rows, width] of stored bytes: two's complement in fields of `bits`, from the lowest on."""
    fields = np.unpackbits(np.asarray(data)[:, None], axis=-1, bitorder="little").reshape(-1, width, bits)
    weights: NDArray[np.int8] = np.array([1 << i for i in range(bits - 1)] + [-(1 << (bits - 1))], np.int8)
    return torch.from_numpy(fields.astype(np.int8) @ weights)


def _compare_static(signature: Signature, static: dict[str, float], tally: Tally) -> set[str]:
    """Compare the scales of one signature; returns the weights of its linears."""
    tensors, linears = signature.tensors, set()
    source = {outputs[0]: inputs[0] for code, inputs, outputs in signature.operators if code == DEQUANTIZE}
    for code, inputs, outputs in signature.operators:
        if code == FULLY_CONNECTED:
            weight = tensors[source.get(inputs[1], inputs[1])].name
            linears.add(weight)
            module = weight.removesuffix(".weight")
            for kind, tensor in (("input", inputs[0]), ("output", outputs[0])):
                name = f"{module}.{kind}_activation_scale"
                _compare_scale(static.get(name, 0.0), tensors[tensor], tally)
    for name, tensor in (*signature.inputs.items(), *signature.outputs.items()):
        if found := CACHE_NAME.fullmatch(name):
            scale = static.get(f"model.layers.{found[2]}.self_attn.{found[1]}_cache_scale", 0.0)
            _compare_scale(scale, tensors[tensor], tally)
    return linears


def _compare_scale(expected: float, tensor: TfliteTensor, tally: Tally) -> None:
    """The scale with which a tensor is int8; 0 of one that is float."""
    found = float(tensor.scale[0]) if tensor.type == "int8" and tensor.scale.size == 1 and tensor.zero else 0.0
    if expected or found or tensor.type != "float32":
        pair = (torch.tensor(value, dtype=torch.float32) for value in (expected, found))
        tally.compare("static_scales", *pair)
