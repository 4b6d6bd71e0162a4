"""Attention in chunks gives what transformers' sdpa attention gives, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from intaglio.plan import activations
from intaglio.train.attention import attend_in_chunks, chunked_attention
from intaglio.train.sharding import final_hidden
from tests.support.training import small_corpus, small_model, small_plan
from tests.unit.test_fused import trained


class Layer(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SMALLEST_CHUNK", 5)


def mask_of(length: int, window: int | None, documents: bool) -> torch.Tensor:
    """Causal bool mask [1, 1, T, T]; of two documents where asked for."""
    place = torch.arange(length)
    seen = place[:, None] >= place
    if window is not None:
        seen &= place[:, None] - place < window
    if documents:
        seen &= (place[:, None] < 7) == (place < 7)
    return seen[None, None]


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("documents", [False, True, None])
def test_chunks_attend_as_sdpa_does(window: int | None, documents: bool | None) -> None:
    """documents None: no mask is given, as transformers does where causality says all."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, heads, 23, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    mask = mask_of(23, window, bool(documents))
    expected, _ = sdpa_attention_forward(Layer(), *tensors, mask, scaling=0.3)
    given = mask if documents is not None else None
    found, _ = chunked_attention(Layer(), *tensors, given, scaling=0.3, sliding_window=window)
    assert torch.allclose(found, expected, atol=1e-6)  # probabilities are float32
    weights = torch.randn_like(expected)
    grads = [torch.autograd.grad((out * weights).sum(), tensors) for out in (expected, found)]
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("recipe", ["q4_0", "mobile"])
def test_a_model_attends_in_chunks(recipe: str) -> None:
    """Packed documents, sliding windows, shared keys and values, and a quantized cache."""
    corpus = small_corpus()
    ids, positions = torch.from_numpy(corpus.tokens).long(), torch.from_numpy(corpus.positions).long()
    _, latents = trained(small_plan(recipe=recipe), torch.float32, is_fused=False, steps=1)
    plain, chunked = latents.model, copy.deepcopy(latents.model)
    attend_in_chunks(chunked)
    assert "chunked" in chunked.config._attn_implementation
    with torch.no_grad():
        expected, found = (final_hidden(model, ids, positions) for model in (plain, chunked))
    assert torch.allclose(found, expected, atol=2e-4)


def test_a_model_with_another_attention_keeps_it() -> None:
    model = small_model()
    model.set_attn_implementation("eager")
    attend_in_chunks(model)
    assert model.config._attn_implementation == "eager"
