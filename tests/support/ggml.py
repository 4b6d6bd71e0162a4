"""ggml's own C code, by ctypes: the oracle for codes, scales and bytes."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from pathlib import Path

import libggml
import numpy as np

# ggml.h: enum ggml_type; ggml-common.h: columns and bytes of a block
TYPES = {"Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34), "Q6_K": (14, 256, 210), "Q2_0": (42, 64, 18)}


@functools.cache
def library() -> ctypes.CDLL:
    found = sorted(Path(libggml.__file__).parent.glob("lib*/libggml-base.*"))[0]
    # llama-cpp-python brings another version under the same name, and a process loads a name once
    renamed = found.read_bytes().replace(b"libggml-base.so.0\0", b"libggml-test.so.0\0")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"libggml-test{found.suffix}"
        copy.write_bytes(renamed)
        loaded = ctypes.CDLL(str(copy))
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    loaded.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    for name in TYPES:
        getattr(loaded, dequantizer(name)).argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return loaded


class _Init(ctypes.Structure):
    """gguf.h: struct gguf_init_params."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def tensors(path: Path) -> dict[str, tuple[int, np.ndarray]]:
    """Type number and bytes, uint8, of each tensor of a GGUF file, as ggml's own reader finds them."""
    lib = library()
    for name, result in (("init_from_file", "void_p"), ("get_tensor_name", "char_p"), ("get_data_offset", "size_t")):
        getattr(lib, f"gguf_{name}").restype = getattr(ctypes, f"c_{result}")
    for name in ("get_tensor_offset", "get_tensor_size"):
        getattr(lib, f"gguf_{name}").restype = ctypes.c_size_t
    context = ctypes.c_void_p(lib.gguf_init_from_file(str(path).encode(), _Init(True, None)))
    assert context, f"ggml does not read {path}"
    data, base = np.memmap(path, np.uint8, "r"), lib.gguf_get_data_offset(context)
    found = {}
    for i in map(ctypes.c_int64, range(lib.gguf_get_n_tensors(context))):
        start, size = base + lib.gguf_get_tensor_offset(context, i), lib.gguf_get_tensor_size(context, i)
        name = lib.gguf_get_tensor_name(context, i).decode()
        found[name] = (lib.gguf_get_tensor_type(context, i), data[start : start + size])
    lib.gguf_free(context)
    return found


def dequantizer(ggml_type: str) -> str:
    return "dequantize_row_" + ggml_type.replace("Q", "q")


def quantize(values: np.ndarray, ggml_type: str) -> np.ndarray:
    """float32 [R, C] to uint8 [R, bytes of a row], as `llama-quantize` does it."""
    number, columns, size = TYPES[ggml_type]
    values = np.ascontiguousarray(values, dtype=np.float32)
    rows, width = values.shape
    out = np.zeros((rows, width // columns * size), dtype=np.uint8)
    written = library().ggml_quantize_chunk(number, values.ctypes.data, out.ctypes.data, 0, rows, width, None)
    assert written == out.nbytes
    return out


def dequantize(blocks: np.ndarray, ggml_type: str) -> np.ndarray:
    """uint8 [R, bytes of a row] to float32 [R, C], as every CPU kernel of ggml reads it."""
    _, columns, size = TYPES[ggml_type]
    blocks = np.ascontiguousarray(blocks)
    out = np.empty((blocks.shape[0], blocks.shape[1] // size * columns), dtype=np.float32)
    getattr(library(), dequantizer(ggml_type))(blocks.ctypes.data, out.ctypes.data, out.size)
    return out
