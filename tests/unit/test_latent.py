"""One weight's latents: the forward is the grid, the gradients are autograd's, and codes are read off it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from intaglio.errors import MismatchError
from intaglio.numerics.fit import fit_mse
from intaglio.numerics.grid import F16, GRIDS, Q4_0, Q4_0_FREE, BlockGrid, grid_named
from intaglio.numerics.layout import to_blocks
from intaglio.train import kernels
from intaglio.train.latent import BlockLatent, FloatLatent
from tests.support import ggml
from tests.support.samples import samples
from tests.support.training import plain_fake_quantize

BLOCK_GRIDS = [grid.for_width(64) for grid in GRIDS.values() if isinstance(grid, BlockGrid)]
LEARNED = [Q4_0, Q4_0_FREE]
ROWS = {name: grid_named(name).for_width(256) for name in ("int2", "int4", "int8")}
SLICES = grid_named("int4").for_width(64)  # as in the table of per-layer embeddings
SAMPLES = samples(rows=4)
# grid, whether its scales are learned, whether its codes are frozen
CASES = {
    "canonical": (Q4_0, True, False),
    "free": (Q4_0_FREE, True, False),
    "frozen": (Q4_0, True, True),
    "frozen free": (Q4_0_FREE, True, True),
    "fixed q4_0": (Q4_0, False, False),
    "fixed q6_k": (grid_named("q6_k"), False, False),
    "fixed q8_0-free": (grid_named("q8_0-free"), False, False),
    "channel int2": (ROWS["int2"], True, False),
    "channel int4": (ROWS["int4"], True, False),
    "channel int8": (ROWS["int8"], True, False),
    "channel slices": (SLICES, True, False),
    "frozen channel": (ROWS["int2"], True, True),
    "fixed channel": (SLICES, False, False),
}
each_case = pytest.mark.parametrize("case", CASES)
learned_grid = pytest.mark.parametrize("grid", LEARNED, ids=lambda grid: grid.name)


def weights(rows: int = 6, columns: int = 256, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def latent_of(
    values: Tensor, grid: BlockGrid, *, learned: bool = True, moved: bool = True, dtype: torch.dtype = torch.float32
) -> BlockLatent:
    """The latents of a weight in `dtype`; learned scales have `moved` away from the fit."""
    weight = nn.Parameter(torch.zeros_like(values, dtype=dtype))
    made = BlockLatent("linear.weight", weight, grid, values, fit_mse(values, grid), learned=learned)
    if made.scale_latent is not None and moved:
        noise = torch.randn(made.scale_latent.shape, generator=torch.Generator().manual_seed(1))
        made.scale_latent.data += noise * (1.0 if made.mode == "canonical" else 0.1)
    made.decode()
    return made


def in_case(case: str, values: Tensor, dtype: torch.dtype = torch.float32) -> BlockLatent:
    grid, learned, freeze = CASES[case]
    made = latent_of(values, grid, learned=learned, dtype=dtype)
    if freeze:
        made.freeze()
    return made


def given_of(made: BlockLatent) -> Tensor:
    """Parts that the mode does not learn: bases, or the steps themselves."""
    if made.mode != "fixed":
        return torch.zeros(0) if made.base is None else made.base
    if made.super_scale is None:
        return made.scale.float()
    return made.super_scale.float().repeat_interleave(16, dim=-1) * made.scale.float()


def upstream_of(values: Tensor) -> Tensor:
    return torch.randn(values.shape, generator=torch.Generator().manual_seed(2))


def pulled(made: BlockLatent, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of latent and scale latent for a gradient of the weight."""
    made.weight.grad = upstream.clone().to(made.weight.dtype)
    made.pull()
    assert made.weight.grad is None
    return made.latent.grad, None if made.scale_latent is None else made.scale_latent.grad


# Gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_case
def test_gradients_are_those_of_autograd(case: str, dtype: torch.dtype) -> None:
    values = weights()
    made = in_case(case, values)
    upstream = upstream_of(values)
    grad_latent, grad_z = pulled(made, upstream)

    plain_latent = values.to(dtype).requires_grad_()
    plain_z = None if made.scale_latent is None else made.scale_latent.detach().to(dtype).requires_grad_()
    codes = None if made.codes is None else made.codes.to(dtype)
    plain = plain_fake_quantize(made.mode, made.grid, plain_latent, plain_z, given_of(made).to(dtype), codes)
    plain.backward(upstream.to(dtype))

    if made.grid.positive and dtype == torch.float64:  # a step of 24 bits keeps what float32 rounds in base x exp(z)
        torch.testing.assert_close(made.weight.detach(), plain.float(), rtol=1e-6, atol=0)
    else:
        assert torch.equal(made.weight, plain.float())
    assert (grad_latent is None) == (plain_latent.grad is None)
    if grad_latent is not None:
        torch.testing.assert_close(grad_latent, plain_latent.grad.float(), rtol=1e-4, atol=1e-6)
    if plain_z is not None:
        assert plain_z.grad.abs().min() > 0
        torch.testing.assert_close(grad_z, plain_z.grad.float(), rtol=1e-4, atol=1e-6)


@learned_grid
def test_gradients_where_a_block_has_ties(grid: BlockGrid) -> None:
    values = torch.zeros(3, 32)
    values[0, [3, 4, 9]] = torch.tensor([0.5, 0.5, -0.5])
    values[1, [0, 31]] = -0.25
    values[2] = 0.125
    made = latent_of(values, grid, moved=False)
    upstream = upstream_of(values)
    grad_latent, grad_z = pulled(made, upstream)
    plain_latent, plain_z = (t.detach().clone().requires_grad_() for t in (values, made.scale_latent))
    plain_fake_quantize(made.mode, grid, plain_latent, plain_z, given_of(made)).backward(upstream)
    torch.testing.assert_close(grad_latent, plain_latent.grad)
    torch.testing.assert_close(grad_z, plain_z.grad)


@pytest.mark.parametrize("case", ["canonical", "free", "fixed q6_k", "channel int2", "channel slices"])
def test_an_empty_block_passes_gradients_so_that_it_can_fill(case: str) -> None:
    made = in_case(case, torch.zeros(2, 256))
    upstream = upstream_of(made.latent)
    grad_latent, grad_z = pulled(made, upstream)
    assert not made.weight.any()
    assert torch.equal(grad_latent, upstream)
    assert grad_z is None or torch.isfinite(grad_z).all()


def test_a_gradient_of_a_narrower_dtype_is_pulled_in_float32() -> None:
    wide, narrow = (latent_of(weights(), Q4_0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    upstream = upstream_of(weights()).to(torch.bfloat16)
    for ours, expected in zip(pulled(narrow, upstream), pulled(wide, upstream), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)


def test_a_weight_without_a_gradient_leaves_its_latent_without() -> None:
    made = latent_of(weights(), Q4_0)
    made.pull()
    assert made.latent.grad is None and made.scale_latent.grad is None


@each_case
def test_scales_kept_since_the_decode_are_those_computed_anew(case: str) -> None:
    kept, anew = (in_case(case, weights()) for _ in range(2))
    anew._scales = None
    for ours, expected in zip(pulled(kept, upstream_of(weights())), pulled(anew, upstream_of(weights())), strict=True):
        assert (ours is None) == (expected is None)
        assert ours is None or torch.equal(ours, expected)


# The forward is the grid


@each_case
@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_is_encode_and_decode(case: str, kind: str, dtype: torch.dtype) -> None:
    latent = torch.from_numpy(SAMPLES[kind])
    made = in_case(case, latent, dtype)
    values, step = made.compute(dtype)
    if made.mode != "frozen":
        assert torch.equal(values, made.grid.decode(made.grid.encode(latent, step), step, dtype))
    packed = made.pack()
    assert torch.equal(packed.decode(dtype), values)
    assert torch.equal(packed.step, step)
    assert torch.equal(made.weight, values)


@pytest.mark.parametrize("grid", BLOCK_GRIDS, ids=lambda grid: grid.name)
def test_fixed_scales_are_the_fitted_ones(grid: BlockGrid) -> None:
    fitted = fit_mse(weights(), grid)
    packed = latent_of(weights(), grid, learned=False).pack()
    assert torch.equal(packed.codes, fitted.codes)
    assert torch.equal(packed.scale, fitted.scale)


@learned_grid
def test_learning_starts_near_the_fit(grid: BlockGrid) -> None:
    """A step that learns begins within one rounding of the fitted one."""
    latent = weights(rows=64)
    fitted = fit_mse(latent, grid)
    _, step = latent_of(latent, grid, moved=False).compute()
    close = (step / fitted.step - 1).abs() <= 2.0 ** (1 - grid.step_bits)
    assert close.float().mean() > 0.9
    ours = grid.decode(grid.encode(latent, step), step)
    assert (ours - latent).square().sum() <= (fitted.decode() - latent).square().sum() * 1.01


@learned_grid
def test_freezing_keeps_the_forward_and_the_codes(grid: BlockGrid) -> None:
    made = latent_of(torch.from_numpy(np.concatenate(list(SAMPLES.values()))), grid)
    before, values = made.pack(), made.weight.detach().clone()
    made.freeze()
    made.decode()
    assert torch.equal(made.weight, values)
    made.scale_latent.data += 0.1
    made.latent.data += 0.01
    made.decode()
    after = made.pack()
    live = (before.step.abs() > 1e-6).repeat_interleave(32, dim=-1)
    assert torch.equal(after.codes[live], before.codes[live])
    assert not torch.equal(after.scale, before.scale)


def test_frozen_codes_hold_latents_still() -> None:
    made = in_case("frozen", weights())
    grad_latent, grad_z = pulled(made, torch.ones(6, 256))
    assert grad_latent is None and grad_z.any()
    assert [name for name, _ in made.named_parameters()] == ["linear.weight.scale_latent"]


@pytest.mark.parametrize("case", ["canonical", "fixed q6_k", "channel int2", "frozen"])
def test_a_weight_changed_behind_the_latents_is_not_packed(case: str) -> None:
    made = in_case(case, weights())
    made.weight.data[2, 7] += 0.001
    with pytest.raises(MismatchError, match=r"linear\.weight: 1 of 1536 values .* not what its latents decode to"):
        made.pack()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["canonical", "free", "channel int4", "fixed q8_0-free"])
def test_a_weight_that_was_cast_is_packed_as_it_is_or_refused(case: str, dtype: torch.dtype) -> None:
    made = in_case(case, weights())
    made.weight.data = made.weight.data.to(dtype)
    try:
        packed = made.pack()
    except MismatchError as error:
        assert "cast" in str(error)
    else:
        assert torch.equal(packed.decode(dtype), made.weight)


def test_packing_notices_values_off_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    made = latent_of(weights(), Q4_0)
    values, step = made.compute()
    monkeypatch.setattr(made, "compute", lambda dtype: (values * 1.0001, step))
    made.weight.data.copy_(values * 1.0001)
    with pytest.raises(MismatchError, match="are not what its latents decode to"):
        made.pack()


def test_a_float_weight_is_its_master_rounded_and_learns_straight_through() -> None:
    weight = nn.Parameter(torch.zeros(6, 256))
    made = FloatLatent("norm.weight", weight, F16, weights())
    assert torch.equal(weight, F16.round(weights()))
    assert torch.equal(made.latent, weights())
    assert torch.equal(made.pack(), weight)
    weight.grad = upstream_of(weights())
    made.pull()
    assert torch.equal(made.latent.grad, upstream_of(weights()))
    assert weight.grad is None


# The canonical law

numbers = st.floats(-1000, 1000, width=32)
tiny = st.floats(-(2.0**-15), 2.0**-15, width=32)
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 0.9375, 2.0**-140, -(2.0**-24), 2.0**-17])
blocks = st.one_of(*(hnp.arrays(np.float32, (2, 64), elements=kind) for kind in (numbers, tiny, few)))
ratios = hnp.arrays(np.float32, (2, 2), elements=st.floats(-30, 30, width=32))
OPPOSITE = np.tile(np.float32([1, -1]), (2, 32))


@given(block=blocks, z=ratios)
@example(block=OPPOSITE, z=np.zeros((2, 2), np.float32))
@example(block=-OPPOSITE, z=np.full((2, 2), 30, np.float32))
@example(block=np.zeros((2, 64), np.float32), z=np.zeros((2, 2), np.float32))
def test_the_extremum_keeps_the_lowest_code_whatever_is_learned(block: np.ndarray, z: np.ndarray) -> None:
    latent = torch.from_numpy(block)
    made = latent_of(latent, Q4_0, moved=False)
    made.scale_latent.data.copy_(torch.from_numpy(z))
    made.decode()
    packed = made.pack()
    magnitude, step = Q4_0.blocks(latent).abs(), packed.step
    # never wider than the step that maps the extremum to -8, both as the grid rounds them
    assert (step.abs() <= Q4_0.round_step(magnitude.amax(-1) / 8)).all()
    largest = magnitude == magnitude.amax(-1, keepdim=True)
    codes = Q4_0.blocks(packed.codes)
    has_lowest = (largest & (codes == Q4_0.code_min)).any(-1)
    assert torch.equal(has_lowest, step != 0)
    checkpoint_values = packed.decode().to(torch.bfloat16).float().numpy()
    assert np.array_equal(ggml.quantize(checkpoint_values, "Q4_0"), to_blocks(packed))


def test_a_tie_of_opposite_signs_takes_the_positive() -> None:
    latent = torch.from_numpy(OPPOSITE)
    packed = latent_of(latent, Q4_0).pack()
    assert (packed.step < 0).all()
    assert set(packed.codes.unique().tolist()) == {-8, 7}


# One weight, in parts


@each_case
@pytest.mark.parametrize("blocks", [1, 5, 56])
def test_chunks_compute_what_the_whole_does(case: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = in_case(case, weights(rows=7))
    results = []
    for size in (blocks, 1 << 30):
        monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", size * made.grid.block_size)
        gradients = made.gradients(upstream_of(made.latent))
        results.append([*made.compute(), *(torch.zeros(0) if g is None else g for g in gradients)])
    for chunked, whole in zip(*results, strict=True):
        assert torch.equal(chunked, whole)


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("canonical", {".scale_latent"}),
        ("free", {".scale_latent", ".base"}),
        ("frozen", {".scale_latent", ".base", ".codes"}),
        ("fixed q6_k", {".scale", ".super_scale"}),
        ("fixed channel", {".scale"}),
    ],
)
def test_a_checkpoint_holds_all_that_the_forward_needs(case: str, parts: set[str]) -> None:
    made, other = in_case(case, weights()), in_case(case, weights(seed=5))
    assert set(made.state()) == {"linear.weight"} | {f"linear.weight{part}" for part in parts}
    assert not torch.equal(made.weight, other.weight)
    with torch.no_grad():
        for name, tensor in other.state().items():
            tensor.copy_(made.state()[name])
    other.decode()
    assert torch.equal(made.weight, other.weight)
