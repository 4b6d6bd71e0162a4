"""Layers that are recomputed and compiled learn what plain ones do, and keep less."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from intaglio.train.latents import owners_of, prepare
from intaglio.train.layers import set_layers
from intaglio.train.static import put_scales
from tests.support.layers import train
from tests.support.tiny import GEMMA4_UNIFIED_TEXT
from tests.support.training import SMALL, small_model, small_plan

SMALL_UNIFIED = GEMMA4_UNIFIED_TEXT | {"vocab_size": 256, "max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("config", "compiled"),
    [(SMALL, False), (SMALL, True), (SMALL_UNIFIED, True)],
    ids=["eager", "compiled, keys and values shared", "compiled, unified"],
)
def test_recomputed_layers_learn_the_same_and_keep_less(config: dict, compiled: bool) -> None:
    losses, kept = train(config)
    again, less = train(config, checkpointing=True, compiled=compiled)
    # compiled layers attend in chunks, whose sums have another order
    assert again == pytest.approx(losses, rel=1e-4 if compiled else 1e-6)
    assert less < kept / (3 if compiled else 4)  # torch 2.11 keeps what attention computes twice (see attention_bytes)


def test_names_stay_and_a_copy_runs_its_own_layers() -> None:
    model = small_model()
    names = owners_of(model).keys()
    set_layers(model, checkpointing=True)
    assert owners_of(model).keys() == names
    ids = torch.arange(3, 12)[None]
    before = model(input_ids=ids).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("model.layers.0.mlp.down_proj.weight").zero_()
    assert not torch.equal(other(input_ids=ids).logits, before)
    set_layers(model)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_layers_of_a_kind_share_a_compilation() -> None:
    """Sliding and full layers that own keys and values, lend them, or borrow them: six kinds of twelve layers."""
    layers = {"num_hidden_layers": 12, "num_kv_shared_layers": 6, "layer_types": SMALL["layer_types"] * 3}
    plan = small_plan("fit=absmax", recipe="mobile", config=SMALL | layers)
    model = prepare(small_model(SMALL | layers), plan).model
    put_scales(model, plan, {scale.name: 0.05 for scale in plan.static_scales if scale.owned})
    set_layers(model, compiled=True, backend=(counter := CompileCounter()))
    model(input_ids=torch.arange(3, 12)[None], use_cache=False)
    assert counter.frame_count == 6
