"""Channel grids: what fits keep of a row, positive scales whatever the row, the official reader's arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear

from intaglio.errors import WeightError
from intaglio.numerics.fit import fit_absmax, fit_mse
from intaglio.numerics.grid import INT2, INT4, INT8, BlockGrid, Quantized, grid_named
from intaglio.numerics.rounding import is_normal_positive
from intaglio.numerics.steps import from_steps
from intaglio.packed.codes import pack_codes
from tests.support.samples import samples
from tests.unit.test_latent import latent_of, pulled

GRIDS = (INT2, INT4, INT8)
SAMPLES = samples()
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
each_fit = pytest.mark.parametrize("fit", [fit_mse, fit_absmax])


def gaussian(rows: int = 64, columns: int = 2048, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def signal_to_noise_db(values: Tensor, decoded: Tensor) -> float:
    """Mean over rows of the signal-to-quantization-noise ratio."""
    ratio = values.square().sum(-1) / (values - decoded).square().sum(-1)
    return float(10 * ratio.log10().mean())


# Figures of other authors for Gaussian rows; absmax falls with the length of the row, whose peak grows.
@pytest.mark.parametrize(
    ("fit", "grid", "expected_db"),
    [(fit_mse, INT2, 8.26), (fit_mse, INT4, 19.3), (fit_absmax, INT2, 0.98), (fit_absmax, INT4, 16.4)],
)
def test_signal_to_noise_of_gaussian_rows(fit, grid: BlockGrid, expected_db: float) -> None:
    values = gaussian()
    found = signal_to_noise_db(values, fit(values, grid.for_width(2048)).decode())
    assert found == pytest.approx(expected_db, abs=0.1 if fit is fit_mse else 0.6)


def exhaustive(values: Tensor, grid: BlockGrid, weight: Tensor) -> Tensor:
    """Least weighted squared error of each row over many steps."""
    peak = values.abs().amax(-1, keepdim=True) / grid.code_max
    errors = [
        (((values / s).round().clamp(grid.code_min, grid.code_max) * s - values).square() * weight).sum(-1)
        for s in (peak * ratio for ratio in torch.logspace(-2.5, 0.05, 2000).tolist())
    ]
    return torch.stack(errors).amin(0)


@each_grid
@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "ties", "two values", "positive", "sparse"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_comes_close_to_trying_every_step(grid: BlockGrid, kind: str, weighted: bool) -> None:
    values = torch.from_numpy(SAMPLES[kind])
    importance = torch.rand(512, generator=torch.Generator().manual_seed(3)) ** 4 if weighted else None
    weight = torch.ones(512) if importance is None else importance
    decoded = fit_mse(values, grid.for_width(512), importance).decode()
    found = ((decoded - values).square() * weight).sum(-1)
    best = exhaustive(values, grid, weight)
    floor = 1e-6 * (values.square() * weight).sum(-1)
    # eight bits can be luckier than the search: some steps meet many of the values at once
    assert ((found + floor).sum() / (best + floor).sum()) < (1.6 if grid is INT8 else 1.05)


@each_grid
@given(x=hnp.arrays(np.float32, (2, 24), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_the_search_never_loses_to_absmax(grid: BlockGrid, x: np.ndarray) -> None:
    values = torch.from_numpy(x)
    searched, plain = (
        (fit(values, grid.for_width(24)).decode().double() - values.double()).square().sum(-1)
        for fit in (fit_mse, fit_absmax)
    )
    energy = values.double().square().sum(-1)
    assert (searched <= plain * (1 + 1e-5) + energy * 1e-12).all()


@each_grid
@each_fit
@pytest.mark.parametrize("kind", SAMPLES)
def test_scales_are_normal_positive_numbers(fit, grid: BlockGrid, kind: str) -> None:
    for scale in (1.0, 1e-30, 1e-38, 1e30):
        fitted = fit(torch.from_numpy(SAMPLES[kind] * np.float32(scale)), grid.for_width(256))
        assert fitted.scale.dtype == torch.float32
        assert is_normal_positive(fitted.scale).all()
        assert not fitted.decode().isnan().any()


@each_grid
@each_fit
def test_a_row_of_zeros_stays_zero(fit, grid: BlockGrid) -> None:
    fitted = fit(torch.zeros(3, 32), grid.for_width(32))
    assert not fitted.codes.any()
    assert torch.equal(fitted.scale, torch.ones(3, 1))


@each_fit
def test_every_slice_of_a_row_has_its_own_scale(fit) -> None:
    values = gaussian(5, 4 * 64) * torch.tensor([1.0, 10.0, 0.1, 1000.0]).repeat_interleave(64)
    whole = fit(values, INT4.for_width(64))
    assert whole.scale.shape == (5, 4)
    for i in range(4):
        part = fit(values[:, 64 * i : 64 * (i + 1)].contiguous(), INT4.for_width(64))
        assert torch.equal(part.codes, whole.codes[:, 64 * i : 64 * (i + 1)])
        assert torch.equal(part.scale[:, 0], whole.scale[:, i])


@each_fit
def test_rows_in_chunks_are_fitted_as_rows_alone(fit) -> None:
    values = gaussian(70, 8192)  # more than two chunks
    whole = fit(values, INT2.for_width(8192))
    assert torch.equal(whole.codes[69:], fit(values[69:], INT2.for_width(8192)).codes)


@pytest.mark.parametrize("fit", [fit_mse, fit_absmax])
def test_weights_beyond_the_grid_are_refused(fit) -> None:
    with pytest.raises(WeightError, match=r"a weight of 2e\+38 is beyond the reach of grid int2"):
        fit(torch.full((1, 32), 2e38), INT2.for_width(32))


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-40, math.nan, math.inf])
def test_scales_that_no_runtime_can_use_are_refused(value: float) -> None:
    steps = torch.tensor([[1.0, 1.0], [1.0, value]])
    with pytest.raises(WeightError, match=r"1 of 4 scales of grid int4 are zero, .* at row 1, block 1: expected"):
        from_steps(INT4.for_width(8), torch.zeros(2, 16, dtype=torch.int8), steps)


@each_grid
@given(x=hnp.arrays(np.float32, 16, elements=st.floats(width=32, allow_nan=False)))
def test_any_step_is_rounded_to_one_that_a_file_may_have(grid: BlockGrid, x: np.ndarray) -> None:
    step = grid.round_step(torch.from_numpy(x))
    assert is_normal_positive(step).all()
    assert torch.equal(grid.round_step(step), step)
    ordinary = torch.from_numpy((x >= 1e-30) & (x <= 1e30))
    assert torch.equal(step[ordinary], torch.from_numpy(x)[ordinary])
    assert (step * grid.code_min).isfinite().all()


# Learned scales


@pytest.mark.parametrize("z", [-200.0, -88.0, -87.0, 80.0, 200.0])
def test_a_learned_scale_stays_normal_and_positive(z: float) -> None:
    latent = gaussian(4, 64)
    made = latent_of(latent, INT2.for_width(64))
    made.scale_latent.data.fill_(z)
    made.decode()
    assert is_normal_positive(made.pack().scale).all()
    grad_latent, _ = pulled(made, torch.ones(4, 64))
    assert grad_latent.isfinite().all()


def test_a_scale_that_became_nan_is_named() -> None:
    made = latent_of(gaussian(4, 64), INT2.for_width(64))
    made.scale_latent.data[2] = torch.nan
    made.decode()
    with pytest.raises(WeightError, match=r"not finite, the first is nan at row 2, block 0"):
        made.pack()


# The official reader


def read_by_transformers(q: Quantized, dtype: torch.dtype, slices: int) -> Tensor:
    rows, columns = q.codes.shape
    if slices == 1:
        linear = QuantizedLinear(columns, rows, num_bits=q.grid.code_bits)
        linear.weight.data, linear.weight_scale.data = pack_codes(q.codes, q.grid), q.scale
        return linear._dequantize_weights(dtype)
    table = QuantizedEmbedding(rows, columns, dtype, num_bits=q.grid.code_bits)
    table.embedding_quantized.data, table.embedding_scale.data = pack_codes(q.codes, q.grid), q.scale
    return table.weight


@each_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slices", [1, 4])
def test_values_are_those_of_transformers_in_its_dtype(grid: BlockGrid, dtype: torch.dtype, slices: int) -> None:
    values = gaussian(32, 256)
    fitted = fit_mse(values, grid.for_width(256 // slices))
    theirs = read_by_transformers(fitted, dtype, slices)
    assert torch.equal(fitted.decode(dtype), theirs)
    assert torch.equal(latent_of(values, fitted.grid, learned=False, dtype=dtype).weight, theirs)


@each_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_computed_in_any_dtype_is_packed(grid: BlockGrid, dtype: torch.dtype) -> None:
    made = latent_of(gaussian(128, 64), grid.for_width(64), dtype=dtype)
    assert torch.equal(made.pack().decode(dtype), made.weight)


@each_grid
@each_fit
def test_narrow_scales_are_exact_in_bfloat16_and_cost_nearly_nothing(grid: BlockGrid, fit) -> None:
    wide, narrow = grid.for_width(512), grid_named(f"{grid.name}-bf16").for_width(512)
    for kind, values in SAMPLES.items():
        found = fit(torch.from_numpy(values), narrow)
        assert found.step.to(torch.bfloat16).float().equal(found.step), kind
        assert narrow.codes_of(found.decode(), found.step).equal(found.codes)
    values = gaussian(columns=512)
    lost = signal_to_noise_db(values, fit(values, wide).decode()) - signal_to_noise_db(
        values, fit(values, narrow).decode()
    )
    assert -0.05 < lost < 0.05


@each_grid
def test_narrow_scales_stay_so_while_they_are_learned(grid: BlockGrid) -> None:
    narrow = grid_named(f"{grid.name}-bf16").for_width(512)
    step = torch.full((4, 1), 0.0123)
    rounded = narrow.round_step(step * torch.linspace(0.5, 2, 4).unsqueeze(1))
    assert rounded.to(torch.bfloat16).float().equal(rounded)
    assert float(narrow.round_step(torch.tensor(0.0))) > 0
