"""Float32 numbers rounded to narrower types, and the limits of these types."""

from __future__ import annotations

import torch
from torch import Tensor

BFLOAT16_SIGNIFICANT_BITS = 8
HALF_SIGNIFICANT_BITS = 11
HALF_SMALLEST = 2.0**-24  # the smallest subnormal, and the distance between subnormals
HALF_LARGEST = 65504.0
HALF_LARGEST_STEP = 2.0**15  # a float16 that keeps any number of significant bits
# Adding and subtracting this float32 rounds a value below 2^-14 to a multiple of 2^-24, which is
# the spacing of float16 subnormals: float32 numbers in [0.5, 1) lie 2^-24 apart.
HALF_SUBNORMAL_MAGIC = 0.75
FLOAT_SIGNIFICANT_BITS = 24
FLOAT_SMALLEST = 2.0**-126  # the smallest normal float32: runtimes may flush what is below to zero
CHANNEL_STEP_LARGEST = 2.0**120  # times any code of eight bits it is still finite


def divide(x: Tensor, number: float) -> Tensor:
    """x / number, correctly rounded on every device; any shape, same dtype out.

    PyTorch's CUDA kernels multiply by the reciprocal of a Python number, which differs in the last bit. They divide by
    a tensor as IEEE 754 says.
    """
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


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


def power_of_two_below(x: Tensor) -> Tensor:
    """Largest power of two <= |x|, float32; 0 for 0."""
    return (x.abs().view(torch.int32) & 0x7F800000).view(torch.float32)


def is_normal_positive(scales: Tensor) -> Tensor:
    """True for float32 scales that a runtime can divide by: neither zero, subnormal, negative, infinite nor NaN."""
    return (scales >= FLOAT_SMALLEST) & torch.isfinite(scales)
