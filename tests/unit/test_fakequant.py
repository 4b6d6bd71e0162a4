"""Fake quantization: the forward is the grid, the gradients are autograd's, and no copy of a weight is kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from intaglio.errors import MismatchError
from intaglio.numerics.fit import fit_mse
from intaglio.numerics.grid import GRIDS, Q4_0, Q4_0_FREE, BlockGrid, grid_named
from intaglio.numerics.layout import to_blocks
from intaglio.train import kernels
from intaglio.train.decode import StepWeights, freeze_codes
from intaglio.train.fakequant import WeightQuantizer
from intaglio.train.group import FakeQuantizeGroup, WeightGroup
from intaglio.train.modules import QuantLinear
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


def quantizer_of(latent: Tensor, grid: BlockGrid, *, learned: bool = True, moved: bool = True) -> WeightQuantizer:
    """A quantizer whose learned scales have `moved` away from the fit."""
    made = WeightQuantizer(grid, latent, fit_mse(latent.detach(), grid), learned=learned)
    if made.scale_latent is not None and moved:
        noise = torch.randn(made.scale_latent.shape, generator=torch.Generator().manual_seed(1))
        made.scale_latent.data += noise * (1.0 if made.mode == "canonical" else 0.1)
    return made


def in_case(case: str, latent: Tensor) -> WeightQuantizer:
    grid, learned, freeze = CASES[case]
    made = quantizer_of(latent, grid, learned=learned)
    if freeze:
        made.freeze(latent)
    return made


def given_of(made: WeightQuantizer) -> Tensor:
    """What the mode does not learn: bases, or the steps themselves."""
    if made.mode != "fixed":
        return torch.zeros(0) if made.base is None else made.base
    if made.super_scale is None:
        return made.scale.float()
    return made.super_scale.float().repeat_interleave(16, dim=-1) * made.scale.float()


def linear_of(quantizer: WeightQuantizer, latent: Tensor) -> QuantLinear:
    rows, columns = latent.shape
    linear = nn.Linear(columns, rows)
    linear.weight.data.copy_(latent)
    linear.quantizer = quantizer
    linear.__class__ = QuantLinear
    return linear  # type: ignore[return-value]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


# Gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_case
def test_gradients_are_those_of_autograd(case: str, dtype: torch.dtype) -> None:
    latent = weights().requires_grad_()
    made = in_case(case, latent)
    upstream = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
    values = made(latent, torch.float32)
    values.backward(upstream)

    plain_latent = latent.detach().to(dtype).requires_grad_()
    plain_z = None if made.scale_latent is None else made.scale_latent.detach().to(dtype).requires_grad_()
    codes = None if made.codes is None else made.codes.to(dtype)
    arguments = (plain_latent, plain_z, given_of(made).to(dtype), codes)
    plain = plain_fake_quantize(made.mode, made.grid, *arguments)
    plain.backward(upstream.to(dtype))

    if made.grid.positive and dtype == torch.float64:  # a step of 24 bits keeps what float32 rounds in base x exp(z)
        torch.testing.assert_close(values, plain.float(), rtol=1e-6, atol=0)
    else:
        assert torch.equal(values, plain.float())
    assert (latent.grad is None) == (plain_latent.grad is None)
    if latent.grad is not None:
        torch.testing.assert_close(latent.grad, plain_latent.grad.float(), rtol=1e-4, atol=1e-6)
    if plain_z is not None:
        assert plain_z.grad.abs().min() > 0
        torch.testing.assert_close(made.scale_latent.grad, plain_z.grad.float(), rtol=1e-4, atol=1e-6)


@learned_grid
def test_gradients_where_a_block_has_ties(grid: BlockGrid) -> None:
    latent = torch.zeros(3, 32)
    latent[0, [3, 4, 9]] = torch.tensor([0.5, 0.5, -0.5])
    latent[1, [0, 31]] = -0.25
    latent[2] = 0.125
    latent.requires_grad_()
    made = quantizer_of(latent, grid, moved=False)
    upstream = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
    made(latent, torch.float32).backward(upstream)
    plain_latent, plain_z = (t.detach().clone().requires_grad_() for t in (latent, made.scale_latent))
    plain_fake_quantize(made.mode, grid, plain_latent, plain_z, given_of(made)).backward(upstream)
    torch.testing.assert_close(latent.grad, plain_latent.grad)
    torch.testing.assert_close(made.scale_latent.grad, plain_z.grad)


@pytest.mark.parametrize("case", ["canonical", "free", "fixed q6_k", "channel int2", "channel slices"])
def test_an_empty_block_passes_gradients_so_that_it_can_fill(case: str) -> None:
    latent = torch.zeros(2, 256, requires_grad=True)
    made = in_case(case, latent)
    upstream = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
    values = made(latent, torch.float32)
    values.backward(upstream)
    assert not values.any()
    assert torch.equal(latent.grad, upstream)
    assert made.scale_latent is None or torch.isfinite(made.scale_latent.grad).all()


@pytest.mark.parametrize("case", ["canonical", "free", "fixed q6_k", "channel int2", "channel slices", "fixed channel"])
def test_gathered_rows_are_rows_of_the_whole(case: str) -> None:
    latent = weights(rows=8).requires_grad_()
    made = in_case(case, latent)
    rows = torch.tensor([[5, 0, 5], [7, 1, 1]])
    upstream = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(2))

    def gradients(values: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(values, parameters, upstream))

    parameters = [p for p in (latent, made.scale_latent) if p is not None]
    gathered = made.forward_rows(F.embedding(rows, latent), rows)
    whole = F.embedding(rows, made(latent, torch.float32))
    assert torch.equal(gathered, whole)
    for ours, expected in zip(gradients(gathered), gradients(whole), strict=True):
        torch.testing.assert_close(ours, expected)


# The forward is the grid


@each_case
@pytest.mark.parametrize("kind", SAMPLES)
def test_the_forward_is_encode_and_decode(case: str, kind: str) -> None:
    latent = torch.from_numpy(SAMPLES[kind])
    made = in_case(case, latent)
    values, step = made.compute(latent)
    step = step.view(latent.shape[0], -1)
    if made.mode != "frozen":
        assert torch.equal(values, made.grid.decode(made.grid.encode(latent, step), step))
    packed = made.pack(latent)
    assert torch.equal(packed.decode(), values)
    assert torch.equal(packed.step, step)
    assert torch.equal(made(latent, torch.float32), values)


@pytest.mark.parametrize("grid", BLOCK_GRIDS, ids=lambda grid: grid.name)
def test_fixed_scales_are_the_fitted_ones(grid: BlockGrid) -> None:
    latent = weights()
    fitted = fit_mse(latent, grid)
    packed = WeightQuantizer(grid, latent, fitted, learned=False).pack(latent)
    assert torch.equal(packed.codes, fitted.codes)
    assert torch.equal(packed.scale, fitted.scale)


@learned_grid
def test_learning_starts_near_the_fit(grid: BlockGrid) -> None:
    """A step that learns begins within one rounding of the fitted one."""
    latent = weights(rows=64)
    fitted = fit_mse(latent, grid)
    step = quantizer_of(latent, grid, moved=False).compute(latent)[1].view(64, -1)
    close = (step / fitted.step - 1).abs() <= 2.0 ** (1 - grid.step_bits)
    assert close.float().mean() > 0.9
    ours = grid.decode(grid.encode(latent, step), step)
    assert (ours - latent).square().sum() <= (fitted.decode() - latent).square().sum() * 1.01


@learned_grid
def test_freezing_keeps_the_forward_and_the_codes(grid: BlockGrid) -> None:
    latent = torch.from_numpy(np.concatenate(list(SAMPLES.values())))
    made = quantizer_of(latent, grid)
    before, values = made.pack(latent), made.compute(latent)[0]
    made.freeze(latent)
    assert torch.equal(made.compute(latent)[0], values)
    made.scale_latent.data += 0.1
    latent = latent + 0.01
    after = made.pack(latent)
    live = (before.step.abs() > 1e-6).repeat_interleave(32, dim=-1)
    assert torch.equal(after.codes[live], before.codes[live])
    assert not torch.equal(after.scale, before.scale)


def test_frozen_codes_hold_latents_still() -> None:
    latent = weights().requires_grad_()
    made = in_case("frozen", latent)
    made(latent, torch.float32).sum().backward()
    assert latent.grad is None
    assert made.scale_latent.grad.any()


def test_packing_notices_values_off_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    latent = weights()
    made = quantizer_of(latent, Q4_0)
    values, step = made.compute(latent)
    monkeypatch.setattr(made, "compute", lambda latent: (values * 1.0001, step))
    with pytest.raises(MismatchError, match="do not decode"):
        made.pack(latent)


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
    made = quantizer_of(latent, Q4_0, moved=False)
    made.scale_latent.data.copy_(torch.from_numpy(z))
    packed = made.pack(latent)
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
    packed = quantizer_of(latent, Q4_0).pack(latent)
    assert (packed.step < 0).all()
    assert set(packed.codes.unique().tolist()) == {-8, 7}


# One weight, many ways to compute with it


def chunked_and_whole(case: str, monkeypatch: pytest.MonkeyPatch, blocks: int) -> list[list[Tensor]]:
    latent = weights(rows=7)
    made = in_case(case, latent)
    upstream = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
    results = []
    for size in (blocks, 1 << 30):
        monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", size * made.grid.block_size)
        grad_latent, grad_z = made.gradients(upstream, latent)
        results.append([*made.compute(latent), *(torch.zeros(0) if g is None else g for g in (grad_latent, grad_z))])
    return results


@each_case
@pytest.mark.parametrize("blocks", [1, 5, 56])
def test_chunks_compute_what_the_whole_does(case: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunked, whole in zip(*chunked_and_whole(case, monkeypatch, blocks), strict=True):
        assert torch.equal(chunked, whole)


class Net(nn.Module):
    """Two layers, one of them used twice, as a tied head is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            linear_of(quantizer_of(w, Q4_0), w) for w in (weights(256, seed=3), weights(64, seed=4))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(F.gelu(self.first(x)))))


def plainly(net: Net, x: Tensor) -> Tensor:
    return net(x).square().mean()


def cached(net: Net, x: Tensor) -> Tensor:
    StepWeights(net).decode(torch.float32)
    return net(x).square().mean()


def recomputed(net: Net, x: Tensor) -> Tensor:
    return checkpoint(net, x, use_reentrant=False).square().mean()


def cached_and_recomputed(net: Net, x: Tensor) -> Tensor:
    StepWeights(net).decode(torch.float32)
    return recomputed(net, x)


def trained(net: Net, forward: Callable[[Net, Tensor], Tensor]) -> dict[str, Tensor]:
    """Loss and every gradient of one step."""
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(5)).requires_grad_()
    loss = forward(net, x)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()} | {"x": x.grad}
    net.zero_grad()
    StepWeights(net).drop()
    return {"loss": loss.detach()} | gradients


@pytest.mark.parametrize("way", [cached, recomputed, cached_and_recomputed])
def test_caches_and_recomputation_change_no_bit(way: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net()
    expected, found = trained(net, plainly), trained(net, way)
    for name, value in expected.items():
        assert torch.equal(bits(found[name]), bits(value)), name


def test_weights_decoded_in_the_graph_give_equal_losses_and_gradients() -> None:
    net = Net()
    expected = trained(net, plainly)
    with StepWeights(net).in_graph(torch.float32):
        found = trained(net, plainly)
    assert torch.equal(found["loss"], expected["loss"])
    for name, value in expected.items():  # a layer used twice adds its gradients before the STE, not after
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)
    assert net.first.quantizer.decoded is None


def test_a_cache_stays_until_it_is_dropped() -> None:
    net, x = Net(), weights(5)
    StepWeights(net).decode(torch.float32)
    before = net(x)
    net.first.weight.data.mul_(2)
    assert torch.equal(net(x), before)
    StepWeights(net).drop()
    assert not torch.equal(net(x), before)


@pytest.mark.parametrize("way", [plainly, recomputed])
@pytest.mark.parametrize("state", ["learning", "frozen"])
@pytest.mark.parametrize("in_graph", [False, True], ids=["by linears", "in graph"])
def test_a_step_s_last_backward_drops_what_it_is_done_with(
    way: Callable[[Net, Tensor], Tensor], state: str, in_graph: bool
) -> None:
    net = Net()
    if state == "frozen":
        freeze_codes(net)
    learned = {name: p for name, p in net.named_parameters() if p.requires_grad}
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(5))
    quantizers = net.first.quantizer, net.second.quantizer

    def gradients(dropped: bool) -> list[Tensor]:
        StepWeights(net).decode(torch.float32)
        with ExitStack() as stack:
            if dropped:
                stack.enter_context(StepWeights(net).dropped_by_backward())
            if in_graph:
                stack.enter_context(StepWeights(net).in_graph(torch.float32))
            loss = way(net, x)
            assert all(q.values is not None for q in quantizers)
            loss.backward()
            assert all((q.values is None and q.decoded is None) == dropped for q in quantizers)
        found = [p.grad.clone() for p in learned.values()]
        net.zero_grad()
        StepWeights(net).drop()
        return found

    for ours, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(ours, expected)
    assert not any(p._post_accumulate_grad_hooks for p in learned.values())


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward, the layer's own parameters excepted."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x).sum()
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    return sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize("context", ["float32", "bf16"])
@pytest.mark.parametrize("with_cache", [False, True])
def test_a_fake_quantized_linear_saves_what_a_plain_one_saves(context: str, with_cache: bool) -> None:
    latent = weights(rows=64)
    layer = linear_of(quantizer_of(latent, Q4_0), latent)
    dtype = torch.bfloat16 if context == "bf16" else torch.float32
    if with_cache:
        StepWeights(layer).decode(dtype)
    x = torch.randn(3, 256, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=context == "bf16"):
        assert saved_bytes(layer, x) == x.nbytes
        assert saved_bytes(nn.Linear(256, 64), x) >= x.nbytes


def test_under_autocast_the_weight_is_rounded_once_and_is_exact() -> None:
    """DESIGN.md: quantize after the cast; Q4_0's values are bfloat16 values."""
    latent = weights(rows=64)
    layer = linear_of(quantizer_of(latent, Q4_0), latent)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.eye(256))
    assert y.dtype == torch.bfloat16
    bias = layer.bias.detach().to(torch.bfloat16)
    assert torch.equal(y, layer.quantizer.compute(latent)[0].T.to(torch.bfloat16) + bias)


def test_a_layer_without_gradients_to_learn_still_passes_them_on() -> None:
    latent = weights(rows=64)
    layer = linear_of(quantizer_of(latent, Q4_0), latent).requires_grad_(False)
    x = torch.randn(3, 256, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.quantizer.compute(latent)[0].sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, expected)
    assert all(p.grad is None for p in layer.parameters())


def test_compiled_kernels_pack_their_own_forward() -> None:
    """A compiler may contract and fold what it likes: what is packed is what the compiled forward computed."""
    kinds = ("normal", "zero blocks", "tiny", "ties")
    latents = [torch.from_numpy(np.concatenate([SAMPLES[kind] for kind in kinds])), weights(8)]
    quantizers = [quantizer_of(latent, grid) for latent, grid in zip(latents, LEARNED, strict=True)]
    eager = [made.pack(latent) for made, latent in zip(quantizers, latents, strict=True)]
    for made in quantizers:
        made.compiled = True
    group = WeightGroup(quantizers, latents)
    decoded = group.decode(torch.float32)
    in_graph = FakeQuantizeGroup.apply(group, torch.float32, *latents, *(q.scale_latent for q in quantizers))
    for i, made in enumerate(quantizers):
        made.values, made.steps = decoded[i]
        packed = made.pack(latents[i])
        assert torch.equal(packed.decode(), decoded[i][0])
        assert torch.equal(packed.decode(), in_graph[i])
        assert (packed.codes != eager[i].codes).float().mean() < 1e-3


def test_compiled_gradients_are_the_eager_ones() -> None:
    latents = [weights(4).requires_grad_(), weights(8).requires_grad_()]
    quantizers = [quantizer_of(latent, grid) for latent, grid in zip(latents, LEARNED, strict=True)]
    parameters = [*latents, *(q.scale_latent for q in quantizers)]

    def gradients(compiled: bool) -> tuple[Tensor, ...]:
        for made in quantizers:
            made.compiled = compiled
        decoded = FakeQuantizeGroup.apply(WeightGroup(quantizers, latents), torch.float32, *parameters)
        return torch.autograd.grad(sum(values.sin().sum() for values in decoded), parameters)

    for compiled, eager in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def test_scales_and_codes_are_part_of_the_state() -> None:
    latent = weights()
    frozen = in_case("frozen", latent)
    assert set(frozen.state_dict()) == {"scale_latent", "base", "codes"}
    assert set(in_case("canonical", latent).state_dict()) == {"scale_latent"}
    assert set(in_case("free", latent).state_dict()) == {"scale_latent", "base"}
    assert set(in_case("fixed q6_k", latent).state_dict()) == {"scale", "super_scale"}
