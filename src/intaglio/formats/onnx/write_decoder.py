"""The decoder's graph: codes and scales in place of the names in a trace.

B sequences, T tokens, R rows and C columns of a weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from intaglio.errors import InputError
from intaglio.formats.onnx.layout import DECODER, Matrix
from intaglio.formats.onnx.write_data import IR_VERSION, KERNELS, DataFiles, float_tensor, opsets, quantized_tensors
from intaglio.formats.onnx.write_trace import CACHE, DOMAIN, LINEAR, trace_decoder
from intaglio.packed.model import PackedModel

KEEP = "num_logits_to_keep"  # Transformers.js sets it to 1 where it wants the last logits alone, and 0 is all
LAST = np.iinfo(np.int64).max


def decoder_graph(packed: PackedModel, placed: dict[str, Matrix], data: DataFiles) -> Any:
    """inputs_embeds, per_layer_inputs, attention_mask, position_ids and the past -> logits and the new past."""
    model = trace_decoder(packed.plan.model)  # its error says how to install missing packages
    from onnx import helper

    graph = model.graph
    constants = [_traced(packed, tensor, data) for tensor in graph.initializer]
    filling = _Filling(packed, placed, data)
    nodes = [new for node in graph.node for new in filling.replacement(node)]
    if placed:
        raise InputError(f"{next(iter(placed))}: the traced decoder has no such linear: pack the model again")
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants + filling.tensors)
    graph.input.append(helper.make_tensor_value_info(KEEP, 7, []))  # 7: int64
    for value in [*graph.input, *graph.output]:
        _set_type(value, value.name in filling.int8)
    del model.opset_import[:], model.functions[:]
    model.opset_import.extend(opsets())
    model.ir_version, graph.name = IR_VERSION, DECODER
    return model


def _traced(packed: PackedModel, tensor: Any, data: DataFiles) -> Any:
    """A constant of the trace; a planned tensor, which the trace holds as ones, with its packed values."""
    name = tensor.name.removeprefix("model.")  # the trace is of a module that holds the model
    if all(name != planned.name for planned in packed.plan):
        return tensor
    made = data.add_array(name, packed.decode(name).numpy())
    made.name = tensor.name
    return made


def _set_type(value: Any, int8: bool) -> None:
    """Names for the axes of a graph's input or output: `batch_size` is one that Transformers.js looks for."""
    tensor = value.type.tensor_type
    if int8:
        tensor.elem_type = 3
    names = {"attention_mask": {1: "total_sequence_length"}, "logits": {1: "num_logits"}}.get(value.name)
    if value.name.startswith("past_key_values."):
        names = {2: "past_sequence_length"}
    elif value.name.startswith("present."):
        names = {2: "total_sequence_length"}
    for axis, name in ({0: "batch_size"} | (names or {1: "sequence_length"})).items():
        if axis < len(tensor.shape.dim):
            tensor.shape.dim[axis].dim_param = name


class _Filling:
    """Puts the kernels' nodes in place of the traced graph's names.

    placed: linears by name; each is taken out when its place is found. tensors: what they need.
    int8: inputs and outputs of the graph that hold int8 and not floats.
    """

    def __init__(self, packed: PackedModel, placed: dict[str, Matrix], data: DataFiles) -> None:
        self.packed, self.placed, self.data = packed, placed, data
        self.owners = {scale.name: scale.owner for scale in packed.plan.static_scales}
        self.static = packed.read_static()
        self.tensors: list[Any] = []
        self.int8: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.quantized: dict[tuple[str, str], str] = {}  # by input and scale: linears beside each other share both
        self.added: set[str] = set()

    def replacement(self, node: Any) -> list[Any]:
        """The nodes that stand in a traced node's place."""
        for i, name in enumerate(node.input):
            node.input[i] = self.renamed.get(name, name)
        if node.domain != DOMAIN:
            return [node]
        name = node.attribute[0].s.decode()
        return {LINEAR: self._linear, CACHE: self._cache}[node.op_type](name, list(node.input), node.output[0])

    def _linear(self, name: str, inputs: list[str], output: str) -> list[Any]:
        matrix = self.placed.pop(name, None)
        if matrix is None:
            raise InputError(f"{name}: in the traced decoder, but not in the plan: pack the model again")
        x = inputs[0]
        nodes: list[Any] = []
        if name == "lm_head":
            x, nodes = self._last_tokens(x)
        before, x = self._round(x, f"{name}.input_activation_scale")
        scale = f"{name}.output_activation_scale"
        exact = f"{output}.exact" if self.static.get(scale) else output
        after, rounded = self._round(exact, scale, output)
        assert rounded == output
        return [*nodes, *before, *self._product(matrix, x, exact), *after]

    def _product(self, matrix: Matrix, x: str, output: str) -> list[Any]:
        from onnx import TensorProto, helper

        name, kernel = matrix.module, matrix.kernel
        rows, columns = matrix.tensor.spec.shape
        if kernel is not None:
            tensors = quantized_tensors(self.packed, matrix, self.data)
            tensors[0].dims[:] = [rows, columns // kernel.block, kernel.block * kernel.bits // 8]
            self.tensors += tensors
            # accuracy_level 0: the weights are decoded and multiplied in float32, activations are not rounded
            how: dict[str, Any] = {
                "K": columns,
                "N": rows,
                "bits": kernel.bits,
                "block_size": kernel.block,
                "accuracy_level": 0,
            }
            inputs = [x, *(tensor.name for tensor in tensors)]
            return [helper.make_node("MatMulNBits", inputs, [output], name=name, domain=KERNELS, **how)]
        self.tensors.append(float_tensor(self.packed, matrix, self.data))
        weight, nodes = f"{name}.weight", []
        if matrix.half:
            nodes.append(helper.make_node("Cast", [weight], [f"{weight}.float"], to=TensorProto.FLOAT))
            weight += ".float"
        nodes.append(helper.make_node("Transpose", [weight], [f"{weight}.T"], perm=[1, 0]))
        return [*nodes, helper.make_node("MatMul", [x, f"{weight}.T"], [output], name=name)]

    def _last_tokens(self, x: str) -> tuple[str, list[Any]]:
        """The last tokens, as many as are asked for; -0 begins at the first, so that 0 is all of them."""
        from onnx import helper

        for name, value in (("to_keep.one", [1]), ("to_keep.end", [LAST])):
            self._add(name, np.array(value, np.int64))
        return "to_keep.hidden", [
            helper.make_node("Neg", [KEEP], ["to_keep.negative"]),
            helper.make_node("Reshape", ["to_keep.negative", "to_keep.one"], ["to_keep.start"]),
            helper.make_node("Slice", [x, "to_keep.start", "to_keep.end", "to_keep.one"], ["to_keep.hidden"]),
        ]

    def _add(self, name: str, value: np.ndarray) -> str:
        if name not in self.added:
            self.tensors.append(self.data.add_array(name, value))
            self.added.add(name)
        return name

    def _scale(self, name: str) -> list[str]:
        """Names of a static scale and of the zero that belongs to it, which is always 0."""
        owner = self.owners[name]
        return [
            self._add(owner, np.array(self.static[owner], np.float32)),
            self._add("int8_zero", np.array(0, np.int8)),
        ]

    def _round(self, x: str, scale: str, output: str | None = None) -> tuple[list[Any], str]:
        """Nodes that round x by a static scale, and the result's name: x, without nodes, where the scale is off."""
        from onnx import helper

        if not self.static.get(scale):
            return [], x
        key = (x, self.owners[scale])
        if output is None and key in self.quantized:
            return [], self.quantized[key]
        output = output or f"{scale}.rounded"
        self.quantized[key] = output
        steps = self._scale(scale)
        return [
            helper.make_node("QuantizeLinear", [x, *steps], [f"{scale}.codes"]),
            helper.make_node("DequantizeLinear", [f"{scale}.codes", *steps], [output]),
        ], output

    def _cache(self, scale: str, inputs: list[str], output: str) -> list[Any]:
        """Past and new keys or values behind each other; in codes, and decoded from there on, if they have a scale."""
        from onnx import helper

        past, new = inputs
        if not self.static.get(scale):
            return [helper.make_node("Concat", [past, new], [output], name=scale, axis=2)]
        self.int8 |= {past, output}
        self.renamed[output] = f"{output}.decoded"
        steps = self._scale(scale)
        return [
            helper.make_node("QuantizeLinear", [new, *steps], [f"{scale}.codes"]),
            helper.make_node("Concat", [past, f"{scale}.codes"], [output], name=scale, axis=2),
            helper.make_node("DequantizeLinear", [output, *steps], [f"{output}.decoded"]),
        ]
