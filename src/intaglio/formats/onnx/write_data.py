"""Contents of ONNX graphs: tensors of a packed model, and files beside a graph for them, a few rows at a time.

Transformers.js asks for NAME_data, NAME_data_1 and so on. A browser reads each of these files into one
buffer, which may have two gigabytes, so that a new file begins before it gets larger.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from intaglio.formats.onnx.layout import Matrix
from intaglio.formats.onnx.write_trace import OPSET
from intaglio.numerics.grid import Quantized
from intaglio.packed.codes import pack_codes
from intaglio.packed.model import PackedModel

KERNELS = "com.microsoft"
IR_VERSION = 10

LARGEST_BYTES = 2**31 - 2**20
ALIGNMENT = 64  # bytes, so that a runtime can use the data where they are mapped
INLINE_BYTES = 1024  # smaller tensors stay in the graph's own file


class DataFiles:
    """External data of the graph `folder/name`. As a context manager it closes its files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.count = 0
        self.file: BinaryIO | None = None

    def add(self, name: str, dtype: Any, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> Any:
        """A TensorProto of that name whose content is `pieces`, in order; they are written as they come."""
        from onnx import TensorProto, helper

        dtype = np.dtype(dtype)
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(dtype), dims=shape)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if size < INLINE_BYTES:
            tensor.raw_data = b"".join(_bytes(piece, dtype) for piece in pieces)
            written = len(tensor.raw_data)
        else:
            file, offset = self._place_for(size)
            written = sum(file.write(_bytes(piece, dtype)) for piece in pieces)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", self._location()), ("offset", offset), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))
        if written != size:
            raise ValueError(f"{name}: {written} bytes, announced {size}")
        return tensor

    def add_array(self, name: str, array: np.ndarray) -> Any:
        """`add` for a tensor in one piece."""
        return self.add(name, array.dtype, array.shape, [array])

    def _location(self) -> str:
        return f"{self.name}_data" + (f"_{self.count - 1}" if self.count > 1 else "")

    def _place_for(self, size: int) -> tuple[BinaryIO, int]:
        if self.file is None or (self.file.tell() and self.file.tell() + ALIGNMENT + size > LARGEST_BYTES):
            self.close()
            self.count += 1
            self.file = open(self.folder / self._location(), "wb")  # noqa: SIM115 - closed with the others
        self.file.write(bytes(-self.file.tell() % ALIGNMENT))
        return self.file, self.file.tell()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def __enter__(self) -> DataFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _bytes(array: np.ndarray, dtype: np.dtype) -> bytes:
    if array.dtype != dtype:
        raise ValueError(f"{array.dtype}, announced {dtype}")
    return np.ascontiguousarray(array).tobytes()


def opsets() -> list[Any]:
    """Shared definitions of the nodes of both graphs."""
    from onnx import helper

    return [helper.make_opsetid("", OPSET), helper.make_opsetid(KERNELS, 1)]


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
