"""Reads .litertlm bundles and the .tflite models in them, with nothing but the file formats' own tables of fields.

The exporter writes with the libraries of LiteRT; this reader shares no code with them. Field numbers are those of the
schemas:
tensorflow/lite/schema/schema.fbs and schema/core/litertlm_header_schema.fbs of LiteRT-LM.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field as of
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intaglio.formats.litert.read_flatbuffer import Bytes, Table, root
from intaglio.plan.files import reading

MAGIC = b"LITERTLM"
HEADER_START = 32  # of the bundle's flatbuffer
TFLITE_SECTION, LLM_METADATA_SECTION, TOKENIZER_SECTION = 3, 5, 6
LARGEST_TOKENIZER = 1 << 27  # bytes of tokenizer.json; Gemma's has 2^25
PLAN_KEY, GRAPHS_KEY = "intaglio.plan", "intaglio.graphs"  # of the metadata that an export adds
TYPES = {0: "float32", 1: "float16", 2: "int32", 4: "int64", 9: "int8", 17: "int4", 19: "int2"}
# Field numbers of the tables that are read.
SYSTEM_METADATA, SECTION_METADATA, SECTIONS = 0, 1, 0
ITEMS, BEGIN, END, DATA_TYPE = 0, 1, 2, 3
KEY, VALUE = 0, 2
OPERATOR_CODES, SUBGRAPHS, BUFFERS, SIGNATURES = 1, 2, 4, 7
TENSORS, OPERATORS = 0, 3
SHAPE, TYPE, BUFFER, NAME, QUANTIZATION = 0, 1, 2, 3, 4
SCALE, ZERO_POINT, DETAILS, DIMENSION = 2, 3, 5, 6
DATA, OFFSET, SIZE = 0, 1, 2
OPCODE, INPUTS, OUTPUTS, OPTIONS_2 = 0, 1, 2, 12
COMPOSITE = 206  # a builtin operator that stands for a subgraph
COMPOSITE_NAME, DECOMPOSITION, ATTRIBUTES = 0, 1, 2
BUILTIN_CODE = 3
SIGNATURE_INPUTS, SIGNATURE_OUTPUTS, SIGNATURE_KEY, SUBGRAPH = 0, 1, 2, 4
MAP_NAME, MAP_TENSOR = 0, 1
BLOCK_SCALES, BLOCK_SIZE = 0, 2


@dataclass(frozen=True)
class TfliteTensor:
    """A tensor of a subgraph.

    type: as in TYPES. data: its bytes, empty where it is computed. scale: float32, of none, one or all rows;
    of blocks [rows, blocks] in their own dtype. zero: whether all zero points are zero.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    data: Bytes
    scale: NDArray[Any]
    zero: bool


@dataclass(frozen=True)
class Signature:
    """A function of a model: its subgraph's tensors and operators, and the tensors of its inputs and outputs by name.

    operators: builtin code, inputs and outputs, in order. composites: of operators that stand for a subgraph their
    name, their attributes as they are stored, and the subgraph.
    """

    key: str
    tensors: list[TfliteTensor]
    operators: list[tuple[int, list[int], list[int]]]
    inputs: dict[str, int]
    outputs: dict[str, int]
    composites: list[tuple[str, bytes, Signature]] = of(default_factory=list)


@dataclass(frozen=True)
class Bundle:
    """All of a bundle. said: its system metadata. other: bytes of sections that are no models, by their type.

    digest: of the models' graphs, as `graph_digest` makes it.
    """

    models: dict[str, list[Signature]]
    said: dict[str, str]
    other: dict[int, list[Bytes]]
    digest: str


def holds_bundle(path: Path) -> bool:
    """Whether a path is a .litertlm file, by its first bytes, or a folder with one."""
    found = bundle_in(path)
    if not found.is_file():
        return False
    with open(found, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def bundle_in(path: Path) -> Path:
    """The file itself, or the first of its kind in a folder."""
    return next(iter(sorted(path.glob("*.litertlm"))), path) if path.is_dir() else path


def read_bundle(path: Path) -> Bundle:
    """A bundle's models by their type, "tf_lite_prefill_decode", and what lies beside them. Data is mapped, not read.

    ConfigError for a file that is truncated or malformed.
    """
    with reading(path, "not a valid bundle", "export it again"):
        if not path.is_file():
            raise ValueError("no regular file")
        data: Bytes = np.memmap(path, np.uint8, "r").view(np.ndarray)
        header = root(data[HEADER_START:])
        system, sections = header.table(SYSTEM_METADATA), header.table(SECTION_METADATA)
        said = dict(_items(system)) if system else {}
        models, other, graphs = dict[str, list[Signature]](), dict[int, list[Bytes]](), list[Bytes]()
        for section in sections.tables(SECTIONS) if sections else []:
            kind, begin, end = section.number(DATA_TYPE, "B"), section.number(BEGIN, "<Q"), section.number(END, "<Q")
            if not HEADER_START < begin < end <= len(data):
                raise ValueError(f"a section in bytes {begin} to {end} of {len(data)}")
            if kind != TFLITE_SECTION:
                other.setdefault(kind, []).append(data[begin:end])
                continue
            models[_model_type(section)] = list(_signatures(data[begin:end]))
            graphs.append(data[begin:end])
        if not models:
            raise ValueError("it has no models")
        return Bundle(models, said, other, graph_digest(graphs))


def graph_digest(models: list[Bytes]) -> str:
    """A digest of all of some models but the stored tensors, which lie behind each model's flatbuffer."""
    found = hashlib.sha256()
    for data in models:
        starts = [buffer.number(OFFSET, "<Q") for buffer in root(data).tables(BUFFERS) if buffer.number(SIZE, "<Q")]
        found.update(data[: min(starts, default=len(data))].data)
    return found.hexdigest()


def unzip_tokenizer(data: Bytes) -> bytes:
    """The tokenizer.json of its section: the length in 8 bytes, and a zlib stream. ValueError for anything else."""
    size = int.from_bytes(data[:8].tobytes(), "little")
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(data[8:].tobytes(), LARGEST_TOKENIZER)
    except zlib.error as error:
        raise ValueError(f"no zlib stream: {error}") from None
    if len(text) != size or not stream.eof:
        raise ValueError(f"{len(text)} bytes of a tokenizer of {size}")
    return text


def read_message(data: bytes) -> dict[int, list[int | bytes]]:
    """The fields of a protobuf message by their numbers: integers, and bytes for all else."""
    found: dict[int, list[int | bytes]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        value: int | bytes
        if key & 7 == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or (varint() if key & 7 == 2 else -1)
            value = data[at : at + size]
            if size < 0 or len(value) != size:
                raise ValueError("a field that is no protobuf")
            at += size
        found.setdefault(key >> 3, []).append(value)
    return found


def _model_type(section: Table) -> str:
    said = dict(_items(section))
    if "model_type" not in said:
        raise ValueError("a model without a type")
    return said["model_type"]


def _items(table: Table) -> Iterator[tuple[str, str]]:
    """Keys and texts of metadata, in field 0 of both kinds of tables that have them."""
    for item in table.tables(ITEMS):
        value = item.table(VALUE)
        if value is not None:
            yield item.text(KEY), value.text(0)


def _signatures(data: Bytes) -> Iterator[Signature]:
    model = root(data)
    buffers, subgraphs = model.tables(BUFFERS), model.tables(SUBGRAPHS)
    codes = [code.number(BUILTIN_CODE, "<i") for code in model.tables(OPERATOR_CODES)]

    def part(subgraph: Table, key: str, inputs: dict[str, int], outputs: dict[str, int], *, inside: bool) -> Signature:
        tables, operators = subgraph.tables(TENSORS), subgraph.tables(OPERATORS)
        kinds = [codes[op.number(OPCODE, "<I")] for op in operators]
        stand_ins = [op.table(OPTIONS_2) for op, kind in zip(operators, kinds, strict=True) if kind == COMPOSITE]
        return Signature(
            key=key,
            tensors=[_tensor(table, tables, data, buffers) for table in tables],
            operators=[
                (kind, op.numbers(INPUTS), op.numbers(OUTPUTS)) for op, kind in zip(operators, kinds, strict=True)
            ],
            inputs=inputs,
            outputs=outputs,
            composites=[] if inside else [composite(options) for options in stand_ins if options is not None],
        )

    def composite(options: Table) -> tuple[str, bytes, Signature]:
        name, attributes = options.text(COMPOSITE_NAME), options.vector(ATTRIBUTES, "u1").tobytes()
        return name, attributes, part(subgraphs[options.number(DECOMPOSITION, "<i")], name, {}, {}, inside=True)

    for signature in model.tables(SIGNATURES):
        inputs, outputs = (
            {entry.text(MAP_NAME): entry.number(MAP_TENSOR, "<I") for entry in signature.tables(field)}
            for field in (SIGNATURE_INPUTS, SIGNATURE_OUTPUTS)
        )
        subgraph = subgraphs[signature.number(SUBGRAPH, "<I")]
        yield part(subgraph, signature.text(SIGNATURE_KEY), inputs, outputs, inside=False)


def _tensor(table: Table, tables: list[Table], data: Bytes, buffers: list[Table]) -> TfliteTensor:
    kind = TYPES.get(table.number(TYPE, "B"), "other")
    quantization = table.table(QUANTIZATION)
    scale, zero = np.zeros(0, np.float32), True
    if quantization is not None:
        scale = quantization.vector(SCALE, "<f4")
        zeros = quantization.vector(ZERO_POINT, "<i8")
        table.budget.spend(entries=len(zeros))
        zero = not zeros.any() and quantization.number(DIMENSION, "<i") == 0
        blocks = quantization.table(DETAILS)
        if blocks is not None:
            stored = tables[blocks.number(BLOCK_SCALES, "<i")]
            scale = _data(buffers[stored.number(BUFFER, "<I")], data).view("<f2")
            scale = scale.reshape(stored.numbers(SHAPE))
    return TfliteTensor(
        name=table.text(NAME),
        shape=tuple(table.numbers(SHAPE)),
        type=kind,
        data=_data(buffers[table.number(BUFFER, "<I")], data),
        scale=scale,
        zero=zero,
    )


def _data(buffer: Table, data: Bytes) -> Bytes:
    """A buffer's bytes, which are in it or behind the flatbuffer."""
    start, size = buffer.number(OFFSET, "<Q"), buffer.number(SIZE, "<Q")
    if not size:
        return buffer.vector(DATA, "u1")
    if start + size > len(data):
        raise ValueError(f"a buffer that ends at byte {start + size} of {len(data)}")
    return data[start : start + size]
