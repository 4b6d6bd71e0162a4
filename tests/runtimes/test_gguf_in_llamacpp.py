"""Exported GGUF files in llama.cpp: the same tokens and the same logits as in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from intaglio.errors import ConfigError
from intaglio.measure.llamacpp import LlamaCpp
from intaglio.plan.recipe import Recipe
from tests.support.cases import Case, make_case, with_type
from tests.support.texts import CHAT, texts
from tests.support.tiny import GEMMA4, ROPES, VOCABULARY, with_rope

pytestmark = pytest.mark.runtime


def test_llamacpp_tokenizes_as_transformers_does(case: Case) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case.hf)
    strings = texts()
    assert len(strings) > 200
    with LlamaCpp(case.gguf, context_tokens=32, threads=1) as llama:
        for text in strings:
            assert llama.tokenize(text) == tokenizer(text)["input_ids"], text


def test_llamacpp_knows_the_special_tokens_and_the_template(gemma4: Case) -> None:
    with LlamaCpp(gemma4.gguf, context_tokens=32, threads=1) as llama:
        assert (llama.bos, llama.eos, llama.vocabulary) == (2, 1, VOCABULARY)
        assert llama.metadata()["tokenizer.chat_template"].startswith("{{- bos_token -}}")
        ids = llama.tokenize(CHAT, add_special=False)
        assert llama.detokenize(ids, special=True) == CHAT


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
    ids = [2, *torch.randint(300, VOCABULARY, (199,), generator=torch.Generator().manual_seed(1)).tolist()]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    with LlamaCpp(case.gguf, context_tokens=256, threads=1) as llama:
        found = llama.logits(ids).log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1)
    assert divergence.mean() < 5e-6
    assert (expected.argmax(-1) == found.argmax(-1)).float().mean() > 0.98
