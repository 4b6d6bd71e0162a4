"""Writes a model as a .tflite whose stored tensors lie behind the flatbuffer, each at an offset of its own.

So the format's 2 GB end with the graph and not with the weights, and these are written without ever being in
memory together; a runtime maps them.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import flatbuffers

from intaglio.formats.litert.converter.graph import Model
from intaglio.formats.litert.converter.weights import Weights

ALIGNMENT_BYTES = 64  # of a tensor's data, for the widest vectors of any kernel
FILE_IDENTIFIER = b"TFL3"


def write_tflite(model: Model, weights: Weights, path: Path) -> None:
    """Write the graph, then the bytes of all stored tensors."""
    _place(model, start=1 << 62)  # a number as wide as the real ones, so that the graph takes as many bytes
    graph_bytes = len(_serialized(model.root))
    _place(model, start=_aligned(graph_bytes))
    with open(path, "wb") as file:
        file.write(_serialized(model.root))
        offsets = {value.name: model.root.buffers[number].offset for number, value in model.stored.items()}
        ordered = sorted(model.stored.values(), key=lambda value: value.source)
        for _, parts in groupby(ordered, key=lambda value: value.source):
            for value, start, data in weights.pieces(sorted(parts, key=lambda value: offsets[value.name])):
                file.seek(offsets[value.name] + start)
                file.write(data)


def _place(model: Model, start: int) -> None:
    for number, value in model.stored.items():
        buffer = model.root.buffers[number]
        buffer.offset, buffer.size = start, value.size_bytes
        start = _aligned(start + value.size_bytes)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _serialized(root: Any) -> bytes:
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(root.Pack(builder), file_identifier=FILE_IDENTIFIER)
    return bytes(builder.Output())
