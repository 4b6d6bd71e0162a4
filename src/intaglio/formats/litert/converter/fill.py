"""A traced .tflite with stored tensors in the place of placeholders, and static int8 where the plan has it.

x -> QUANTIZE -> FULLY_CONNECTED(codes) -> DEQUANTIZE -> y     with scales of input and output
x -> FULLY_CONNECTED(DEQUANTIZE(codes)) -> y                   without: the weight alone is rounded
x -> FULLY_CONNECTED(blocks of codes) -> y                     Q4_0: the kernel rounds x as it comes
cache -> DYNAMIC_UPDATE_SLICE(QUANTIZE(k)) -> cache            and DEQUANTIZE for those that attend to it
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from intaglio.errors import ConfigError
from intaglio.formats.litert.converter.graph import Model, Operator, Stored, Subgraph, Type, per_tensor
from intaglio.formats.litert.converter.trace import FLOATS, LINEAR

CACHE_NAME = re.compile(r"kv_cache_(k|v)_(\d+)")


def fill(model: Model, stored: Callable[[str], Stored], static: dict[str, float]) -> None:
    """Replace the placeholders of `trace` by stored tensors, and quantize activations and caches.

    stored: of a tensor's name. static: scales by their names; a name that is missing is 0, off.
    """
    for signature in model.root.signatureDefs:
        _fill_signature(model, signature, stored, static)
    _prune(model)


def _fill_signature(model: Model, signature: Any, stored: Callable[[str], Stored], static: dict[str, float]) -> None:
    subgraph = Subgraph(model, model.root.subgraphs[signature.subgraphIndex])
    scales = {int(entry.tensorIndex): _cache_scale(entry.name.decode(), static) for entry in signature.inputs}
    caches = {cache: scale for cache, scale in scales.items() if scale}
    for cache, scale in caches.items():
        tensor = subgraph.subgraph.tensors[cache]
        tensor.type, tensor.quantization = Type.INT8, per_tensor(scale)
    read = {int(x) for operator in subgraph.subgraph.operators for x in operator.inputs}
    moved: dict[int, int] = {}
    for operator in subgraph.subgraph.operators:
        kind = model.operator(operator.opcodeIndex)
        if kind == Operator.STABLEHLO_CUSTOM_CALL:
            _fill_call(subgraph, operator, stored, static)
        elif kind == Operator.DYNAMIC_UPDATE_SLICE and int(operator.inputs[0]) in caches:
            _fill_update(subgraph, operator, caches[int(operator.inputs[0])], read, moved)
        else:
            subgraph.operators.append(operator)
    subgraph.subgraph.operators = subgraph.operators
    for entry in signature.outputs:
        index = moved.get(int(entry.tensorIndex), int(entry.tensorIndex))
        scale = _cache_scale(entry.name.decode(), static)
        if scale and index not in moved.values():
            raise ConfigError(f"{entry.name.decode()}: litert-torch laid out this cache in an unknown way")
        entry.tensorIndex = index
    subgraph.subgraph.outputs = [moved.get(int(x), int(x)) for x in subgraph.subgraph.outputs]


def _cache_scale(name: str, static: dict[str, float]) -> float:
    found = CACHE_NAME.fullmatch(name)
    return static.get(f"model.layers.{found[2]}.self_attn.{found[1]}_cache_scale", 0.0) if found else 0.0


def _fill_call(subgraph: Subgraph, call: Any, stored: Callable[[str], Stored], static: dict[str, float]) -> None:
    target, name = call.builtinOptions2.callTargetName.decode(), bytes(call.builtinOptions2.backendConfig).decode()
    if target == FLOATS:
        value = stored(name)
        tensor = subgraph.subgraph.tensors[call.outputs[0]]
        tensor.name, tensor.buffer = name, subgraph.model.buffer_of(value)
    elif target == LINEAR:
        module = name.removesuffix(".weight")
        scales = (static.get(f"{module}.{kind}_activation_scale", 0.0) for kind in ("input", "output"))
        subgraph.linear(int(call.inputs[0]), int(call.outputs[0]), stored(name), *scales)
    else:
        raise ConfigError(f"{target}: litert-torch left a call that LiteRT does not know")


def _fill_update(subgraph: Subgraph, update: Any, scale: float, read: set[int], moved: dict[int, int]) -> None:
    cache, new, start = (int(x) for x in update.inputs)
    output = int(update.outputs[0])
    name = subgraph.subgraph.tensors[cache].name.decode()
    codes = subgraph.tensor(f"{name}.updated", subgraph.shape(output), Type.INT8, quantization=per_tensor(scale))
    new = subgraph.quantize(new, scale, f"{name}.new")
    subgraph.add(Operator.DYNAMIC_UPDATE_SLICE, [cache, new, start], [codes])
    moved[output] = codes
    if output in read:
        subgraph.dequantize(codes, output)


def _prune(model: Model) -> None:
    """Drop tensors, buffers and operator codes that nothing uses any more."""
    _prune_tensors(model.root)
    _prune_buffers(model)
    operators = [op for subgraph in model.root.subgraphs for op in subgraph.operators]
    place = {old: new for new, old in enumerate(sorted({op.opcodeIndex for op in operators}))}
    model.root.operatorCodes = [model.root.operatorCodes[old] for old in place]
    for op in operators:
        op.opcodeIndex = place[op.opcodeIndex]


def _prune_tensors(root: Any) -> None:
    for number, subgraph in enumerate(root.subgraphs):
        used = {int(x) for op in subgraph.operators for x in (*op.inputs, *op.outputs) if x >= 0}
        used |= {int(x) for x in (*subgraph.inputs, *subgraph.outputs)}
        used |= {_scales_of(tensor) for i, tensor in enumerate(subgraph.tensors) if i in used} - {-1}
        place = {old: new for new, old in enumerate(sorted(used))} | {-1: -1}
        subgraph.tensors = [subgraph.tensors[old] for old in sorted(used)]
        for tensor in subgraph.tensors:
            if _scales_of(tensor) >= 0:
                tensor.quantization.details.scales = place[_scales_of(tensor)]
        subgraph.inputs = [place[int(x)] for x in subgraph.inputs]
        subgraph.outputs = [place[int(x)] for x in subgraph.outputs]
        for op in subgraph.operators:
            op.inputs, op.outputs = [place[int(x)] for x in op.inputs], [place[int(x)] for x in op.outputs]
        for signature in root.signatureDefs:
            for entry in (*signature.inputs, *signature.outputs) if signature.subgraphIndex == number else ():
                entry.tensorIndex = place[int(entry.tensorIndex)]


def _scales_of(tensor: Any) -> int:
    """The tensor that holds another's scales, one for each block; -1 if it has none."""
    details = None if tensor.quantization is None else tensor.quantization.details
    return -1 if details is None else int(details.scales)


def _prune_buffers(model: Model) -> None:
    root = model.root
    root.metadata, root.metadataBuffer = None, None
    tensors = [tensor for subgraph in root.subgraphs for tensor in subgraph.tensors]
    for tensor in tensors:
        if root.buffers[tensor.buffer].data is None and tensor.buffer not in model.stored:
            tensor.buffer = 0  # computed tensors share the empty buffer
    place = {old: new for new, old in enumerate(sorted({0} | {tensor.buffer for tensor in tensors}))}
    root.buffers = [root.buffers[old] for old in place]
    model.stored = {place[old]: value for old, value in model.stored.items()}
    for tensor in tensors:
        tensor.buffer = place[tensor.buffer]
