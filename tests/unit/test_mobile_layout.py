"""The layout of mobile folders: Google's bits and bytes for the real models, and bits of any other split."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from intaglio.formats.mobile.layout import module_bits, resolve_bits, stored_tensors
from intaglio.formats.mobile.write import mobile_config
from intaglio.formats.mobile.write_config import quantization_config
from intaglio.plan.carried import describe_whole
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from tests.support.tiny import GEMMA4, MULTIMODAL

GOLDEN = Path(__file__).parents[1] / "golden/mobile"
# Of google/gemma-4-E2B-it-qat-mobile-transformers: a file of 2,458,111,846 bytes with a header of 375,400
PUBLISHED_DATA_BYTES = 2_457_736_446


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))


def official_plan(size: str) -> Plan:
    """A file like Google's: unclipped towers, and k and v of the KV-shared layers."""
    config = golden(f"{size}.config")
    for tower in ("vision_config", "audio_config"):
        config[tower]["use_clipped_linears"] = False
    donors = describe_whole(config).kv_donors
    layers = [layer for layer, donor in enumerate(donors) if donor != layer]
    unused = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in layers for name in "kv"]
    return make_plan(describe_whole(config, unused), f"mobile-{size.lower()}")


@pytest.fixture(scope="module", params=["E2B", "E4B"])
def official(request: pytest.FixtureRequest) -> tuple[str, Plan]:
    return request.param, official_plan(request.param)


def test_the_reader_resolves_ours_as_it_resolves_googles(official: tuple[str, Plan]) -> None:
    size, plan = official
    theirs, ours = golden(f"{size}.quantization_config"), quantization_config(plan)
    bits = module_bits(plan)
    assert len(bits) > 400 and set(bits.values()) == {None, 2, 4, 8}
    for module, expected in bits.items():
        assert resolve_bits(module, theirs) == resolve_bits(module, ours) == expected, module
    assert ours["modules_to_not_convert"] == theirs["modules_to_not_convert"]
    assert {key: ours[key] for key in ("quant_method", "num_bits", "quantize_embeddings")} == {
        key: theirs[key] for key in ("quant_method", "num_bits", "quantize_embeddings")
    }


def test_the_bytes_are_googles() -> None:
    plan = official_plan("E2B")
    stored = stored_tensors(plan)
    assert sum(math.prod(t.shape) * t.dtype.itemsize for t in stored) == PUBLISHED_DATA_BYTES
    assert len({t.name for t in stored}) == len(stored) == 2780


def test_config_is_untied_and_whole(official: tuple[str, Plan]) -> None:
    plan = official[1]
    config = mobile_config(plan)
    assert config["architectures"] == ["Gemma4ForConditionalGeneration"]
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    text = mobile_config(plan.text_only())
    assert text["architectures"] == ["Gemma4ForCausalLM"] and text["model_type"] == "gemma4_text"
    assert not any("tower" in pattern for pattern in text["quantization_config"]["module_quant_configs"])


SPLITS = {
    "mobile": [],
    "o alone": ["weights.attention.match='[qkv]_proj'", "weights.o.roles=['attention']", "weights.o.grid=int8"],
    "float attention": ["weights.attention.grid=bf16"],
    "float head": ["weights.token_embedding.grid=f16", "weights.head.grid=f16"],
    "quantized model projection": ["weights.ple_model_projection.grid=int8"],
    "float table": ["weights.ple_embedding.grid=f16"],
    "third layer": ["weights.mlp_early.layers='2-2'", "weights.mlp_late.layers='0-3'"],
}


@pytest.mark.parametrize("whole", [False, True], ids=["text", "whole"])
@pytest.mark.parametrize("split", SPLITS)
def test_any_split_of_bits_can_be_said(split: str, whole: bool) -> None:
    plan = make_plan(describe_whole(MULTIMODAL if whole else GEMMA4), Recipe.load("mobile", SPLITS[split]))
    config = quantization_config(plan)
    for module, bits in module_bits(plan).items():
        assert resolve_bits(module, config) == bits


@pytest.mark.parametrize("split", SPLITS)
def test_older_readers_understand_it_too(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers up to 5.20 at least takes an entry for the beginning of a longer name."""

    def by_beginning(name: str, entries: list[str] | None = None) -> bool:
        return not any(re.match(entry, name) or name.endswith(entry) for entry in entries or [])

    monkeypatch.setattr("transformers.quantizers.quantizers_utils.should_convert_module", by_beginning)
    test_any_split_of_bits_can_be_said(split, whole=True)


def test_towers_stay_floats_where_a_recipe_says_nothing_of_them() -> None:
    plan = make_plan(describe_whole(MULTIMODAL), "mobile")
    towers = {m: bits for m, bits in module_bits(plan).items() if "tower" in m or "embed_vision" in m}
    assert len(towers) > 30 and set(towers.values()) == {None}
    assert plan["model.vision_tower.patch_embedder.input_proj.weight"].rule.name == "(no rule)"
