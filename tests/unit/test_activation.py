"""Static int8: transformers' own arithmetic, and scales close to the best there is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.gemma_quant import apply_srq

from intaglio.errors import WeightError
from intaglio.numerics.activation import encode, fake_quantize, round_scale
from intaglio.numerics.fit_static import BINS, fit_static_scale, magnitude_counts


def error_of(x: torch.Tensor, scale: float) -> float:
    return float((fake_quantize(x, torch.tensor(scale)) - x).square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 10_000), log_scale=st.floats(-8, 3))
def test_the_forward_is_that_of_transformers(dtype: torch.dtype, seed: int, log_scale: float) -> None:
    x = (torch.randn(257, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype)
    scale = round_scale(torch.tensor(math.exp(log_scale)))
    assert torch.equal(fake_quantize(x, scale), apply_srq(x, scale))
    assert torch.equal(encode(x, scale).to(dtype) * scale.to(dtype), apply_srq(x, scale))


def test_ties_and_clipping_are_those_of_transformers() -> None:
    scale = torch.tensor(0.5)
    x = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, 63.5, 63.74, 63.75, 64.0, -64.0, -64.25, -70.0, 0.0, -0.0])
    assert torch.equal(fake_quantize(x, scale), apply_srq(x, scale))


def test_a_stored_scale_is_the_same_in_bfloat16() -> None:
    scale = round_scale(torch.rand(1000) + 1e-3)
    assert torch.equal(scale.bfloat16().float(), scale)


@pytest.mark.parametrize("shape", ["normal", "laplace", "outliers", "one value"])
def test_the_fit_is_close_to_the_best_scale(shape: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50_000, generator=generator)
    if shape == "laplace":
        x = x.abs().log() * torch.randn(50_000, generator=generator).sign()
    if shape == "outliers":
        x[:20] *= 300
    if shape == "one value":
        x = torch.full((100,), 0.7)
    found = fit_static_scale(magnitude_counts(x), "x")
    best = min(error_of(x, float(s)) for s in round_scale(x.abs().max() / 127 * 2 ** torch.linspace(-9, 0.1, 2000)))
    assert error_of(x, found) <= 1.05 * best + 1e-4 * float(x.square().mean())


def test_a_gaussian_of_unit_variance_gets_the_known_scale() -> None:
    """A value of 127 codes times the optimal clip of an 8-bit uniform quantizer, about 3.9 sigma."""
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(2))
    assert fit_static_scale(magnitude_counts(x), "x") == pytest.approx(0.031, rel=0.06)


def test_histograms_add_up() -> None:
    x = torch.randn(1000)
    parts = sum((magnitude_counts(part) for part in x.split(137)), torch.zeros(BINS, dtype=torch.float64))
    assert torch.equal(parts, magnitude_counts(x))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(10), "only zeros"),
        (torch.zeros(0), "has seen nothing"),
        (torch.tensor([1.0, math.nan]), "NaN or Inf"),
        (torch.tensor([1.0, -math.inf]), "NaN or Inf"),
    ],
)
def test_a_scale_that_cannot_be_known_is_refused(values: torch.Tensor, message: str) -> None:
    with pytest.raises(WeightError, match=f"layer 3 input.*{message}"):
        fit_static_scale(magnitude_counts(values), "layer 3 input")
