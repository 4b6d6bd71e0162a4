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
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from intaglio.errors import RecipeError, WeightError

BFLOAT16_SIGNIFICANT_BITS = 8
HALF_SIGNIFICANT_BITS = 11
HALF_SMALLEST = 2.0**-24  # the smallest subnormal, and the distance between subnormals
HALF_LARGEST = 65504.0
# Adding and subtracting this float32 rounds a value below 2^-14 to a multiple of 2^-24, which is
# the spacing of float16 subnormals: float32 numbers in [0.5, 1) lie 2^-24 apart.
HALF_SUBNORMAL_MAGIC = 0.75


def round_significant(x: Tensor, bits: int) -> Tensor:
    """Round float32 `x` to `bits` significant bits, ties to even; any shape, same dtype out.

    Works on the bit pattern: a round trip through a narrower dtype would say the same, but a
    compiler may fold such a pair of casts away, and the rounding with it.
    """
    dropped = 24 - bits
    pattern = x.view(torch.int32)
    half = (1 << (dropped - 1)) - 1 + ((pattern >> dropped) & 1)
    return ((pattern + half) & -(1 << dropped)).view(torch.float32)


def round_half(x: Tensor, bits: int = HALF_SIGNIFICANT_BITS) -> Tensor:
    """Round float32 `x` to a float16 value with at most `bits` significant bits, as float32."""
    normal = round_significant(x, bits)
    subnormal = (x + HALF_SUBNORMAL_MAGIC) - HALF_SUBNORMAL_MAGIC
    # below this, the spacing of subnormals is wider than that of `bits` significant bits
    return torch.where(x.abs() < HALF_SMALLEST * 2.0 ** (bits - 1), subnormal, normal)


def _cheaply_known_at_least(smallest: float, x: Tensor) -> bool:
    """Whether all magnitudes are known to be `smallest` or more: asked on a CPU only, where an answer costs little."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.numel():
        return False
    return float(x.abs().amin()) >= smallest


@dataclass(frozen=True, kw_only=True)
class BlockGrid:
    """`value = code x step`, one step for `block_size` neighbouring columns of a row.

    name: as recipes write it.
    ggml_type: the GGUF tensor type whose bytes hold this grid.
    code_min, code_max: inclusive range of the integers.
    block_size: columns that share a step.
    step_bits: significant bits of a step; with 11 any float16 is allowed.
    super_block: Q6_K only: columns that share a float16 multiplier. There a step is
        `super_scale x scale`, with an int8 `scale` for each block.
    canonical: the element of largest magnitude has code `code_min`. llama.cpp's quantizer derives
        its scale from just that element, so it finds the same codes and scales again.
    bytes_per_block: size in the file of `super_block or block_size` columns.
    """

    name: str
    ggml_type: str
    code_min: int
    code_max: int
    block_size: int
    step_bits: int
    bytes_per_block: int
    super_block: int | None = None
    canonical: bool = False

    @property
    def portable(self) -> bool:
        """Whether every value is exact in bfloat16."""
        code_bits = max(self.code_max, -self.code_min - 1).bit_length()
        return code_bits + self.step_bits <= BFLOAT16_SIGNIFICANT_BITS

    @property
    def column_multiple(self) -> int:
        return self.super_block or self.block_size

    def size_bytes(self, shape: tuple[int, ...]) -> int:
        elements = torch.Size(shape).numel()
        return elements // self.column_multiple * self.bytes_per_block

    def blocks(self, values_RC: Tensor) -> Tensor:
        """View [..., C] as [..., S, K]."""
        return values_RC.unflatten(-1, (-1, self.block_size))

    def round_step(self, step: Tensor) -> Tensor:
        """Nearest allowed step, float32. Q6_K steps are rounded by their fit, two levels at once.

        A canonical step below 2^-20 becomes zero: with fewer than five bits left above float16's
        smallest subnormal, the extremum could miss `code_min`.
        """
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

    def decode(self, codes_RC: Tensor, step_RS: Tensor) -> Tensor:
        """float32 [R, C]: one multiplication, as in ggml's dequantize_row functions."""
        return (self.blocks(codes_RC).float() * step_RS.float().unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class FloatGrid:
    """Values kept as floats, rounded to what every target stores.

    A norm is float32 in GGUF and bfloat16 in the checkpoint, so it is rounded to bfloat16; an F16
    tensor is rounded to values that float16 and bfloat16 share.
    """

    name: str
    ggml_type: str
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
        return rounded if self.ggml_type == "F32" else round_half(rounded)


Grid = BlockGrid | FloatGrid

Q4_0 = BlockGrid(
    name="q4_0",
    ggml_type="Q4_0",
    code_min=-8,
    code_max=7,
    block_size=32,
    step_bits=5,
    bytes_per_block=18,
    canonical=True,
)
Q4_0_FREE = BlockGrid(
    name="q4_0-free", ggml_type="Q4_0", code_min=-8, code_max=7, block_size=32, step_bits=11, bytes_per_block=18
)
Q8_0 = BlockGrid(
    name="q8_0", ggml_type="Q8_0", code_min=-127, code_max=127, block_size=32, step_bits=1, bytes_per_block=34
)
Q8_0_FREE = BlockGrid(
    name="q8_0-free", ggml_type="Q8_0", code_min=-127, code_max=127, block_size=32, step_bits=11, bytes_per_block=34
)
Q6_K = BlockGrid(
    name="q6_k",
    ggml_type="Q6_K",
    code_min=-32,
    code_max=31,
    block_size=16,
    step_bits=3,
    super_block=256,
    bytes_per_block=210,
)
Q6_K_FREE = BlockGrid(
    name="q6_k-free",
    ggml_type="Q6_K",
    code_min=-32,
    code_max=31,
    block_size=16,
    step_bits=18,
    super_block=256,
    bytes_per_block=210,
)
F16 = FloatGrid(name="f16", ggml_type="F16", bytes_per_value=2)
F32 = FloatGrid(name="f32", ggml_type="F32", bytes_per_value=4)

GRIDS: dict[str, Grid] = {g.name: g for g in (Q4_0, Q4_0_FREE, Q6_K, Q6_K_FREE, Q8_0, Q8_0_FREE, F16, F32)}


def grid_named(name: str) -> Grid:
    """The preset of that name. Raises RecipeError for any other."""
    if name not in GRIDS:
        raise RecipeError(f"unknown grid {name!r}: expected one of {', '.join(sorted(GRIDS))}")
    return GRIDS[name]


@dataclass(frozen=True)
class Quantized:
    """One tensor on a BlockGrid.

    codes: int8 [R, C].
    scale: float16 [R, S]; int8 [R, S] for Q6_K.
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

    def decode(self) -> Tensor:
        """float32 [R, C]."""
        return self.grid.decode(self.codes, self.step)


def from_steps(grid: BlockGrid, codes_RC: Tensor, step_RS: Tensor) -> Quantized:
    """Store codes and float32 steps in the file's scale types; exact, or WeightError."""
    if grid.super_block is None:
        scale = step_RS.to(torch.float16)
        quantized = Quantized(grid, codes_RC, scale)
    else:
        scale, super_scale = split_super_scale(grid, step_RS)
        quantized = Quantized(grid, codes_RC, scale, super_scale)
    if not torch.equal(quantized.step, step_RS):
        bad = (quantized.step != step_RS).sum().item()
        raise WeightError(
            f"{bad} of {step_RS.numel()} steps of grid {grid.name} are not representable in the file: "
            f"largest is {step_RS.abs().max().item():.3g}, float16 ends at {HALF_LARGEST:.0f}"
        )
    return quantized


def split_super_scale(grid: BlockGrid, step_RS: Tensor) -> tuple[Tensor, Tensor]:
    """Split portable Q6_K steps into int8 scales [R, S] and power-of-two float16 [R, C / 256].

    The power of two puts the largest scale of a super-block into 64..127.
    """
    assert grid.super_block is not None
    per_super = grid.super_block // grid.block_size
    largest = step_RS.abs().unflatten(-1, (-1, per_super)).amax(-1)
    super_scale = power_of_two_below(largest) * 2.0**-6
    super_scale = super_scale.clamp_min(2.0**-24)
    scale = step_RS / super_scale.repeat_interleave(per_super, dim=-1)
    return scale.round().clamp(-128, 127).to(torch.int8), super_scale.to(torch.float16)


def power_of_two_below(x: Tensor) -> Tensor:
    """Largest power of two <= |x|, float32; 0 for 0."""
    return (x.abs().view(torch.int32) & 0x7F800000).view(torch.float32)
