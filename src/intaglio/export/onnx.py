"""ONNX for ONNX Runtime and Transformers.js: a PackedModel's codes and scales in the two sessions of a Gemma 4.

A folder with config.json, tokenizer and `onnx/`, where each session is a graph with its data beside it.
The decoder's graph is traced from transformers (`onnx_trace.py`), without weights; that of the embeddings is
made here. Codes and scales go in by name, a few rows at a time. Nothing is fitted or rounded.

With static scales, linears have QuantizeLinear and DequantizeLinear around them, and the cache that
goes from step to step is of int8. Of a multimodal model the text alone is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from intaglio.errors import ConfigError, InputError
from intaglio.export.hf import hf_config
from intaglio.export.onnx_data import DataFiles
from intaglio.export.onnx_trace import CACHE, DOMAIN, LINEAR, OPSET, trace_decoder
from intaglio.numerics.grid import Quantized
from intaglio.packed.codes import pack_codes
from intaglio.packed.model import PackedModel, copy_assets
from intaglio.packed.store import new_path
from intaglio.plan.family import transformers_config
from intaglio.plan.onnx import DECODER, EMBEDDINGS, FOLDER, Matrix, file_name, is_onnx, matrices

KERNELS = "com.microsoft"
IR_VERSION = 10
KEEP = "num_logits_to_keep"  # Transformers.js sets it to 1 where it wants the last logits alone, and 0 is all
LAST = np.iinfo(np.int64).max


def export_onnx(packed: PackedModel, path: str | Path, *, replace: bool = False) -> None:
    """Write the folder `path`, which Transformers.js and ONNX Runtime open.

    Raises ConfigError for a model that these files cannot hold, RecipeError for a grid that no kernel
    has, InputError for packages that are missing, OutputError if the folder cannot be written.
    """
    with new_path(Path(path), replace=replace, is_such=is_onnx) as temporary:
        write_onnx(packed, temporary)


def write_onnx(packed: PackedModel, folder: Path) -> None:
    """`export_onnx` into a new folder that stays, whole or not."""
    packed = packed.text_only()
    placed = matrices(packed.plan)
    (folder / FOLDER).mkdir(parents=True)
    copy_tokenizer(packed.path, folder)
    files = {}
    for session, make in ((DECODER, decoder_graph), (EMBEDDINGS, embeddings_graph)):
        with DataFiles(folder / FOLDER, file_name(session)) as data:
            model = make(packed, {m.module: m for m in placed if m.session == session}, data)
            (folder / FOLDER / file_name(session)).write_bytes(_finished(model, packed))
            files[file_name(session)] = data.count
    config = json.dumps(web_config(packed, files), indent=2) + "\n"
    (folder / "config.json").write_text(config, "utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy what belongs to a model; the chat template into tokenizer_config.json, where Transformers.js looks for it.

    ConfigError where that could not read the tokenizer.
    """
    copy_assets(source, folder)
    path = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file() or not path.is_file():
        raise ConfigError(f"{source}: no tokenizer.json or no tokenizer_config.json: Transformers.js needs both")
    try:
        config = json.loads(path.read_text("utf-8"))
        if (folder / "chat_template.jinja").is_file():
            config["chat_template"] = (folder / "chat_template.jinja").read_text("utf-8")
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{source}: tokenizer_config.json or chat_template.jinja is damaged: {error}") from None
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def web_config(packed: PackedModel, files: dict[str, int]) -> dict[str, Any]:
    """config.json as Transformers.js wants it: the text model within a Gemma 4, and how many data files there are."""
    text = hf_config(packed.plan.model, torch.float32)
    del text["architectures"]
    ids = {key: text.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "model_type": "gemma4",
        "architectures": ["Gemma4ForConditionalGeneration"],
        "text_config": text,
        **ids,
        "transformers.js_config": {"dtype": "q4", "use_external_data_format": files},
    }


def _finished(model: Any, packed: PackedModel) -> bytes:
    """The graph's bytes: without the exporter's notes, which differ from machine to machine, and with ours."""
    model.producer_name, model.producer_version = "intaglio", ""
    for item in [model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output]:
        item.doc_string = ""
        del item.metadata_props[:]
    del model.graph.value_info[:]
    for key, value in (("intaglio.plan", packed.plan.digest), ("intaglio.recipe", packed.plan.recipe.name)):
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString(deterministic=True)


# What both graphs consist of


def quantized_tensors(packed: PackedModel, matrix: Matrix, data: DataFiles) -> list[Any]:
    """Codes, uint8 [R, C x bits / 8], and scales, float32 [R, S], of a matrix on a block grid."""
    kernel = matrix.kernel
    assert kernel is not None
    rows, columns = matrix.tensor.spec.shape
    name = matrix.tensor.name
    codes = (packed_bytes(value, kernel.bits) for value in _quantized(packed, name))
    scales = (value.step.repeat_interleave(kernel.repeats, dim=-1).numpy() for value in _quantized(packed, name))
    return [
        data.add(f"{matrix.module}.weight.codes", np.uint8, (rows, columns * kernel.bits // 8), codes),
        data.add(f"{matrix.module}.weight.scale", np.float32, (rows, columns // kernel.block), scales),
    ]


def packed_bytes(value: Quantized, bits: int) -> np.ndarray:
    """uint8 [R, C x bits / 8]: each code plus half of its range, from the lowest bits of a byte on."""
    if bits == value.grid.code_bits and bits < 8:
        return pack_codes(value.codes, value.grid).numpy()
    assert bits == 8
    return value.codes.numpy().view(np.uint8) ^ np.uint8(128)  # adds 128


def float_tensor(packed: PackedModel, matrix: Matrix, data: DataFiles) -> Any:
    """A matrix of floats, as it is."""
    dtype = np.float16 if matrix.half else np.float32
    pieces = (value.float().numpy().astype(dtype) for _, value in packed.chunks(matrix.tensor.name))  # type: ignore[union-attr]
    return data.add(f"{matrix.module}.weight", dtype, matrix.tensor.spec.shape, pieces)


def _quantized(packed: PackedModel, name: str) -> Iterator[Quantized]:
    for _, value in packed.chunks(name):
        assert isinstance(value, Quantized)
        yield value


# Embeddings


def embeddings_graph(packed: PackedModel, placed: dict[str, Matrix], data: DataFiles) -> Any:
    """input_ids [B, T] -> inputs_embeds [B, T, H] and, where there is a table, per_layer_inputs [B, T, L, P]."""
    from onnx import TensorProto, helper

    config = transformers_config(packed.plan.model.config)
    nodes: list[Any] = []
    tensors: list[Any] = []
    outputs = []
    for matrix in placed.values():
        table = matrix.tensor.spec.role == "ple_embedding"
        width = config.hidden_size_per_layer_input if table else config.hidden_size
        output, shape = ("per_layer_inputs", [config.num_hidden_layers, width]) if table else ("inputs_embeds", [width])
        nodes += _lookup(packed, matrix, data, tensors, output, shape)
        # transformers multiplies by the root of the width, rounded to float32
        tensors.append(data.add_array(f"{matrix.module}.embed_scale", np.array(width**0.5, np.float32)))
        dims = ["batch_size", "sequence_length", *shape]
        outputs.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, dims))
        if table:
            tensors.append(data.add_array(f"{matrix.module}.shape", np.array([0, 0, *shape], np.int64)))
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    graph = helper.make_graph(nodes, EMBEDDINGS, [ids], outputs, tensors)
    return helper.make_model(graph, opset_imports=_opsets(), ir_version=IR_VERSION)


def _opsets() -> list[Any]:
    from onnx import helper

    return [helper.make_opsetid("", OPSET), helper.make_opsetid(KERNELS, 1)]


def _lookup(
    packed: PackedModel, matrix: Matrix, data: DataFiles, tensors: list[Any], output: str, shape: list[int]
) -> list[Any]:
    """Nodes that look rows up, scale them and, of the table of per-layer embeddings, give each layer its own."""
    from onnx import TensorProto, helper

    name, kernel = matrix.module, matrix.kernel
    rows, scaled = f"{name}.rows", output if len(shape) == 1 else f"{name}.scaled"
    if kernel is None:
        tensors.append(float_tensor(packed, matrix, data))
        nodes = [helper.make_node("Gather", [f"{name}.weight", "input_ids"], [rows], name=name, axis=0)]
        if matrix.half:
            nodes.append(helper.make_node("Cast", [rows], [f"{rows}.float"], to=TensorProto.FLOAT))
            rows += ".float"
    else:
        tensors += quantized_tensors(packed, matrix, data)
        inputs = [f"{name}.weight.codes", "input_ids", f"{name}.weight.scale"]
        how = {"bits": kernel.bits, "block_size": kernel.block, "gather_axis": 0, "quantize_axis": 1}
        nodes = [helper.make_node("GatherBlockQuantized", inputs, [rows], name=name, domain=KERNELS, **how)]
    nodes.append(helper.make_node("Mul", [rows, f"{name}.embed_scale"], [scaled]))
    if scaled != output:
        nodes.append(helper.make_node("Reshape", [scaled, f"{name}.shape"], [output]))
    return nodes


# The decoder


def decoder_graph(packed: PackedModel, placed: dict[str, Matrix], data: DataFiles) -> Any:
    """inputs_embeds, per_layer_inputs, attention_mask, position_ids and the past -> logits and the new past."""
    from onnx import helper

    model = trace_decoder(packed.plan.model)
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
    model.opset_import.extend(_opsets())
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
    """Puts what the kernels compute in place of the traced graph's names.

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
        x, nodes = inputs[0], []
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
            how = {"K": columns, "N": rows, "bits": kernel.bits, "block_size": kernel.block, "accuracy_level": 0}
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
        """As many of the last tokens as are asked for; -0 begins at the first, so that 0 is all of them."""
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
        return [self._add(owner, np.array(self.static[owner], np.float32)), self._add("int8_zero", np.array(0, np.int8))]

    def _round(self, x: str, scale: str, output: str | None = None) -> tuple[list[Any], str]:
        """Nodes that round x by a static scale, and the name of the result: x, without nodes, where the scale is off."""
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
        """Past and new keys or values, one behind the other; in codes, and decoded from there on, if they have a scale."""
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
