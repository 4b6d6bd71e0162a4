"""Exported GGUF files in llama.cpp: the same tokens and the same logits as in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from intaglio.errors import ConfigError
from intaglio.formats.gguf.write import export_gguf
from intaglio.formats.verify import verify
from intaglio.measure.llamacpp import LlamaCpp
from intaglio.packed.decoded import load_packed
from intaglio.plan.recipe import Recipe
from tests.support.cases import Case, make_case, with_type
from tests.support.llama import tokenizer_of
from tests.support.texts import CHAT, texts
from tests.support.tiny import GEMMA2, GEMMA4, ROPES, VOCABULARY, build, make_checkpoint, pack, with_rope

pytestmark = pytest.mark.runtime
IDS = [2, *torch.randint(300, VOCABULARY, (199,), generator=torch.Generator().manual_seed(1)).tolist()]


def test_llamacpp_tokenizes_as_transformers_does(case: Case) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case.hf)
    strings = texts()
    assert len(strings) > 200
    llama = tokenizer_of(case.gguf)
    for text in strings:
        assert llama.tokenize(text.encode(), special=True) == tokenizer(text)["input_ids"], text


def test_llamacpp_knows_the_special_tokens_and_the_template(gemma4: Case) -> None:
    llama = tokenizer_of(gemma4.gguf)
    assert (llama.token_bos(), llama.token_eos(), llama.n_vocab()) == (2, 1, VOCABULARY)
    assert llama.metadata["tokenizer.chat_template"].startswith("{{- bos_token -}}")
    ids = llama.tokenize(CHAT.encode(), add_bos=False, special=True)
    assert llama.detokenize(ids, special=True).decode() == CHAT


def test_llamacpp_computes_the_exported_model(case: Case) -> None:
    check_logits(case)


def test_llamacpp_computes_the_text_of_a_model_without_encoders(tmp_path: Path) -> None:
    check_logits(make_case("unified", tmp_path))


@pytest.mark.parametrize("name", ["gemma4", "gemma4-dense", "gemma3"])
def test_llamacpp_computes_two_bits(tmp_path: Path, name: str) -> None:
    check_logits(make_case(name, tmp_path, recipe="q2_0"))


def test_llamacpp_computes_rows_of_the_mobile_format(tmp_path: Path) -> None:
    check_logits(make_case("gemma4", tmp_path, recipe=Recipe.load("mobile", ["channel_scales=bf16"])))


def test_a_type_that_llamacpp_does_not_know_yet_is_said(gemma4: Case, tmp_path: Path) -> None:
    path = with_type(gemma4.gguf, tmp_path / "newer.gguf", "blk.0.ffn_up.weight", 77)
    with pytest.raises(ConfigError, match=r"invalid ggml type 77.*install llama-cpp-python 0\.3\.36 or later"):
        LlamaCpp(path, threads=1)


OTHERWISE: tuple[dict[str, Any], ...] = (
    {"attn_logit_softcapping": 2.1},
    {"final_logit_softcapping": 10.01},
    {"sliding_window": 31},
    {"layer_types": ["full_attention", "sliding_attention"] * 2},
    {"query_pre_attn_scalar": 60},
)


def test_llamacpp_caps_and_slides_as_gemma2_does(tmp_path: Path) -> None:
    """float32 rounds nothing to 8 bits: 2e-9 nats. A setting a little off gives 1000 times that."""
    config = GEMMA2 | {"final_logit_softcapping": 10.0}
    recipe = Recipe.load("q4_0", ["weights.linear.grid=f32", "weights.token_embedding.grid=f32"])
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config)
    packed = pack(checkpoint, tmp_path / "packed", recipe)
    export_gguf(packed, tmp_path / "model.gguf")
    assert verify(packed, tmp_path / "model.gguf").exact
    weights = load_packed(packed).state_dict()
    with LlamaCpp(tmp_path / "model.gguf", context_tokens=256, threads=1) as llama:
        found = llama.logits(IDS).log_softmax(-1)
    divergences = []
    for changes in ({}, *OTHERWISE):
        model = build(config | changes).eval()
        model.load_state_dict(weights)
        divergences.append(divergence_of(model, found))
    assert divergences[0] < 1e-8 and min(divergences[1:]) > 1000 * divergences[0]


SCALED = (
    *("half a share", "proportional, factor 8", "linear, full layers", "llama3"),
    "yarn without its factor on attention",
)


@pytest.mark.parametrize("name", SCALED)
def test_llamacpp_turns_as_a_scaled_rotary_embedding_asks(tmp_path: Path, name: str) -> None:
    check_logits(make_case(name, tmp_path, with_rope(GEMMA4, ROPES[name])))


def check_logits(case: Case) -> None:
    """200 tokens, six windows long. What is left is llama.cpp's 8-bit rounding of activations.

    Measured: 3e-7 to 2.5e-6 nats. A sliding window of one token less gives 7e-6 to 3e-5, another RoPE
    base 2e-5 to 2e-4, another soft-capping 5e-3.
    """
    model = AutoModelForCausalLM.from_pretrained(case.hf, dtype=torch.float32)
    with LlamaCpp(case.gguf, context_tokens=256, threads=1) as llama:
        found = llama.logits(IDS).log_softmax(-1)
    assert divergence_of(model, found) < 5e-6
    assert (expected_of(model).argmax(-1) == found.argmax(-1)).float().mean() > 0.98


def expected_of(model: Any) -> torch.Tensor:
    """Log probabilities that a model gives after each of IDS."""
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].log_softmax(-1)


def divergence_of(model: Any, found: torch.Tensor) -> float:
    """Mean KL in nats from a model's own probabilities to others, as logarithms, of the same text."""
    expected = expected_of(model)
    return float((expected.exp() * (expected - found)).sum(-1).mean())
