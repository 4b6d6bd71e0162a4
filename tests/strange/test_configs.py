"""config.json: keys said twice, numbers that compute nothing, older spellings beside newer ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from intaglio.plan.family import describe, read_spec
from tests.support.strange import ITSELF, POINTER, SAME, Base, Input, file, judge, said, text
from tests.support.tiny import GEMMA3, GEMMA4, make_checkpoint

TWICE, NUMBER, ABOVE = "is said twice: remove one", "is no number of JSON", "expected a number above 0"
CONFIG = "config.json"
THETA = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
UNREAD = "transformers cannot (read|build) this config"


def config(**values: Any) -> Any:
    return said(CONFIG, **values)


def twice(key: str, value: Any) -> Any:
    return text(CONFIG, lambda found: f'{{"{key}": {json.dumps(value)}, {found.lstrip()[1:]}')


def number(key: str, value: str) -> Any:
    def change(found: str) -> str:
        return json.dumps(json.loads(found) | {key: "HERE"}).replace('"HERE"', value)

    return text(CONFIG, change)


INPUTS: dict[str, Input] = {
    "an eps before the one below": Input(twice("rms_norm_eps", 1e-3), TWICE, "silent"),
    "a window twice, both the same": Input(twice("sliding_window", 32), TWICE, "silent"),
    "a model_type twice": Input(twice("model_type", "gemma3_text"), TWICE, "silent"),
    "tied and not tied": Input(twice("tie_word_embeddings", False), TWICE, "silent"),
    "a width twice": Input(twice("hidden_size", 128), TWICE, "silent"),
    "a rope base twice, nested": Input(
        text(CONFIG, lambda t: t.replace('"rope_theta":', '"rope_theta": 1.0, "rope_theta":', 1)), TWICE, "silent"
    ),
    "eps NaN": Input(number("rms_norm_eps", "NaN"), NUMBER, "silent"),
    "eps Infinity": Input(number("rms_norm_eps", "Infinity"), NUMBER, "silent"),
    "softcap NaN": Input(number("final_logit_softcapping", "NaN"), NUMBER, "silent"),
    "softcap 1e999": Input(number("final_logit_softcapping", "1e999"), NUMBER, "silent"),
    "a dropout of -Infinity": Input(number("attention_dropout", "-Infinity"), NUMBER, "silent"),
    "eps 0": Input(config(rms_norm_eps=0.0), ABOVE, "silent"),
    "eps below 0": Input(config(rms_norm_eps=-1e-6), ABOVE, "silent"),
    "eps as text": Input(config(rms_norm_eps="1e-6"), UNREAD),
    "eps null": Input(config(rms_norm_eps=None), UNREAD),
    "eps missing: transformers' own": Input(said(CONFIG, "rms_norm_eps"), SAME),
    "another eps": Input(config(rms_norm_eps=1e-2), ITSELF),
    "window 0": Input(config(sliding_window=0), ABOVE, "traceback"),
    "window -1": Input(config(sliding_window=-1), ABOVE, "traceback"),
    "window 32.0": Input(config(sliding_window=32.0), UNREAD),
    "window null": Input(config(sliding_window=None), UNREAD),
    "window beyond the context": Input(config(sliding_window=1 << 20), SAME),
    "another window": Input(config(sliding_window=8), ITSELF),
    "softcap 0": Input(config(final_logit_softcapping=0.0), ABOVE, "silent"),
    "softcap below 0": Input(config(final_logit_softcapping=-30.0), ABOVE, "silent"),
    "softcap false": Input(config(final_logit_softcapping=False), UNREAD),
    "softcap null": Input(config(final_logit_softcapping=None), ITSELF),
    "no context": Input(config(max_position_embeddings=0), ABOVE, "silent"),
    "a head of half the size": Input(config(head_dim=32), "config and weights are of different models"),
    "more heads": Input(config(num_attention_heads=8), "config and weights are of different models"),
    "other heads of keys": Input(config(num_key_value_heads=3), "config and weights are of different models"),
    "a token more": Input(config(vocab_size=4097), "config and weights are of different models"),
    "a layer more": Input(config(num_hidden_layers=5), UNREAD),
    "keys that equal values": Input(config(attention_k_eq_v=True), "have no place in a gemma4_text"),
    "biases": Input(config(attention_bias=True), "q_proj.bias: a tensor of unknown role"),
    "experts without numbers": Input(config(enable_moe_block=True), UNREAD),
    "another activation": Input(config(hidden_activation="silu"), ITSELF),
    "another activation in the older key": Input(config(hidden_act="silu"), "hidden_act = ", "silent"),
    "the same activation in both keys": Input(config(hidden_act="gelu_pytorch_tanh"), SAME),
    "an encoder": Input(config(use_bidirectional_attention="all"), "this is an encoder", "silent"),
    "bidirectional images alone": Input(config(use_bidirectional_attention="vision"), SAME),
    "another head size in the older key": Input(config(global_head_dim=64), "global_head_dim = 64, but", "silent"),
    "the same head size in both keys": Input(config(global_head_dim=128), SAME),
    "another rope base in the older key": Input(config(rope_theta=5e5), "rope_theta = 500000.0, but", "silent"),
    "another base of windows": Input(config(rope_local_base_freq=2e4), "rope_local_base_freq = 20000.0", "silent"),
    "the same bases in both keys": Input(config(**THETA), SAME),
    "the older scaling beside the newer": Input(
        config(rope_scaling={"rope_type": "linear", "factor": 8.0}), "rope_scaling = .* and rope_param", "misleading"
    ),
    "a pattern of other layers": Input(config(sliding_window_pattern=3), "pattern = 3, but layer_types", "silent"),
    "the pattern of these layers": Input(config(sliding_window_pattern=2), SAME),
    "other layers": Input(config(layer_types=["full_attention"] * 4), UNREAD),
    "tied, as text": Input(config(tie_word_embeddings="false"), UNREAD),
    "an empty quantization_config": Input(config(quantization_config={}), "codes of {}, but all", "misleading"),
    "quantization_config as text": Input(config(quantization_config="awq"), "codes of 'awq', but", "misleading"),
    "quantization_config as a list": Input(config(quantization_config=[]), r"codes of \[\], but all", "misleading"),
    "quantization_config null": Input(config(quantization_config=None), SAME),
    "quantization of MLX null": Input(config(quantization=None), SAME),
    "a text_config of other values inside": Input(config(text_config={"rms_norm_eps": 1e-3}), "set both to the one"),
    "text_config null": Input(config(text_config=None), SAME),
    "the stored dtype": Input(config(torch_dtype="float16"), SAME),
    "code of somebody": Input(config(auto_map={"AutoModelForCausalLM": "x.Y"}), SAME),
    "a comment": Input(text(CONFIG, lambda t: "// mine\n" + t), "not valid JSON"),
    "a last comma": Input(text(CONFIG, lambda t: t.rstrip()[:-1] + ",}"), "not valid JSON"),
    "a byte order mark": Input(text(CONFIG, lambda t: t.encode("utf-8-sig")), "UTF-8 BOM"),
    "UTF-16": Input(text(CONFIG, lambda t: t.encode("utf-16")), "cannot be read as UTF-8"),
    "CRLF": Input(text(CONFIG, lambda t: t.replace("\n", "\r\n")), SAME),
    "a pointer of git-lfs": Input(file(CONFIG, POINTER), "git lfs pull", "misleading"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base.of(make_checkpoint(tmp_path_factory.mktemp("strange") / "base", GEMMA4))


@pytest.mark.parametrize("name", INPUTS)
def test_configs(name: str, base: Base, tmp_path: Path) -> None:
    judge(INPUTS[name], base, tmp_path)


# Gemma 3, whose older configs spell ropes and layers otherwise

FOUR = {key: value for key, value in GEMMA3.items() if key != "layer_types"} | {"rope_theta": 1e6}
FOUR |= {"rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
GEMMA3_INPUTS: dict[str, Input] = {
    "a config of transformers 4": Input(file(CONFIG, FOUR | {"sliding_window_pattern": 3}), ITSELF),
    "the same with another pattern": Input(
        file(CONFIG, FOUR | {"sliding_window_pattern": 2, "layer_types": GEMMA3["layer_types"]}),
        "sliding_window_pattern = 2, but layer_types",
        "silent",
    ),
    "an embedding model": Input(config(use_bidirectional_attention=True), "this is an encoder", "silent"),
    "a divisor of 0": Input(config(query_pre_attn_scalar=0), ABOVE, "misleading"),
    "another divisor": Input(config(query_pre_attn_scalar=256), ITSELF),
    "scores capped at 0": Input(config(attn_logit_softcapping=0.0), ABOVE, "silent"),
}


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base.of(make_checkpoint(tmp_path_factory.mktemp("strange") / "gemma3", GEMMA3))


@pytest.mark.parametrize("name", GEMMA3_INPUTS)
def test_configs_of_gemma3(name: str, gemma3: Base, tmp_path: Path) -> None:
    judge(GEMMA3_INPUTS[name], gemma3, tmp_path)


def test_none_of_the_family_contradicts_itself() -> None:
    """Google's published configs pass every check."""
    from intaglio.plan.bundled import bundled_config, bundled_names

    for name in bundled_names():
        describe(bundled_config(name))
    assert read_spec(Path(__file__).parents[2] / "src/intaglio/tiny/model").tied_head
