"""First static scales: the one of least squared error for a histogram of magnitudes.

A histogram can be filled batch by batch and summed over processes, and never holds an activation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intaglio.errors import WeightError
from intaglio.numerics.activation import CODE_MAX, fake_quantize, round_scale

# A bin holds the float32 magnitudes that agree in the exponent and in five bits behind it.
DROPPED_BITS = 18
BINS = 1 << (31 - DROPPED_BITS)
INFINITE = 0xFF << (23 - DROPPED_BITS)  # the first bin of Inf and NaN
POINTS_PER_BIN = 4  # where the error within a bin is taken
# Scales tried: from the one that clips nothing down to one that keeps a 256th of the range.
OCTAVES, CANDIDATES_PER_OCTAVE = 8, 12


def magnitude_counts(x: Tensor) -> Tensor:
    """Histogram of |x|, float64 [BINS]: float64 so that many batches and processes can be added up."""
    pattern = x.detach().float().contiguous().view(torch.int32) & 0x7FFFFFFF
    counts = torch.bincount((pattern >> DROPPED_BITS).flatten(), minlength=BINS)
    return counts.double()


def _magnitudes(bins: Tensor) -> Tensor:
    """Magnitudes spread evenly over each of these bins, float32 [bins, POINTS_PER_BIN]."""
    width = 1 << DROPPED_BITS
    offsets = (
        torch.arange(POINTS_PER_BIN, device=bins.device) * (width // POINTS_PER_BIN) + width // POINTS_PER_BIN // 2
    )
    pattern = (bins.unsqueeze(-1) << DROPPED_BITS) + offsets
    return pattern.to(torch.int32).view(torch.float32)


def fit_static_scale(counts: Tensor, name: str) -> float:
    """The scale of least squared error for values with this histogram; WeightError names `name`.

    Raises for values that are not finite, for no values, and for none but zeros: such a scale cannot be known.
    """
    if float(counts[INFINITE:].sum()) > 0:
        raise WeightError(f"{name}: its values are NaN or Inf on the calibration data: check the checkpoint")
    used = counts.nonzero().flatten()
    if not used.numel() or int(used[-1]) == 0:
        what = "only zeros" if used.numel() else "nothing"
        raise WeightError(f"{name}: has seen {what} of the calibration data: give data that reaches it")
    weights = counts[used].float() / counts.sum().float()
    values = _magnitudes(used)
    candidates = torch.arange(OCTAVES * CANDIDATES_PER_OCTAVE + 1, device=counts.device) / -CANDIDATES_PER_OCTAVE
    scales = round_scale(values[-1, -1] / CODE_MAX * 2.0**candidates)
    errors = [(fake_quantize(values, scale) - values).square().mean(-1).dot(weights) for scale in scales]
    return float(scales[int(torch.stack(errors).argmin())])
