"""A .tflite under construction: stored tensors in the place of placeholders, static int8 where the plan has it.

The schema's object API (ai_edge_litert.schema_py_generated) holds a model as plain objects, which are edited
here: operators are replaced, tensors get a quantization, and nothing is computed. A tensor of the plan lies in
one buffer however many signatures use it. `files` writes the result.

    x -> QUANTIZE -> FULLY_CONNECTED(codes) -> DEQUANTIZE -> y     with scales of input and output
    x -> FULLY_CONNECTED(DEQUANTIZE(codes)) -> y                   without: the weight alone is rounded
    x -> FULLY_CONNECTED(blocks of codes) -> y                     Q4_0: the kernel rounds x as it comes
    cache -> DYNAMIC_UPDATE_SLICE(QUANTIZE(k)) -> cache            and DEQUANTIZE for those that attend to it
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from intaglio.errors import ConfigError
from intaglio.formats.litert.converter.trace import FLOATS, LINEAR

Operator = schema.BuiltinOperator
Type = schema.TensorType
CACHE_NAME = re.compile(r"kv_cache_(k|v)_(\d+)")
NUMPY_TYPES = {Type.FLOAT32: np.float32, Type.INT32: np.int32}
# The first version of each operator that takes these types (tflite/tools/versioning/op_version.cc).
VERSIONS = {
    Operator.FULLY_CONNECTED: 10,
    Operator.QUANTIZE: 1,
    Operator.DEQUANTIZE: 6,
    Operator.DYNAMIC_UPDATE_SLICE: 1,
    Operator.EMBEDDING_LOOKUP: 4,
    Operator.CONCATENATION: 1,
    Operator.RESHAPE: 1,
    Operator.MUL: 1,
}


@dataclass(frozen=True)
class Stored:
    """A tensor of the plan as LiteRT stores it.

    name: of the tensor in the file. source: what fills its bytes, for `files`. type: of the schema.
    scale: float32 [rows]; float16 [rows, blocks] of blocks of columns; None for floats. size_bytes: of the data.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    type: int
    scale: np.ndarray | None
    size_bytes: int


@dataclass
class Model:
    """A model of the schema, and which of its buffers are filled from elsewhere: buffer number -> Stored."""

    root: Any
    stored: dict[int, Stored] = field(default_factory=dict)
    scales: dict[str, int] = field(default_factory=dict)  # buffers of the scales of blocks, by the tensor's name

    @classmethod
    def parse(cls, data: bytes) -> Model:
        return cls(schema.ModelT.InitFromPackedBuf(data, 0))

    @classmethod
    def empty(cls) -> Model:
        """A model without subgraphs. Buffer 0 is empty, as the format wants it."""
        root = schema.ModelT(version=3, operatorCodes=[], subgraphs=[], buffers=[schema.BufferT()], signatureDefs=[])
        return cls(root)

    def opcode(self, operator: int) -> int:
        """Number of the operator's code in its version of VERSIONS, which is added if it is new."""
        version = VERSIONS[operator]
        for number, code in enumerate(self.root.operatorCodes):
            if code.builtinCode == operator and code.version == version:
                return number
        deprecated = min(operator, 127)
        code = schema.OperatorCodeT(builtinCode=operator, deprecatedBuiltinCode=deprecated, version=version)
        self.root.operatorCodes.append(code)
        return len(self.root.operatorCodes) - 1

    def operator(self, opcode: int) -> int:
        return self.root.operatorCodes[opcode].builtinCode

    def buffer(self, data: bytes | None = None) -> int:
        self.root.buffers.append(schema.BufferT(data=None if data is None else np.frombuffer(data, np.uint8)))
        return len(self.root.buffers) - 1

    def buffer_of(self, stored: Stored) -> int:
        """The one buffer of a stored tensor."""
        for number, other in self.stored.items():
            if other.name == stored.name:
                return number
        number = self.buffer()
        self.stored[number] = stored
        return number

    def scales_of(self, stored: Stored) -> int:
        """The one buffer of a stored tensor's scales."""
        if stored.name not in self.scales:
            assert stored.scale is not None
            self.scales[stored.name] = self.buffer(stored.scale.tobytes())
        return self.scales[stored.name]


def per_tensor(scale: float) -> Any:
    """Quantization of activations and caches."""
    return schema.QuantizationParametersT(scale=np.array([scale], np.float32), zeroPoint=np.zeros(1, np.int64))


def per_row(scale: np.ndarray) -> Any:
    """Quantization of a weight: one scale for each row."""
    return schema.QuantizationParametersT(scale=scale, zeroPoint=np.zeros(len(scale), np.int64), quantizedDimension=0)


class Subgraph:
    """Adds tensors and operators to one subgraph; `operators` is the list that it will have."""

    def __init__(self, model: Model, subgraph: Any):
        self.model, self.subgraph = model, subgraph
        self.operators: list[Any] = []
        self.quantized: dict[tuple[int, float], int] = {}  # float tensor and scale -> its int8 tensor

    def tensor(self, name: str, shape: Any, kind: int, buffer: int = 0, quantization: Any = None) -> int:
        """Number of a new tensor; buffer 0 is that of one that is computed."""
        tensor = schema.TensorT(
            name=name, shape=[int(size) for size in shape], type=kind, buffer=buffer, quantization=quantization
        )
        self.subgraph.tensors.append(tensor)
        return len(self.subgraph.tensors) - 1

    def constant(self, name: str, values: np.ndarray, kind: int) -> int:
        return self.tensor(name, values.shape, kind, self.model.buffer(values.astype(NUMPY_TYPES[kind]).tobytes()))

    def stored(self, stored: Stored) -> int:
        """Number of a new tensor on a stored one's buffer, with its scales."""
        scale = stored.scale
        if scale is None or scale.ndim == 1:
            quantization = None if scale is None else per_row(scale)
        else:
            scales = self.tensor(f"{stored.name}.scales", scale.shape, Type.FLOAT16, self.model.scales_of(stored))
            blocks = schema.BlockwiseQuantizationT(scales=scales, blockSize=stored.shape[1] // scale.shape[1])
            kind = schema.QuantizationDetails.BlockwiseQuantization
            quantization = schema.QuantizationParametersT(details=blocks, detailsType=kind, quantizedDimension=0)
        return self.tensor(stored.name, stored.shape, stored.type, self.model.buffer_of(stored), quantization)

    def add(self, operator: int, inputs: list[int], outputs: list[int], options: Any = None) -> None:
        """Append an operator; options: of the schema, by whose class its kind is told."""
        kind = 0 if options is None else getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self.operators.append(
            schema.OperatorT(
                opcodeIndex=self.model.opcode(operator),
                inputs=inputs,
                outputs=outputs,
                builtinOptions=options,
                builtinOptionsType=kind,
            )
        )

    def shape(self, tensor: int) -> list[int]:
        return [int(size) for size in self.subgraph.tensors[tensor].shape]

    def quantize(self, x: int, scale: float, name: str) -> int:
        """The int8 tensor of a float one; whoever asks again, gets the same."""
        if (x, scale) not in self.quantized:
            output = self.tensor(name, self.shape(x), Type.INT8, quantization=per_tensor(scale))
            self.add(Operator.QUANTIZE, [x], [output], schema.QuantizeOptionsT())
            self.quantized[x, scale] = output
        return self.quantized[x, scale]

    def dequantize(self, x: int, output: int) -> None:
        self.add(Operator.DEQUANTIZE, [x], [output], schema.DequantizeOptionsT())

    def linear(self, x: int, y: int, weight: Stored, input_scale: float, output_scale: float) -> None:
        """y = x times the weight: int8 on both sides, or with scales of 0 on none."""
        module = weight.name.removesuffix(".weight")
        options = schema.FullyConnectedOptionsT(keepNumDims=True)
        w = self.stored(weight)
        if input_scale:
            x = self.quantize(x, input_scale, f"{module}.input")
            codes = self.tensor(f"{module}.output", self.shape(y), Type.INT8, quantization=per_tensor(output_scale))
            self.add(Operator.FULLY_CONNECTED, [x, w, -1], [codes], options)
            return self.dequantize(codes, y)
        if weight.scale is not None and weight.scale.ndim == 1:
            values = self.tensor(f"{module}.weight_values", weight.shape, Type.FLOAT32)
            self.dequantize(w, values)
            w = values
        self.add(Operator.FULLY_CONNECTED, [x, w, -1], [y], options)


def fill(model: Model, stored: Callable[[str], Stored], static: dict[str, float]) -> None:
    """Replace the placeholders of `trace` by stored tensors, and quantize activations and caches.

    stored: of a tensor's name. static: scales by their names; a name that is missing is 0, off.
    """
    for signature in model.root.signatureDefs:
        _fill_signature(model, signature, stored, static)
    prune(model)


def _fill_signature(model: Model, signature: Any, stored: Callable[[str], Stored], static: dict[str, float]) -> None:
    subgraph = Subgraph(model, model.root.subgraphs[signature.subgraphIndex])
    caches = {
        int(entry.tensorIndex): static.get(f"model.layers.{found[2]}.self_attn.{found[1]}_cache_scale", 0.0)
        for entry in signature.inputs
        if (found := CACHE_NAME.fullmatch(entry.name.decode()))
    }
    for cache, scale in caches.items():
        if scale:
            tensor = subgraph.subgraph.tensors[cache]
            tensor.type, tensor.quantization = Type.INT8, per_tensor(scale)
    read = {int(x) for operator in subgraph.subgraph.operators for x in operator.inputs}
    moved: dict[int, int] = {}
    for operator in subgraph.subgraph.operators:
        kind = model.operator(operator.opcodeIndex)
        if kind == Operator.STABLEHLO_CUSTOM_CALL:
            _fill_call(subgraph, operator, stored, static)
        elif kind == Operator.DYNAMIC_UPDATE_SLICE and caches.get(int(operator.inputs[0])):
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


def prune(model: Model) -> None:
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
            tensor.buffer = 0  # of what is computed: the empty buffer does for all
    place = {old: new for new, old in enumerate(sorted({0} | {tensor.buffer for tensor in tensors}))}
    root.buffers = [root.buffers[old] for old in place]
    model.stored = {place[old]: value for old, value in model.stored.items()}
    for tensor in tensors:
        tensor.buffer = place[tensor.buffer]
