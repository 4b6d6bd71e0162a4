"""Static int8: a tensor of activations, keys or values on `scale x {-128..127}`, one scale for all tokens.

The arithmetic is that of transformers' `apply_srq` (integrations/gemma_quant.py), in the tensor's own
dtype. Scales keep eight significant bits, so that they are the same in bfloat16 and in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intaglio.numerics.rounding import BFLOAT16_SIGNIFICANT_BITS, round_significant

CODE_MIN, CODE_MAX = -128, 127
SMALLEST_LOG_SCALE, LARGEST_LOG_SCALE = -80.0, 80.0  # normal float32 numbers, and times a code too


def round_scale(scale: Tensor) -> Tensor:
    """float32 scales as they are stored: eight significant bits."""
    return round_significant(scale.float(), BFLOAT16_SIGNIFICANT_BITS)


def position(x: Tensor, scale: Tensor) -> Tensor:
    """The position of x between the codes, in x's dtype."""
    return x / scale.to(x.dtype)


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """x on the grid, in its dtype. scale: float32, no dimensions, as `round_scale` leaves it.

    The product is not taken in place: torch.compile of torch 2.11 gives an autograd function no gradient, without a
    word, if its result is a tensor that was changed in place.
    """
    return position(x, scale).round_().clamp_(CODE_MIN, CODE_MAX) * scale.to(x.dtype)


def encode(x: Tensor, scale: Tensor) -> Tensor:
    """int8 codes, which `fake_quantize` multiplies by the scale."""
    return position(x, scale).round_().clamp_(CODE_MIN, CODE_MAX).to(torch.int8)
