"""The transformers export, loaded by stock transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from intaglio.errors import WeightError
from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.verify import verify
from intaglio.packed.model import PackedModel
from intaglio.plan.recipe import Recipe
from tests.support.cases import Case
from tests.support.tiny import pack


def test_transformers_loads_the_trained_weights(case: Case) -> None:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(case.hf, output_loading_info=True)
    assert not info["missing_keys"] - {"lm_head.weight"} and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    state = model.state_dict()
    for tensor in case.packed.plan:
        exact = case.packed.decode(tensor.name)
        assert torch.equal(state[tensor.name].float().view(torch.int32), exact.view(torch.int32)), tensor.name


def test_the_config_has_every_spelling(case: Case) -> None:
    config = json.loads((case.hf / "config.json").read_text("utf-8"))
    assert config["dtype"] == "bfloat16"
    if case.name in ("gemma2", "gemma3"):
        assert config["architectures"] == [f"{case.name.title()}ForCausalLM"]
        return
    assert config["architectures"] == ["Gemma4ForCausalLM"]
    assert config["global_head_dim"] == 128 and config["per_layer_config"]["1"]["head_dim"] == 128
    assert config["num_global_key_value_heads"] == (1 if case.name == "gemma4-dense" else None)


def test_a_plan_that_is_not_portable_is_exported_in_float32(gemma4: Case, tmp_path: Path) -> None:
    recipe = Recipe.load("q4_0", ["weights.linear.grid=q4_0-free"])
    packed = pack(gemma4.checkpoint, tmp_path / "packed", recipe)
    export_hf(packed, tmp_path / "hf")
    assert verify(packed, tmp_path / "hf").exact
    assert json.loads((tmp_path / "hf/config.json").read_text("utf-8"))["dtype"] == "float32"
    assert {t.dtype for t in load_file(tmp_path / "hf/model.safetensors").values()} == {torch.float32}


def test_steps_that_bfloat16_cannot_hold_are_refused(packed_copy: PackedModel, tmp_path: Path) -> None:
    path = packed_copy.path / "packed.safetensors"
    parts = load_file(path)
    parts["model.layers.0.self_attn.q_proj.weight.scale"][5, 2] = 0.0123  # eleven significant bits
    plan = packed_copy.plan
    metadata = {"format": "intaglio-packed-1", "config": json.dumps(plan.model.config), "plan": plan.layout_digest}
    save_file(parts, path, metadata | {"recipe": plan.recipe.to_toml(), "provenance": "{}"})
    with pytest.raises(WeightError, match=r"layers\.0\.self_attn\.q_proj.*more significant bits"):
        export_hf(PackedModel.open(packed_copy.path), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == [packed_copy.path]
