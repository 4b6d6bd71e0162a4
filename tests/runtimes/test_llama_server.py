"""A drafter in llama.cpp's own server: the same text as without it, and as many drafts accepted as we work out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.runners.start import program_of
from intaglio.drafter.accept import chances, rounds
from intaglio.errors import ConfigError
from intaglio.formats.gguf.write import export_gguf
from intaglio.measure.llama_server import LlamaServer
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.decoded import load_packed
from intaglio.packed.model import PackedModel
from intaglio.runs.proof import Evaluation
from intaglio.runs.texts import read_windows
from intaglio.tiny import DRAFTER_DIR, HELDOUT_TEXT, MODEL_DIR
from intaglio.tiny.clustered import write_clustered_drafter
from tests.support.tiny import pack

pytestmark = pytest.mark.environment

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 12, 32, 160  # beyond the window of 128 tokens
DRAFT_TOKENS = 3


@dataclass(frozen=True)
class Packed:
    model: PackedModel
    gguf: Path


def made(folder: Path, source: Path, recipe: str) -> Packed:
    model = pack(source, folder / "packed", recipe)
    export_gguf(model, folder / "model.gguf")
    return Packed(model, folder / "model.gguf")


@pytest.fixture(scope="module")
def program() -> Path:
    return program_of("llamacpp", "llama-server")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return made(tmp_path_factory.mktemp("target"), MODEL_DIR, "q4_0")


@pytest.fixture(scope="module", params=["tied", "clustered"])
def drafter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The bundled one, as it is and with a clustered head, of which llama.cpp knows nothing."""
    folder = tmp_path_factory.mktemp("drafter")
    source = DRAFTER_DIR if request.param == "tied" else write_clustered_drafter(folder / "source")
    return made(folder, source, "drafter-q4_0")


@pytest.fixture(scope="module")
def prompts() -> Tensor:
    """int64 [PROMPTS, PROMPT_TOKENS]"""
    text = Evaluation(text=HELDOUT_TEXT, tokens=PROMPTS * PROMPT_TOKENS, window=PROMPT_TOKENS)
    return torch.from_numpy(read_windows(text, 4096, load_tokenizer(MODEL_DIR))).long()


def test_the_text_is_the_same_and_drafts_are_accepted(
    program: Path, target: Packed, drafter: Packed, prompts: Tensor
) -> None:
    with LlamaServer(target.gguf, threads=1, program=program) as server:
        alone = [server.complete(prompt.tolist(), NEW_TOKENS, past_end=True) for prompt in prompts]
    with LlamaServer(target.gguf, draft=drafter.gguf, draft_tokens=DRAFT_TOKENS, threads=1, program=program) as server:
        drafted = [server.complete(prompt.tolist(), NEW_TOKENS, past_end=True) for prompt in prompts]
    assert [one.tokens for one in drafted] == [one.tokens for one in alone]
    assert all(len(one.tokens) == NEW_TOKENS and one.drafted == 0 for one in alone)

    expected = expected_acceptance(target, drafter, torch.cat([prompts, torch.tensor([a.tokens for a in alone])], 1))
    accepted, proposed = sum(one.accepted for one in drafted), sum(one.drafted for one in drafted)
    seconds = [sum(one.seconds for one in texts) for texts in (alone, drafted)]
    print(f"{accepted} of {proposed} drafts accepted, {expected:.1%} expected; {seconds[0] / seconds[1]:.2f} x as fast")
    assert proposed > PROMPTS * NEW_TOKENS / 2
    assert accepted / proposed == pytest.approx(expected, abs=0.01)
    assert accepted / proposed > 0.2


def expected_acceptance(target: Packed, drafter: Packed, texts: Tensor) -> float:
    """Share of the drafts that are the tokens of these texts, by our own forward; llama.cpp takes the tied head."""
    forward = load_packed(drafter.model)
    forward.config.use_ordered_embeddings = False
    chance = chances(load_packed(target.model), forward, texts, PROMPT_TOKENS)
    return rounds(chance, DRAFT_TOKENS).accepted


def test_sampled_text_takes_drafts_too(program: Path, target: Packed, drafter: Packed, prompts: Tensor) -> None:
    with LlamaServer(target.gguf, draft=drafter.gguf, draft_tokens=2, threads=1, program=program) as server:
        texts = [server.complete(prompts[0].tolist(), 24, temperature=1.0, seed=n, past_end=True) for n in (1, 2)]
    assert texts[0].tokens != texts[1].tokens
    assert all(0 < one.checks <= one.drafted <= 2 * one.checks for one in texts)


def test_a_model_that_is_no_drafter_is_refused(program: Path, target: Packed) -> None:
    with pytest.raises(ConfigError, match="llama-server does not run this model"):
        LlamaServer(target.gguf, draft=target.gguf, threads=1, program=program)
