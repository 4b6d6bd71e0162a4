"""A .tflite under construction: its tensors, buffers and operators.

The schema's object API (ai_edge_litert.schema_py_generated) holds a model as plain objects, and nothing is computed. A
tensor of the plan lies in one buffer however many signatures use it. `files` writes the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

Operator = schema.BuiltinOperator
Type = schema.TensorType
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
        return int(self.root.operatorCodes[opcode].builtinCode)

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
