"""Exported GGUF files in llama.cpp: the same tokens and the same logits as in transformers."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_cpp import Llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.cases import Case, make_case
from tests.support.texts import CHAT, texts
from tests.support.tiny import GEMMA4, ROPES, VOCABULARY, with_rope

pytestmark = pytest.mark.runtime


def test_llamacpp_tokenizes_as_transformers_does(case: Case) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case.hf)
    strings = texts()
    assert len(strings) > 200
    with closing(Llama(str(case.gguf), vocab_only=True, verbose=False)) as llama:
        for text in strings:
            found = llama.tokenize(text.encode(), add_bos=True, special=True)
            assert found == tokenizer(text)["input_ids"], text


def test_llamacpp_knows_the_special_tokens_and_the_template(gemma4: Case) -> None:
    with closing(Llama(str(gemma4.gguf), vocab_only=True, verbose=False)) as llama:
        assert (llama.token_bos(), llama.token_eos(), llama.n_vocab()) == (2, 1, VOCABULARY)
        assert llama.metadata["tokenizer.chat_template"].startswith("{{- bos_token -}}")
        ids = llama.tokenize(CHAT.encode(), add_bos=False, special=True)
        assert llama.detokenize(ids, special=True).decode() == CHAT


def test_llamacpp_computes_the_exported_model(case: Case) -> None:
    check_logits(case)


def test_llamacpp_computes_the_text_of_a_model_without_encoders(tmp_path: Path) -> None:
    check_logits(make_case("unified", tmp_path))


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
    arguments = {"n_ctx": 256, "n_batch": 256, "n_threads": 1, "logits_all": True, "type_k": 0, "type_v": 0}
    with closing(Llama(str(case.gguf), verbose=False, **arguments)) as llama:
        llama.eval(ids)
        found = torch.tensor(np.array(llama.scores[: len(ids)])).log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1)
    assert divergence.mean() < 5e-6
    assert (expected.argmax(-1) == found.argmax(-1)).float().mean() > 0.98
