"""Block layouts against golden bytes that ggml's C code made, and against that code itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers.integrations import gemma_quant

from intaglio.numerics import layout
from intaglio.numerics.fit_stock import fit_stock
from intaglio.numerics.grid import GGUF_GRIDS, INT2, INT4, INT8, Q4_0_FREE, Q6_K_FREE, Q8_0_FREE, BlockGrid, Quantized
from intaglio.numerics.layout import CHUNK_ELEMENTS, from_blocks, row_chunks, to_blocks
from intaglio.packed.codes import pack_codes, unpack_codes
from tests.support import ggml

GRIDS = [free for _, free in GGUF_GRIDS.values()]
GOLDEN = np.load(Path(__file__).parents[1] / "golden/ggml.npz")
KINDS = sorted({key.split("/")[0] for key in GOLDEN})

each_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.ggml_type)
each_kind = pytest.mark.parametrize("kind", KINDS)


def bits(x: torch.Tensor | np.ndarray, ggml_type: str | None = None) -> np.ndarray:
    """Bits of float32 values. Zeros of Q2_0, whose codes and scales are mirrored, may have either sign."""
    values = np.ascontiguousarray(x)
    return (values + np.float32(0) if ggml_type == "Q2_0" else values).view(np.int32)


@each_grid
@each_kind
def test_stock_fit_gives_the_golden_bytes(grid: BlockGrid, kind: str) -> None:
    fitted = fit_stock(torch.from_numpy(GOLDEN[f"{kind}/values"]), grid)
    assert np.array_equal(to_blocks(fitted), GOLDEN[f"{kind}/{grid.ggml_type}/blocks"])


@each_grid
@each_kind
def test_golden_bytes_decode_to_the_golden_values(grid: BlockGrid, kind: str) -> None:
    decoded = from_blocks(grid, GOLDEN[f"{kind}/{grid.ggml_type}/blocks"]).decode()
    expected = GOLDEN[f"{kind}/{grid.ggml_type}/values"]
    assert np.array_equal(bits(decoded, grid.ggml_type), bits(expected, grid.ggml_type))


@each_kind
def test_the_golden_bytes_are_still_what_ggml_makes(kind: str) -> None:
    values = GOLDEN[f"{kind}/values"]
    for name in ggml.TYPES:
        blocks = ggml.quantize(values, name)
        assert np.array_equal(blocks, GOLDEN[f"{kind}/{name}/blocks"])
        assert np.array_equal(bits(ggml.dequantize(blocks, name)), bits(GOLDEN[f"{kind}/{name}/values"]))


@st.composite
def any_blocks(draw: st.DrawFn, grid: BlockGrid) -> np.ndarray:
    """Two rows of three blocks of any bytes, except for scales that are NaN or Inf."""
    blocks = draw(hnp.arrays(np.uint8, (2, 3, grid.bytes_per_block)))
    at = 208 if grid.super_block else 0
    exponent_is_full = (blocks[..., at + 1] & 0x7C) == 0x7C
    blocks[..., at + 1][exponent_is_full] &= 0x83
    return blocks.reshape(2, -1)


@each_grid
@given(data=st.data())
def test_any_bytes_come_back(grid: BlockGrid, data: st.DataObject) -> None:
    blocks = data.draw(any_blocks(grid))
    assert np.array_equal(to_blocks(from_blocks(grid, blocks)), blocks)


@each_grid
@given(data=st.data())
def test_any_bytes_are_read_as_ggml_reads_them(grid: BlockGrid, data: st.DataObject) -> None:
    blocks = data.draw(any_blocks(grid))
    ours, theirs = from_blocks(grid, blocks).decode(), ggml.dequantize(blocks, grid.ggml_type)
    assert np.array_equal(bits(ours, grid.ggml_type), bits(theirs, grid.ggml_type))


def test_q4_0_by_hand() -> None:
    codes = (torch.arange(32) % 16 - 8).to(torch.int8).unsqueeze(0)
    block = to_blocks(Quantized(Q4_0_FREE, codes, torch.tensor([[-0.5]], dtype=torch.float16)))
    # -0.5 is 0xB800; code j and code j + 16 share byte j, each raised by 8
    assert block.tolist() == [[0x00, 0xB8, *[j | j << 4 for j in range(16)]]]


def test_q2_0_by_hand() -> None:
    codes = torch.tensor([[-2, -1, 0, 1] * 16], dtype=torch.int8)
    block = to_blocks(Quantized(GGUF_GRIDS["Q2_0"][1], codes, torch.tensor([[0.5]], dtype=torch.float16)))
    # ggml has 2, 1, 0, -1 times -0.5 (0xB800); each raised by 1, the first code in the lowest bits
    assert block.tolist() == [[0x00, 0xB8, *[0b00_01_10_11] * 16]]
    assert ggml.dequantize(block, "Q2_0")[0, :4].tolist() == [-1.0, -0.5, 0.0, 0.5]


def by_transformers(packed: torch.Tensor, grid: BlockGrid, columns: int) -> torch.Tensor:
    """Take bytes apart as the official reader of the mobile format does."""
    unpack = {2: gemma_quant._unpack_int2, 4: gemma_quant._unpack_int4}.get(grid.code_bits)
    return packed if unpack is None else unpack(packed, columns)


@pytest.mark.parametrize("grid", [INT2, INT4, INT8, Q4_0_FREE, Q6_K_FREE], ids=lambda grid: grid.name)
@given(data=st.data())
def test_packed_codes_come_back_here_and_in_transformers(grid: BlockGrid, data: st.DataObject) -> None:
    codes = data.draw(hnp.arrays(np.int8, (3, 8), elements=st.integers(grid.code_min, grid.code_max)))
    packed = pack_codes(torch.from_numpy(codes), grid)
    assert packed.shape == (3, 8 * grid.code_bits // 8 if grid.code_bits in (2, 4) else 8)
    assert torch.equal(unpack_codes(packed, grid), torch.from_numpy(codes))
    assert torch.equal(by_transformers(packed, grid, 8), torch.from_numpy(codes))


def test_two_bits_by_hand() -> None:
    codes = torch.tensor([[-2, -1, 0, 1, 1, 0, -1, -2]], dtype=torch.int8)
    assert pack_codes(codes, INT2).tolist() == [[0b11100100, 0b00011011]]


@pytest.mark.parametrize("rows", [1, 4, 9])
@each_grid
def test_row_chunks_cover_every_row_once(grid: BlockGrid, rows: int) -> None:
    columns = CHUNK_ELEMENTS // 4
    codes = torch.arange(rows, dtype=torch.int8).unsqueeze(-1).expand(rows, columns)
    super_scale = torch.ones(rows, columns // 256, dtype=torch.float16) if grid.super_block else None
    whole = Quantized(grid, codes, torch.ones(rows, columns // grid.block_size, dtype=torch.float16), super_scale)
    parts = list(row_chunks(whole))
    assert torch.equal(torch.cat([part.codes for _, part in parts]), codes)
    assert all(torch.equal(part.codes, codes[at]) and len(part.scale) == len(part.codes) for at, part in parts)
    assert len(parts) == -(-rows // 4)


def test_chunks_come_in_their_order_however_many_threads_make_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 64)
    values = torch.randn(41, 64, generator=torch.Generator().manual_seed(0))
    quantized = fit_stock(values, Q8_0_FREE)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        parts = list(layout.map_chunks(lambda rows, part: (rows, to_blocks(part)), quantized))
        assert [rows.start for rows, _ in parts] == list(range(41))
        assert np.array_equal(np.concatenate([blocks for _, blocks in parts]), to_blocks(quantized))

    def fail(rows: slice, part: Quantized) -> None:
        raise ValueError(f"row {rows.start}")

    with pytest.raises(ValueError, match="row 0"):
        list(layout.map_chunks(fail, quantized))
