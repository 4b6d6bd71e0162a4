"""Grids: the sets of values that a stored tensor may take.

Shape suffixes: R rows, C columns, S scales in a row (C / block_size), K columns under one scale.

A `BlockGrid` value is `code x step`: `codes_RC` are small integers, `step_RS` is the float32
multiplier that the K = block_size columns beside each other share. A `FloatGrid` value is a float
of a narrower type. Both are frozen, and both obey, bit for bit:

    encode(decode(codes, step), step) == codes      (for a step that is not zero)
    decode(...)                       == the arithmetic of the runtime that loads the file

Where "portable" stands, a step keeps so few significant bits that `code x step` fits the 8
significant bits of bfloat16. One set of codes and steps is then exact in GGUF and in a plain
bfloat16 checkpoint.

A channel grid is a BlockGrid of the Gemma mobile format: its block is a whole row, or a slice of one
in the table of per-layer embeddings, and its steps are positive float32 numbers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from intaglio.errors import RecipeError
from intaglio.numerics.rounding import (
    BFLOAT16_SIGNIFICANT_BITS,
    CHANNEL_STEP_LARGEST,
    FLOAT_SIGNIFICANT_BITS,
    FLOAT_SMALLEST,
    HALF_LARGEST_STEP,
    HALF_SMALLEST,
    round_half,
    round_significant,
)

# The scale of a channel whose values are all zero: any normal number serves, and every float format holds this one.
EMPTY_STEP = 1.0
WHOLE_ROW = 0  # as a block size: whatever the width of a row, or of its slices, turns out to be


def _cheaply_known_at_least(smallest: float, x: Tensor) -> bool:
    """Whether all magnitudes are known to be `smallest` or more: asked on a CPU only, where an answer costs little."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.numel():
        return False
    return float(x.abs().amin()) >= smallest


@dataclass(frozen=True, kw_only=True)
class BlockGrid:
    """`value = code x step`, one step for `block_size` neighbouring columns of a row.

    name: as recipes write it.
    ggml_type: the GGUF tensor type whose bytes hold this grid; None if there is none.
    code_min, code_max: inclusive range of the integers.
    block_size: columns that share a step; WHOLE_ROW in a preset, until `for_width` settles it.
    step_bits: significant bits of a step; with 11 any float16 is allowed, with 24 any float32.
    scale_dtype: of the stored scales: float16, int8 (Q6_K) or float32.
    super_block: Q6_K only: columns that share a float16 multiplier. There a step is
        `super_scale x scale`, with an int8 `scale` for each block.
    canonical: the element of largest magnitude has code `code_min`. llama.cpp's quantizer derives
        its scale from just that element, so it finds the same codes and scales again.
    positive: steps are normal positive numbers. Elsewhere they may be negative, or zero.
    """

    name: str
    ggml_type: str | None
    code_min: int
    code_max: int
    block_size: int
    step_bits: int
    scale_dtype: torch.dtype = torch.float16
    super_block: int | None = None
    canonical: bool = False
    positive: bool = False

    def for_width(self, columns: int) -> BlockGrid:
        """This grid with one step for `columns` columns, if it left open for how many."""
        return _for_width(self, columns) if self.block_size == WHOLE_ROW else self

    @property
    def code_bits(self) -> int:
        return (self.code_max - self.code_min).bit_length()

    @property
    def bytes_per_block(self) -> int:
        """Size in the file of `super_block or block_size` columns, scales included."""
        scales = self.column_multiple // self.block_size * self.scale_dtype.itemsize
        multiplier = 0 if self.super_block is None else 2
        return self.column_multiple * self.code_bits // 8 + scales + multiplier

    @property
    def portable(self) -> bool:
        """Whether every value is exact in bfloat16."""
        code_bits = max(self.code_max, -self.code_min - 1).bit_length()
        return code_bits + self.step_bits <= BFLOAT16_SIGNIFICANT_BITS

    @property
    def column_multiple(self) -> int:
        """Rows are as wide as a multiple of this: of blocks, or where their size is open, of bytes."""
        return self.super_block or self.block_size or 8 // self.code_bits

    def size_bytes(self, shape: tuple[int, ...]) -> int:
        elements = torch.Size(shape).numel()
        return elements // self.column_multiple * self.bytes_per_block

    def blocks(self, values_RC: Tensor) -> Tensor:
        """View [..., C] as [..., S, K]."""
        blocks: Tensor = values_RC.unflatten(-1, (-1, self.block_size))
        return blocks

    def round_step(self, step: Tensor) -> Tensor:
        """Nearest allowed step, float32. Q6_K steps are rounded by their fit, two levels at once.

        A canonical step below 2^-20 becomes zero: with fewer than five bits left above float16's
        smallest subnormal, the extremum could miss `code_min`. A positive step is a float32 number
        that is normal and stays finite times a code.
        """
        if self.positive:
            rounded = step if self.step_bits == FLOAT_SIGNIFICANT_BITS else round_significant(step, self.step_bits)
            if self.scale_dtype == torch.float16:
                return rounded.clamp(HALF_SMALLEST * 2.0 ** (self.step_bits - 1), HALF_LARGEST_STEP)
            return rounded.clamp(FLOAT_SMALLEST, CHANNEL_STEP_LARGEST)
        subnormal_below = HALF_SMALLEST * 2.0 ** (self.step_bits - 1)
        if _cheaply_known_at_least(subnormal_below, step):
            return round_significant(step, self.step_bits)
        rounded = round_half(step, self.step_bits)
        if self.canonical:
            rounded = torch.where(rounded.abs() < 2.0**-20, torch.zeros_like(rounded), rounded)
        return rounded

    def encode(self, values_RC: Tensor, step_RS: Tensor) -> Tensor:
        """Nearest codes, int8 [R, C], ties to even. A step of zero gives code 0."""
        return self.encode_float(values_RC, step_RS).to(torch.int8)

    def encode_float(self, values_RC: Tensor, step_RS: Tensor) -> Tensor:
        """`encode` before the conversion to int8: float32 [R, C]."""
        step = step_RS.unsqueeze(-1)
        divisor = torch.where(step == 0, torch.ones_like(step), step)
        codes = (self.blocks(values_RC).float() / divisor).round().clamp(self.code_min, self.code_max)
        return torch.where(step == 0, torch.zeros_like(codes), codes).flatten(-2)

    def decode(self, codes_RC: Tensor, step_RS: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values [R, C] in `dtype`, as the runtime computes them: see `product`."""
        return self.product(self.blocks(codes_RC), step_RS, dtype).flatten(-2)

    def product(self, codes_SK: Tensor, step_S: Tensor, dtype: torch.dtype) -> Tensor:
        """code x step, [..., S, K] in `dtype`: one multiplication.

        In float32, as in ggml's dequantize_row functions, and rounded after. Of channel grids the step is rounded to
        `dtype` first, as in transformers' QuantizedLinear, which multiplies in `dtype`: float32 holds that product
        exactly, so rounding it gives the same bits.
        """
        step = step_S.to(dtype).float() if self.positive else step_S.float()
        if self.positive and dtype == torch.bfloat16:  # a compiler may leave out a cast
            step = round_significant(step_S.float(), BFLOAT16_SIGNIFICANT_BITS)
        return (codes_SK.float() * step.unsqueeze(-1)).to(dtype)

    def codes_of(self, decoded_RC: Tensor, step_RS: Tensor) -> Tensor:
        """The codes, int8 [R, C], that `decode` gave these values in their dtype."""
        step = step_RS.to(decoded_RC.dtype) if self.positive else step_RS
        return self.encode(decoded_RC, step.float())


@dataclass(frozen=True, kw_only=True)
class FloatGrid:
    """Values kept as floats, rounded to what every target stores.

    A norm is float32 in GGUF and bfloat16 in the checkpoint, so it is rounded to bfloat16; an F16
    tensor is rounded to values that float16 and bfloat16 share. ggml_type None: not for GGUF.
    """

    name: str
    ggml_type: str | None
    bytes_per_value: int

    @property
    def portable(self) -> bool:
        return True

    @property
    def column_multiple(self) -> int:
        return 1

    def size_bytes(self, shape: tuple[int, ...]) -> int:
        return torch.Size(shape).numel() * self.bytes_per_value

    def round(self, values: Tensor) -> Tensor:
        """float32, same shape, on the grid."""
        rounded = round_significant(values.float(), BFLOAT16_SIGNIFICANT_BITS)
        return round_half(rounded) if self.ggml_type == "F16" else rounded


@dataclass(frozen=True, kw_only=True)
class IndexGrid(FloatGrid):
    """Integers that number tokens. They are no weights: kept as they are."""

    def round(self, values: Tensor) -> Tensor:
        return values


Grid = BlockGrid | FloatGrid

Q4_0 = BlockGrid(name="q4_0", ggml_type="Q4_0", code_min=-8, code_max=7, block_size=32, step_bits=5, canonical=True)
Q4_0_FREE = BlockGrid(name="q4_0-free", ggml_type="Q4_0", code_min=-8, code_max=7, block_size=32, step_bits=11)
# For LiteRT, whose blocks of 32 have positive scales, and computes with them in bfloat16.
Q4_0_POSITIVE = replace(Q4_0_FREE, name="q4_0-positive", step_bits=5, positive=True)
Q8_0 = BlockGrid(name="q8_0", ggml_type="Q8_0", code_min=-127, code_max=127, block_size=32, step_bits=1)
Q8_0_FREE = replace(Q8_0, name="q8_0-free", step_bits=11)
Q6_K = BlockGrid(
    name="q6_k", ggml_type="Q6_K", code_min=-32, code_max=31, block_size=16, step_bits=3, scale_dtype=torch.int8,
    super_block=256,
)  # fmt: skip
Q6_K_FREE = replace(Q6_K, name="q6_k-free", step_bits=18)
# In the file codes and scale have the other sign: ggml's are -1..2 (see `layout`).
Q2_0 = BlockGrid(name="q2_0", ggml_type="Q2_0", code_min=-2, code_max=1, block_size=64, step_bits=7)
Q2_0_FREE = replace(Q2_0, name="q2_0-free", step_bits=11)
# The ranges of the Gemma mobile format; its reader is transformers' integrations/gemma_quant.py.
INT2 = BlockGrid(
    name="int2", ggml_type=None, code_min=-2, code_max=1, block_size=WHOLE_ROW, step_bits=FLOAT_SIGNIFICANT_BITS,
    scale_dtype=torch.float32, positive=True,
)  # fmt: skip
INT4 = replace(INT2, name="int4", code_min=-8, code_max=7)
INT8 = replace(INT2, name="int8", code_min=-127, code_max=127)
# The same with scales that are exact in bfloat16, where vLLM keeps them.
INT2_BF16, INT4_BF16, INT8_BF16 = (
    replace(grid, name=f"{grid.name}-bf16", step_bits=BFLOAT16_SIGNIFICANT_BITS) for grid in (INT2, INT4, INT8)
)
F16 = FloatGrid(name="f16", ggml_type="F16", bytes_per_value=2)
F32 = FloatGrid(name="f32", ggml_type="F32", bytes_per_value=4)
BF16 = FloatGrid(name="bf16", ggml_type=None, bytes_per_value=2)
I64 = IndexGrid(name="i64", ggml_type=None, bytes_per_value=8)

GRIDS: dict[str, Grid] = {
    g.name: g
    for g in (
        *(Q4_0, Q4_0_FREE, Q4_0_POSITIVE, Q6_K, Q6_K_FREE, Q8_0, Q8_0_FREE, Q2_0, Q2_0_FREE),
        *(INT2, INT4, INT8, INT2_BF16, INT4_BF16, INT8_BF16),
        *(F16, F32, BF16, I64),
    )
}
# Grids by tensor type of GGUF: the portable grid, and the one of all scales that the type can hold.
GGUF_GRIDS: dict[str, tuple[BlockGrid, BlockGrid]] = {
    str(free.ggml_type): (portable, free)
    for portable, free in ((Q4_0, Q4_0_FREE), (Q6_K, Q6_K_FREE), (Q8_0, Q8_0_FREE), (Q2_0, Q2_0_FREE))
}


@functools.cache
def _for_width(grid: BlockGrid, columns: int) -> BlockGrid:
    return replace(grid, block_size=columns)


def grid_named(name: str) -> Grid:
    """The preset of that name. Raises RecipeError for any other."""
    if name not in GRIDS:
        raise RecipeError(f"unknown grid {name!r}: expected one of {', '.join(sorted(GRIDS))}")
    return GRIDS[name]


@dataclass(frozen=True)
class Quantized:
    """One tensor on a BlockGrid.

    codes: int8 [R, C], or [E, R, C] for the weights of E experts, and so on.
    scale: [R, S] in the grid's scale_dtype: float16, int8 for Q6_K, float32 for channel grids.
    super_scale: None; float16 [R, C / 256] for Q6_K.
    """

    grid: BlockGrid
    codes: Tensor
    scale: Tensor
    super_scale: Tensor | None = None

    @property
    def step(self) -> Tensor:
        """float32 [R, S]. Exact: float16 times int8 needs 18 of float32's 24 bits."""
        if self.super_scale is None:
            return self.scale.float()
        per_super = self.grid.super_block // self.grid.block_size  # type: ignore[operator]
        return self.super_scale.float().repeat_interleave(per_super, dim=-1) * self.scale.float()

    def rows(self) -> Quantized:
        """The same as a matrix: experts below one another."""
        return self.with_lead((self.codes.shape[:-1].numel(),))

    def with_lead(self, lead: tuple[int, ...]) -> Quantized:
        """The same with other dimensions in front of the columns."""
        parts = (self.codes, self.scale, self.super_scale)
        return Quantized(self.grid, *(None if p is None else p.reshape(*lead, p.shape[-1]) for p in parts))  # type: ignore[arg-type]

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[R, C] in `dtype`, as the runtime computes it."""
        return self.grid.decode(self.codes, self.step, dtype)
