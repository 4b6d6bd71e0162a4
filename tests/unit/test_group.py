"""Weights that kernels take as one: what they decode to and learn is what each does alone."""

import pytest
import torch
from torch import Tensor

from intaglio.train.group import FakeQuantizeGroup, WeightGroup
from tests.unit.test_fakequant import CASES, in_case, weights

each_case = pytest.mark.parametrize("case", CASES)


def group_of(cases: list[str], dtype: torch.dtype, compiled: bool) -> WeightGroup:
    latents = [weights(rows=3 + i, seed=i).to(dtype).requires_grad_() for i in range(len(cases))]
    quantizers = [in_case(case, latent) for case, latent in zip(cases, latents, strict=True)]
    for quantizer in quantizers:
        quantizer.compiled = compiled
    return WeightGroup(quantizers, latents)


def parameters(group: WeightGroup) -> list[Tensor | None]:
    return [*group.latents, *(q.scale_latent for q in group.quantizers)]


def decoded_and_gradients(group: WeightGroup) -> list[Tensor]:
    """Values in the group's order, then the gradients that there are."""
    decoded = FakeQuantizeGroup.apply(group, torch.float32, *parameters(group))
    sum((values * torch.arange(values.numel()).view(values.shape).sin()).sum() for values in decoded).backward()
    return [*decoded, *(p.grad for p in parameters(group) if p is not None and p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_weights_taken_as_one_are_those_taken_alone(case: str, dtype: torch.dtype, uncompiled: None) -> None:
    cases = [case, "canonical", case, case]  # the odd one in between must not change the order
    expected = decoded_and_gradients(group_of(cases, dtype, compiled=False))
    found = decoded_and_gradients(group_of(cases, dtype, compiled=True))
    assert len(found) == len(expected)
    for ours, alone in zip(found[:4], expected[:4], strict=True):
        assert torch.equal(ours, alone)
    for ours, alone in zip(found[4:], expected[4:], strict=True):  # an exponential's last bit depends on its place
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-6)


@each_case
def test_they_share_memory_until_the_group_is_closed(case: str, uncompiled: None) -> None:
    group = group_of([case, case], torch.float32, compiled=True)
    before = [w.detach().clone() for w in group.latents]
    places = {w.untyped_storage().data_ptr() for w in group.latents}
    assert len(places) == 1
    with torch.no_grad():
        group.latents[1].mul_(2)  # as an optimizer would: the kernels must see it
    alone = group.quantizers[1].compute(group.latents[1])[0]
    assert torch.equal(group.decode(torch.float32)[1][0], alone)
    group.close()
    assert torch.equal(group.latents[0], before[0]) and torch.equal(group.latents[1], 2 * before[1])
    owned = [t for t in (*parameters(group), *(q.codes for q in group.quantizers)) if t is not None]
    storages = [t.untyped_storage() for t in owned]
    assert len({s.data_ptr() for s in storages}) == len(owned)
    assert [s.nbytes() for s in storages] == [t.nbytes for t in owned]


def test_a_transposed_latent_is_seen_as_it_changes(uncompiled: None) -> None:
    latent = weights(rows=256, columns=64).T.requires_grad_()
    quantizer = in_case("canonical", latent)
    quantizer.compiled = True
    group = WeightGroup([quantizer], [latent])
    with torch.no_grad():
        latent.mul_(2)
    assert torch.equal(group.decode(torch.float32)[0][0], quantizer.compute(latent)[0])
