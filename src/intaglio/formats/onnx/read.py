"""Compares ONNX files with a packed model: read with the onnx package, bytes taken apart by the kernels' rule.

Shared with the exporter is only the list of matrices in `layout.py`. A matrix is what the node of its name
computes with, found through the graph: the kernel's attributes, its codes and scales, and the QuantizeLinear and
DequantizeLinear around it. Everything is compared by its bits, a few rows at a time. What has no weights,
attention for example, is the trace's, and is proven by the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intaglio.errors import ConfigError, InputError
from intaglio.formats.listed import codes_in_bytes
from intaglio.formats.onnx.layout import (
    DECODER,
    EMBEDDINGS,
    FOLDER,
    SMALL_ROLES,
    WEB_MODEL,
    Matrix,
    file_name,
    matrices,
)
from intaglio.formats.onnx.read_facts import compare_onnx_facts
from intaglio.formats.tally import Tally
from intaglio.numerics.grid import Quantized
from intaglio.packed.model import PackedModel
from intaglio.plan.files import one_line, reading

KERNELS = {DECODER: "MatMulNBits", EMBEDDINGS: "GatherBlockQuantized"}
PASSING = ("Cast", "Transpose")  # between a matrix of floats and the node that computes with it


def compare_onnx(packed: PackedModel, folder: Path, tally: Tally) -> None:
    """Count into `tally` what the folder holds and what of it differs from the packed model's text model."""
    packed = packed.text_only()  # the exporter writes no towers
    folder = folder if (folder / FOLDER).is_dir() else folder / WEB_MODEL
    graphs = {session: Graph(folder / FOLDER / file_name(session)) for session in KERNELS}
    for session, graph in graphs.items():
        placed = [matrix for matrix in matrices(packed.plan) if matrix.session == session]
        for matrix in placed:
            _compare_matrix(packed, matrix, graph, tally)
        if session == DECODER:
            _compare_small(packed, graph, tally)
            _compare_static(packed, graph, tally)
        names = {matrix.module for matrix in placed}
        tally.extra += sorted(
            n for n, node in graph.named.items() if node.op_type in KERNELS.values() and n not in names
        )
        # a trace has no weights: a constant with two long axes is one that nobody planned
        matrix_like = (n for n, t in graph.tensors.items() if sum(size > 1 for size in t.dims) > 1)
        tally.extra += sorted(n for n in matrix_like if n not in graph.seen)
    compare_onnx_facts(packed, folder, graphs, tally)


class Graph:
    """One file, with its data mapped. ConfigError for a file that is missing, damaged or points elsewhere.

    named: nodes by name. makers, users: the node that makes a value, and those that read it. tensors:
    constants by name. seen: of these, the ones that were read.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnx
        except ImportError as error:
            raise InputError(f"ONNX files need the onnx package ({error}): pip install 'intaglio[onnx]'") from error
        self.path = path
        try:
            self.model: Any = onnx.load(str(path), load_external_data=False)
        except Exception as error:  # protobuf's errors have no common type
            raise ConfigError(f"{path}: not a valid ONNX file ({one_line(error)}): export it again") from error
        self.graph: Any = self.model.graph
        self.attribute_value = onnx.helper.get_attribute_value
        self.dtype_of = onnx.helper.tensor_dtype_to_np_dtype
        self.named = {node.name: node for node in self.graph.node if node.name}
        self.makers = {output: node for node in self.graph.node for output in node.output}
        self.users: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        self.seen: set[str] = set()

    def attributes(self, node: Any) -> dict[str, Any]:
        """A node's attributes by name."""
        return {attribute.name: self.attribute_value(attribute) for attribute in node.attribute}

    def origin(self, name: str) -> str:
        """The constant behind a value, through casts and transpositions; any value of a ring that reads itself."""
        passed: set[str] = set()
        while name in self.makers and self.makers[name].op_type in PASSING and name not in passed:
            passed.add(name)
            name = self.makers[name].input[0]
        return name

    def array(self, name: str) -> np.ndarray | None:
        """A constant's content in its own dtype and shape; None if there is none of that name."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        self.seen.add(name)
        shape = tuple(tensor.dims)
        with reading(self.path, f"the data of {name} cannot be read", "export it again"):
            if any(size < 0 for size in shape):
                raise ValueError(f"shape {shape}")
            dtype = np.dtype(self.dtype_of(tensor.data_type))
            if tensor.data_location != 1:  # not external
                return np.frombuffer(tensor.raw_data, dtype).reshape(shape)
            where = {entry.key: entry.value for entry in tensor.external_data}
            location, offset = where["location"], int(where.get("offset", 0))
            if Path(location).name != location:
                raise ConfigError(f"{self.path}: {name} lies in {location!r}: expected a file of the same folder")
            if not (self.path.parent / location).is_file():  # opening a pipe would wait for ever
                raise ValueError(f"{location} is no file")
            return np.memmap(self.path.parent / location, dtype, mode="r", offset=offset, shape=shape)


def _compare_matrix(packed: PackedModel, matrix: Matrix, graph: Graph, tally: Tally) -> None:
    node = graph.named.get(matrix.module)
    if node is None:
        tally.missing.append(matrix.module)
        return
    tally.counts["tensors"] += 1
    compare = _compare_floats if matrix.kernel is None else _compare_kernel
    compare(packed, matrix, node, graph, tally)


def _compare_floats(packed: PackedModel, matrix: Matrix, node: Any, graph: Graph, tally: Tally) -> None:
    of_embedding = matrix.session == EMBEDDINGS
    found = graph.array(graph.origin(node.input[0 if of_embedding else 1]))
    dtype = np.float16 if matrix.half else np.float32
    kind = node.op_type == ("Gather" if of_embedding else "MatMul")
    if found is None or not kind or found.dtype != dtype or found.shape != matrix.tensor.spec.shape:
        tally.unlike.append(matrix.module)
        return
    for rows, value in packed.chunks(matrix.tensor.name):
        assert isinstance(value, Tensor)
        part = found if rows is None else found[rows]
        tally.compare("values", value.float(), torch.from_numpy(part.astype(np.float32)))


def _compare_kernel(packed: PackedModel, matrix: Matrix, node: Any, graph: Graph, tally: Tally) -> None:
    kernel, (rows, columns) = matrix.kernel, matrix.tensor.spec.shape
    assert kernel is not None
    expected: dict[str, Any] = {"bits": kernel.bits, "block_size": kernel.block}
    places: tuple[int, int]
    shape: tuple[int, ...]
    if matrix.session == EMBEDDINGS:
        expected |= {"gather_axis": 0, "quantize_axis": 1}
        places, shape = (0, 2), (rows, columns * kernel.bits // 8)
    else:
        expected |= {"K": columns, "N": rows, "accuracy_level": 0}
        places, shape = (1, 2), (rows, columns // kernel.block, kernel.block * kernel.bits // 8)
    same = node.op_type == KERNELS[matrix.session] and node.domain == "com.microsoft" and len(node.input) == 3
    codes, scale = (graph.array(node.input[place]) for place in places) if same else (None, None)
    same = same and graph.attributes(node) == expected and codes is not None and scale is not None
    if not same or codes is None or scale is None or (codes.dtype, codes.shape) != (np.dtype(np.uint8), shape):
        tally.unlike.append(matrix.module)
        return
    if (scale.dtype, scale.shape) != (np.dtype(np.float32), (rows, columns // kernel.block)):
        tally.unlike.append(matrix.module)
        return
    codes = codes.reshape(rows, -1)
    for at, value in packed.chunks(matrix.tensor.name):
        assert isinstance(value, Quantized)
        part = slice(None) if at is None else at
        tally.compare("codes", value.codes, codes_in_bytes(codes[part], kernel.bits))
        steps = value.step.numpy().repeat(kernel.repeats, axis=-1)
        tally.compare("scales", torch.from_numpy(steps), torch.from_numpy(np.array(scale[part])))


def _compare_small(packed: PackedModel, graph: Graph, tally: Tally) -> None:
    """Norms and layer scalars, which have the names of the traced module, in which the model is `model`."""
    for tensor in packed.plan:
        if tensor.spec.role not in SMALL_ROLES:
            continue
        name = f"model.{tensor.name}"
        found = graph.array(name)
        if found is None or name not in graph.users:
            tally.missing.append(tensor.name)
            continue
        tally.counts["tensors"] += 1
        if (found.dtype, found.shape) != (np.dtype(np.float32), tensor.spec.shape):
            tally.unlike.append(tensor.name)
            continue
        tally.compare("values", packed.decode(tensor.name), torch.from_numpy(np.array(found)))


def _compare_static(packed: PackedModel, graph: Graph, tally: Tally) -> None:
    values = packed.read_static()
    for scale in packed.plan.static_scales:
        if scale.kind.endswith("cache"):
            if not scale.owned:
                continue  # a shared layer attends to what its donor has cached
            found = _cache_scale(graph, scale.name)
        else:
            found = _linear_scale(graph, scale.module, scale.kind)
        if found is None:
            tally.unlike.append(scale.name)
            continue
        expected = torch.tensor(values[scale.name], dtype=torch.float32)
        tally.compare("static_scales", expected, torch.from_numpy(found.reshape(())))


OFF = np.zeros((), np.float32)


def _linear_scale(graph: Graph, module: str, kind: str) -> np.ndarray | None:
    """The scale that rounds a linear's input or output.

    OFF where nothing rounds it, None if the pair of QuantizeLinear and DequantizeLinear is incomplete.
    """
    node = graph.named.get(module)
    if node is None:
        return None
    if kind == "input":
        decoding = graph.makers.get(node.input[0])
        if decoding is None or decoding.op_type != "DequantizeLinear":
            return OFF
        coding = graph.makers.get(decoding.input[0])
    else:
        readers = graph.users.get(node.output[0], [])
        if all(reader.op_type != "QuantizeLinear" for reader in readers):
            return OFF
        coding = readers[0]
        decoders = graph.users.get(coding.output[0], [])
        if len(readers) != 1 or len(decoders) != 1:
            return None
        decoding = decoders[0]
    return _pair(graph, coding, [decoding])


def _cache_scale(graph: Graph, name: str) -> np.ndarray | None:
    """The scale that rounds new keys or values before they join an int8 cache; else as `_linear_scale`."""
    join = graph.named.get(name)
    if join is None or join.op_type != "Concat" or len(join.input) != 2:
        return None
    coding = graph.makers.get(join.input[1])
    ends = [
        value for value in (*graph.graph.input, *graph.graph.output) if value.name in (join.input[0], join.output[0])
    ]
    int8 = [value.type.tensor_type.elem_type == 3 for value in ends]
    if coding is None or coding.op_type != "QuantizeLinear":
        return OFF if len(int8) == 2 and not any(int8) else None
    return _pair(graph, coding, graph.users.get(join.output[0], [])) if len(int8) == 2 and all(int8) else None


def _pair(graph: Graph, coding: Any, decoding: list[Any]) -> np.ndarray | None:
    """The scale of a QuantizeLinear and the DequantizeLinear behind it, to int8 without offset; None if they differ."""
    if coding is None or coding.op_type != "QuantizeLinear" or not decoding:
        return None
    if any(node.op_type != "DequantizeLinear" or list(node.input[1:]) != list(coding.input[1:]) for node in decoding):
        return None
    if len(coding.input) != 3:
        return None
    scale, zero = (graph.array(name) for name in coding.input[1:])
    if scale is None or zero is None or zero.dtype != np.int8 or zero.size != 1 or zero.any():
        return None
    return np.array(scale) if scale.dtype == np.float32 and scale.size == 1 else None
