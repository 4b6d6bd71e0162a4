"""The laws of grids: what encode, decode and rounding promise, for every preset and any values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from intaglio.errors import RecipeError, WeightError
from intaglio.numerics.fit import check_finite, fit_mse
from intaglio.numerics.fit_stock import fit_stock
from intaglio.numerics.grid import GGUF_GRIDS as GGUF_TYPES
from intaglio.numerics.grid import GRIDS, Q4_0, Q8_0, BlockGrid, FloatGrid, Quantized, grid_named
from intaglio.numerics.layout import to_blocks
from intaglio.numerics.rounding import round_half, round_significant
from intaglio.numerics.steps import from_steps
from tests.support import ggml
from tests.support.samples import samples

ROW = 24  # columns under a step where a preset leaves that open
BLOCK_GRIDS = [grid.for_width(ROW) for grid in GRIDS.values() if isinstance(grid, BlockGrid)]
GGUF_GRIDS = [grid for grid in BLOCK_GRIDS if grid.ggml_type]
SIGNED = [grid for grid in BLOCK_GRIDS if not grid.positive]
FLOAT_GRIDS = [grid for grid in GRIDS.values() if isinstance(grid, FloatGrid) and grid.name != "i64"]
PORTABLE = [grid for grid in BLOCK_GRIDS if grid.portable]
FREE = [free.name for _, free in GGUF_TYPES.values()]
SAMPLES = samples()

any_grid = pytest.mark.parametrize("grid", BLOCK_GRIDS, ids=lambda grid: grid.name)
gguf_grid = pytest.mark.parametrize("grid", GGUF_GRIDS, ids=lambda grid: grid.name)
signed_grid = pytest.mark.parametrize("grid", SIGNED, ids=lambda grid: grid.name)
portable_grid = pytest.mark.parametrize("grid", PORTABLE, ids=lambda grid: grid.name)
each_sample = pytest.mark.parametrize("kind", SAMPLES)


@st.composite
def quantized(draw: st.DrawFn, grid: BlockGrid) -> Quantized:
    """Any codes and any steps that the grid allows, in float16 zero and subnormal ones included."""
    rows, columns = draw(st.integers(1, 2)), grid.column_multiple * draw(st.integers(1, 2))
    codes = draw(hnp.arrays(np.int8, (rows, columns), elements=st.integers(grid.code_min, grid.code_max)))
    blocks = (rows, columns // grid.block_size)
    if grid.positive:
        floats = torch.from_numpy(
            draw(hnp.arrays(np.uint32, blocks, elements=st.integers(0, 0x7F7FFFFF))).view(np.float32)
        )
        return from_steps(grid, torch.from_numpy(codes), grid.round_step(floats))
    if grid.super_block is None:
        halves = torch.from_numpy(draw(hnp.arrays(np.uint16, blocks, elements=st.integers(0, 0xFFFF))).view(np.float16))
        step = grid.round_step(torch.where(halves.isfinite(), halves, torch.zeros_like(halves)).float() / 2)
        return from_steps(grid, torch.from_numpy(codes), step)
    largest = 112 if grid.portable else 127  # 112 is the last int8 of three significant bits
    scale = draw(hnp.arrays(np.int8, blocks, elements=st.integers(-largest, largest)))
    rounded = round_significant(torch.from_numpy(scale).float(), min(grid.step_bits, 7))
    exponents = draw(hnp.arrays(np.int8, (rows, columns // grid.super_block), elements=st.integers(-24, 8)))
    super_scale = torch.from_numpy(np.exp2(exponents.astype(np.float32)).astype(np.float16))
    return Quantized(grid, torch.from_numpy(codes), rounded.to(torch.int8), super_scale)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


@any_grid
@given(data=st.data())
def test_encode_finds_the_decoded_codes_again(grid: BlockGrid, data: st.DataObject) -> None:
    q = data.draw(quantized(grid))
    expected = torch.where((q.step == 0).repeat_interleave(grid.block_size, dim=-1), 0, q.codes)
    assert torch.equal(grid.encode(q.decode(), q.step), expected.to(torch.int8))


@gguf_grid
@given(data=st.data())
def test_decode_is_the_arithmetic_of_ggml(grid: BlockGrid, data: st.DataObject) -> None:
    q = data.draw(quantized(grid))
    ours, theirs = q.decode(), torch.from_numpy(ggml.dequantize(to_blocks(q), grid.ggml_type))
    if grid.ggml_type == "Q2_0":  # whose codes and scales are mirrored: zeros may have either sign
        ours, theirs = ours + 0.0, theirs + 0.0
    assert torch.equal(bits(ours), bits(theirs))


@portable_grid
@given(data=st.data())
def test_portable_values_are_exact_in_bfloat16(grid: BlockGrid, data: st.DataObject) -> None:
    decoded = data.draw(quantized(grid)).decode()
    assert torch.equal(bits(decoded.to(torch.bfloat16).float()), bits(decoded))


def test_which_grids_are_portable() -> None:
    assert {grid.name for grid in PORTABLE} == {"q4_0", "q4_0-positive", "q6_k", "q8_0", "q2_0"}


@any_grid
@given(data=st.data())
def test_nearest_code_and_ties_to_even(grid: BlockGrid, data: st.DataObject) -> None:
    elements = st.integers(4 * grid.code_min - 9, 4 * grid.code_max + 9)
    quarters = data.draw(hnp.arrays(np.int16, (1, grid.column_multiple), elements=elements))
    quarter = 0.25 if grid.positive else -0.25
    step = torch.full((1, grid.column_multiple // grid.block_size), quarter)
    values = torch.from_numpy(quarters.astype(np.float32) / 4) * quarter
    expected = np.clip(np.rint(quarters / 4), grid.code_min, grid.code_max)  # numpy, too, rounds ties to even
    assert np.array_equal(grid.encode(values, step).numpy(), expected)


@signed_grid
def test_a_zero_step_gives_zeros(grid: BlockGrid) -> None:
    values = torch.randn(2, grid.column_multiple)
    step = torch.zeros(2, grid.column_multiple // grid.block_size)
    codes = grid.encode(values, step)
    assert not codes.any()
    assert not grid.decode(codes, step).any()


@given(x=hnp.arrays(np.float32, 64, elements=st.floats(-65504, 65504, width=32)))
def test_round_half_is_the_conversion_to_float16(x: np.ndarray) -> None:
    values = torch.from_numpy(x)
    assert torch.equal(round_half(values), values.to(torch.float16).float())


@given(x=hnp.arrays(np.float32, 64, elements=st.floats(-(2.0**127), 2.0**127, width=32)))
def test_eight_significant_bits_are_bfloat16(x: np.ndarray) -> None:
    values = torch.from_numpy(x)
    assert torch.equal(round_significant(values, 8), values.to(torch.bfloat16).float())


@pytest.mark.parametrize("grid", [g for g in SIGNED if g.super_block is None], ids=lambda grid: grid.name)
@given(x=hnp.arrays(np.float32, 64, elements=st.floats(-40000, 40000, width=32)))
def test_round_step_takes_the_nearest_allowed(grid: BlockGrid, x: np.ndarray) -> None:
    values = torch.from_numpy(x)
    rounded = grid.round_step(values)
    assert torch.equal(grid.round_step(rounded), rounded)
    allowed = allowed_steps(grid)
    place = torch.searchsorted(allowed, values.double()).clamp(1, len(allowed) - 1)
    nearest = torch.minimum((values - allowed[place - 1]).abs(), (values - allowed[place]).abs())
    assert torch.isin(rounded.double(), allowed).all()
    # a canonical step below 2^-20 is zero, whether or not zero is the nearest
    settled = (values.abs() >= 2.0**-19) | torch.tensor(not grid.canonical)
    assert torch.equal((rounded.double() - values).abs()[settled], nearest[settled])


def allowed_steps(grid: BlockGrid) -> Tensor:
    """Every step of a grid, ascending, float64: all float16 values of few enough significant bits."""
    pattern = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16)
    halves = pattern.view(torch.float16).double()
    mantissa, _ = torch.frexp(halves)
    whole = mantissa * 2**grid.step_bits
    kept = halves[whole == whole.floor()]
    if grid.canonical:
        kept = kept[(kept == 0) | (kept >= 2.0**-20)]
    return torch.cat([-kept.flip(0)[:-1], kept])


@pytest.mark.parametrize("grid", FLOAT_GRIDS, ids=lambda grid: grid.name)
@given(x=hnp.arrays(np.float32, 64, elements=st.floats(-60000, 60000, width=32)))
def test_float_grids_hold_what_both_targets_hold(grid: FloatGrid, x: np.ndarray) -> None:
    rounded = grid.round(torch.from_numpy(x))
    assert torch.equal(grid.round(rounded), rounded)
    assert torch.equal(rounded.to(torch.bfloat16).float(), rounded)
    if grid.ggml_type == "F16":
        assert torch.equal(rounded.to(torch.float16).float(), rounded)


@each_sample
@pytest.mark.parametrize("name", FREE)
def test_fit_stock_is_ggmls_quantizer(name: str, kind: str) -> None:
    grid = grid_named(name)
    assert isinstance(grid, BlockGrid)
    ours = to_blocks(fit_stock(torch.from_numpy(SAMPLES[kind]), grid))
    assert np.array_equal(ours, ggml.quantize(SAMPLES[kind], grid.ggml_type))


# 1 / step must be finite: below that, C's conversion of an infinite float to an integer is undefined
defined = st.floats(-1e4, 1e4, width=32).filter(lambda value: value == 0 or abs(value) > 1e-35)


@given(x=hnp.arrays(np.float32, (1, 256), elements=defined))
def test_fit_stock_is_ggmls_quantizer_for_any_values(x: np.ndarray) -> None:
    for name in FREE:
        grid = grid_named(name)
        assert isinstance(grid, BlockGrid)
        assert np.array_equal(to_blocks(fit_stock(torch.from_numpy(x), grid)), ggml.quantize(x, grid.ggml_type))


def assert_canonical(q: Quantized) -> None:
    checkpoint = q.decode().to(torch.bfloat16).float().numpy()
    assert np.array_equal(ggml.quantize(checkpoint, "Q4_0"), to_blocks(q))


@each_sample
def test_q4_0_is_found_again_by_ggmls_quantizer(kind: str) -> None:
    """The claim of DESIGN.md: a stranger's llama-quantize of our bfloat16 checkpoint changes no bit."""
    assert_canonical(fit_mse(torch.from_numpy(SAMPLES[kind]), Q4_0))


@given(x=hnp.arrays(np.float32, (2, 64), elements=st.floats(-1000, 1000, width=32)))
def test_q4_0_is_found_again_whatever_was_fitted(x: np.ndarray) -> None:
    assert_canonical(fit_mse(torch.from_numpy(x), Q4_0))


@given(data=st.data())
@settings(max_examples=200)
def test_q4_0_is_found_again_wherever_a_block_has_its_lowest_code(data: st.DataObject) -> None:
    """Whatever training made of steps and codes, as long as the extremum has code -8."""
    q = data.draw(quantized(Q4_0))
    codes, step = q.codes.unflatten(-1, (-1, 32)).clone(), q.step
    place = data.draw(st.integers(0, 31))
    codes[..., place] = Q4_0.code_min
    codes = torch.where((step == 0).unsqueeze(-1), 0, codes).flatten(-2).to(torch.int8)
    assert_canonical(from_steps(Q4_0, codes, torch.where(step == 0, -0.0, step)))


@pytest.mark.parametrize("grid", [Q4_0, Q8_0], ids=lambda grid: grid.name)
def test_no_step_of_a_coarse_grid_is_better_than_the_one_found(grid: BlockGrid) -> None:
    """Every step is tried that maps the extremum on its last code or clips no more than the search may."""
    values = torch.randn(64, 32) * torch.logspace(-4, 4, 64).unsqueeze(1)
    found = fit_mse(values, grid)
    error = (found.decode() - values).square().sum(-1)
    base = values.abs().amax(-1, keepdim=True) / -grid.code_min
    halves = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    steps = halves[round_half(halves, grid.step_bits) == halves]
    for step in (*steps, *-steps):
        tried = (step.abs() >= 0.62 * base) & (step.abs() <= base)
        tried &= torch.full_like(base, not grid.canonical, dtype=torch.bool) | (step * found.step > 0)
        other = grid.decode(grid.encode(values, step.expand(64, 1)), step.expand(64, 1))
        assert (~tried.squeeze(1) | ((other - values).square().sum(-1) >= error * (1 - 1e-6))).all(), float(step)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    weights = torch.zeros(4, 32)
    weights[2, 7] = value
    with pytest.raises(WeightError, match=r"layers\.0\.x: 1 values are NaN or Inf, the first at index \(2, 7\)"):
        check_finite(weights, "layers.0.x")


@pytest.mark.parametrize("fit", [fit_mse, fit_stock])
def test_weights_beyond_float16_are_refused(fit) -> None:
    with pytest.raises(WeightError, match="float16"):
        fit(torch.full((1, 32), 1e6), Q4_0)


def test_steps_that_the_file_cannot_hold_are_refused() -> None:
    codes = torch.zeros(1, 32, dtype=torch.int8)
    with pytest.raises(WeightError, match="not representable"):
        from_steps(Q4_0, codes, torch.tensor([[1 + 2.0**-20]]))


def test_an_unknown_grid_names_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"'q5'.*q4_0"):
        grid_named("q5")
