"""Byte layouts of GGUF blocks: codes and scales in, bytes out, and back. Nothing is re-derived.

R rows, C columns; what is said of rows holds for [E, R, C], the weights of experts, where R is counted through.
Source of the layouts: ggml-common.h (block_q4_0, block_q8_0, block_q6_K, block_q2_0) and ggml-quants.c.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from intaglio.numerics.grid import BlockGrid, Quantized

CHUNK_ELEMENTS = 1 << 20  # rows are handled in chunks of about this size, for their temporaries
PAIR_SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8)  # of the four bit pairs of a byte
Result = TypeVar("Result")


def row_chunks(quantized: Quantized) -> Iterator[tuple[slice, Quantized]]:
    """The tensor a few rows, or experts, at a time, with their numbers; views, no copies."""
    shape = quantized.codes.shape
    step = max(1, CHUNK_ELEMENTS // shape[1:].numel())
    for start in range(0, shape[0], step):
        at = slice(start, start + step)
        super_scale = None if quantized.super_scale is None else quantized.super_scale[at]
        yield at, Quantized(quantized.grid, quantized.codes[at], quantized.scale[at], super_scale)


def map_chunks(function: Callable[[slice, Quantized], Result], quantized: Quantized) -> Iterator[Result]:
    """Results of `function` for each of the `row_chunks`, in their order, several computed at a time.

    NumPy computes in one thread and lets others run meanwhile, so there is a thread for each that torch may use.
    """
    threads = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for rows, part in row_chunks(quantized):
            waiting.append(pool.submit(function, rows, part))
            if len(waiting) > 2 * threads:  # results take memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def to_blocks(quantized: Quantized) -> np.ndarray:
    """uint8 [..., R, bytes of a row], as ggml stores the tensor."""
    lead = quantized.codes.shape[:-1]
    quantized = quantized.rows()
    pack, _ = LAYOUTS[str(quantized.grid.ggml_type)]
    blocks = pack(quantized)
    return blocks.reshape(*lead, -1)


def from_blocks(grid: BlockGrid, data: np.ndarray) -> Quantized:
    """Read uint8 [..., R, bytes of a row] back into codes and scales."""
    _, unpack = LAYOUTS[str(grid.ggml_type)]
    rows = unpack(grid, data.reshape(np.prod(data.shape[:-1], dtype=int), -1, grid.bytes_per_block))
    return rows.with_lead(data.shape[:-1])


def _blocks_of(codes: Tensor, width: int) -> np.ndarray:
    return codes.cpu().numpy().reshape(codes.shape[0], -1, width)


def _bytes_of(scale: Tensor) -> np.ndarray:
    """Little-endian bytes of each scale: [R, S, itemsize]."""
    array = np.ascontiguousarray(scale.cpu().numpy())
    return array[..., None].view(np.uint8)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _pack_q4_0(q: Quantized) -> np.ndarray:
    # byte j holds code j in its low and code j + 16 in its high nibble
    codes = (_blocks_of(q.codes, 32) + 8).astype(np.uint8)
    return np.concatenate([_bytes_of(q.scale), codes[..., :16] | (codes[..., 16:] << 4)], axis=-1)


def _unpack_q4_0(grid: BlockGrid, data: np.ndarray) -> Quantized:
    scale = data[..., :2].copy().view(np.float16)[..., 0]
    codes = np.concatenate([data[..., 2:] & 15, data[..., 2:] >> 4], axis=-1).astype(np.int8) - 8
    return Quantized(grid, _tensor(codes.reshape(len(data), -1)), _tensor(scale))


def _pack_q8_0(q: Quantized) -> np.ndarray:
    return np.concatenate([_bytes_of(q.scale), _blocks_of(q.codes, 32).view(np.uint8)], axis=-1)


def _unpack_q8_0(grid: BlockGrid, data: np.ndarray) -> Quantized:
    scale = data[..., :2].copy().view(np.float16)[..., 0]
    codes = np.ascontiguousarray(data[..., 2:]).view(np.int8)
    return Quantized(grid, _tensor(codes.reshape(len(data), -1)), _tensor(scale))


def _pack_q6_k(q: Quantized) -> np.ndarray:
    # 128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 int8 scales, the float16 multiplier.
    # Each half of 128 columns is four runs of 32: runs 0 and 2 share a low byte, as do 1 and 3.
    assert q.super_scale is not None
    codes = (_blocks_of(q.codes, 256) + 32).astype(np.uint8).reshape(q.codes.shape[0], -1, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    low = np.concatenate([low[..., 0, :] | (low[..., 2, :] << 4), low[..., 1, :] | (low[..., 3, :] << 4)], axis=-1)
    high = high[..., 0, :] | (high[..., 1, :] << 2) | (high[..., 2, :] << 4) | (high[..., 3, :] << 6)
    rows, supers = codes.shape[:2]
    scale = _blocks_of(q.scale, 16).view(np.uint8)
    return np.concatenate(
        [low.reshape(rows, supers, 128), high.reshape(rows, supers, 64), scale, _bytes_of(q.super_scale)], axis=-1
    )


def _unpack_q6_k(grid: BlockGrid, data: np.ndarray) -> Quantized:
    rows, supers = data.shape[:2]
    low = data[..., :128].reshape(rows, supers, 2, 2, 32)
    high = data[..., 128:192].reshape(rows, supers, 2, 1, 32)
    low = np.concatenate([low & 15, low >> 4], axis=-2)  # runs 0, 1, 2, 3
    codes = (low | (((high >> PAIR_SHIFTS.reshape(4, 1)) & 3) << 4)).astype(np.int8) - 32
    scale = np.ascontiguousarray(data[..., 192:208]).view(np.int8)
    super_scale = data[..., 208:].copy().view(np.float16)[..., 0]
    return Quantized(grid, _tensor(codes.reshape(rows, -1)), _tensor(scale.reshape(rows, -1)), _tensor(super_scale))


def _pack_q2_0(q: Quantized) -> np.ndarray:
    # Byte j holds codes 4j to 4j + 3 from its lowest bits on, as ggml's code + 1. ggml's codes are -1..2, so codes and
    # scale change their sign: the products are the same, but for the sign of zeros.
    codes = (1 - _blocks_of(q.codes, 64)).astype(np.uint8)
    packed = codes[..., 0::4] | codes[..., 1::4] << 2 | codes[..., 2::4] << 4 | codes[..., 3::4] << 6
    return np.concatenate([_bytes_of(-q.scale), packed], axis=-1)


def _unpack_q2_0(grid: BlockGrid, data: np.ndarray) -> Quantized:
    scale = data[..., :2].copy().view(np.float16)[..., 0]
    codes = 1 - ((data[..., 2:, None] >> PAIR_SHIFTS) & 3).astype(np.int8)
    return Quantized(grid, _tensor(codes.reshape(len(data), -1)), -_tensor(scale))


# One row a tensor type of GGUF: codes and scales to the bytes of blocks [R, S, bytes_per_block], and back.
LAYOUTS: dict[str, tuple[Callable[[Quantized], np.ndarray], Callable[[BlockGrid, np.ndarray], Quantized]]] = {
    "Q4_0": (_pack_q4_0, _unpack_q4_0),
    "Q8_0": (_pack_q8_0, _unpack_q8_0),
    "Q6_K": (_pack_q6_k, _unpack_q6_k),
    "Q2_0": (_pack_q2_0, _unpack_q2_0),
}
