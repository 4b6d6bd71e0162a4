"""Tensors of a packed model as LiteRT stores them: their types and scales, and their bytes a few rows at a time.

Codes of two and four bits lie in LiteRT from the lowest bits of a byte on, as in a packed model, but as two's
complement and not less their minimum. Both differ in the highest bit of each code only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from ai_edge_litert.schema_py_generated import TensorType

from intaglio.formats.litert.converter.graph import Stored
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.packed.codes import pack_codes
from intaglio.packed.model import PackedModel
from intaglio.packed.store import bytes_of
from intaglio.plan.plan import HEAD

CODE_TYPES = {2: TensorType.INT2, 4: TensorType.INT4, 8: TensorType.INT8}
HIGHEST_BITS = {2: 0b10101010, 4: 0b10001000, 8: 0}  # of the codes in a byte


class Weights:
    """The tensors of a packed model by the names that they have in LiteRT."""

    def __init__(self, packed: PackedModel):
        self.packed = packed
        self.embedding = packed.plan.embedding.name

    def stored(self, name: str) -> Stored:
        """A tensor as a whole. The head of a model that ties it has the codes of the embedding."""
        source = self.embedding if name == HEAD and self.packed.plan.model.tied_head else name
        tensor = self.packed.plan[source]
        shape, grid = tensor.spec.shape, tensor.grid
        if not isinstance(grid, BlockGrid):
            size = int(np.prod(shape)) * 4
            return Stored(name, source, shape, TensorType.FLOAT32, None, size)
        scale = self._scales(source)
        if grid.block_size == shape[1] and grid.ggml_type is None:
            scale = scale[:, 0]
        size = shape[0] * shape[1] * grid.code_bits // 8
        return Stored(name, source, shape, CODE_TYPES[grid.code_bits], scale, size)

    def slices(self, name: str) -> list[Stored]:
        """The table of per-layer embeddings as one table for each layer, called NAME.LAYER."""
        tensor = self.packed.plan[name]
        (rows, columns), width, grid = tensor.spec.shape, tensor.spec.slice_columns, tensor.grid
        assert width is not None
        layers = columns // width
        if not isinstance(grid, BlockGrid):
            size = rows * width * 4
            shape = (rows, width)
            return [Stored(f"{name}.{i}", name, shape, TensorType.FLOAT32, None, size) for i in range(layers)]
        scale_RL = np.ascontiguousarray(np.broadcast_to(self._scales(name), (rows, layers)).T)
        kind, size = CODE_TYPES[grid.code_bits], rows * width * grid.code_bits // 8
        return [Stored(f"{name}.{i}", name, (rows, width), kind, scale_RL[i], size) for i in range(layers)]

    def _scales(self, source: str) -> np.ndarray:
        """[rows, blocks of a row], in the dtype they are packed in."""
        values = (value for _, value in self.packed.chunks(source))
        return np.concatenate([value.scale.numpy() for value in values if isinstance(value, Quantized)])

    def pieces(self, stored: list[Stored]) -> Iterator[tuple[Stored, int, memoryview]]:
        """The bytes of tensors that share a source, with their place in the tensor's data; the source is read once."""
        width = stored[0].shape[-1]
        for rows, value in self.packed.chunks(stored[0].source):
            first = 0 if rows is None else rows.start
            for number, part in enumerate(stored):
                columns = slice(None) if len(stored) == 1 else slice(number * width, (number + 1) * width)
                if isinstance(value, Quantized):
                    packed = pack_codes(value.codes[:, columns].contiguous(), value.grid)
                    data = packed.numpy().view(np.uint8) ^ np.uint8(HIGHEST_BITS[value.grid.code_bits])
                    piece = np.ascontiguousarray(data).data.cast("B")
                else:
                    piece = bytes_of(value.float() if value.ndim < 2 else value[:, columns].float())
                yield part, first * (part.size_bytes // part.shape[0] if part.shape else 0), piece
