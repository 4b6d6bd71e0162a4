"""An exported GGUF evaluated in llama.cpp itself, against transformers holding the same weights."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from intaglio.errors import ConfigError, InputError
from intaglio.export.gguf import export_gguf
from intaglio.export.hf import export_hf
from intaglio.measure.evaluate import Candidate, evaluate_many, transformers_source
from intaglio.measure.llamacpp import BATCH_TOKENS, LlamaCpp
from tests.support.tiny import make_checkpoint, pack

pytestmark = pytest.mark.runtime

TEXT = "The river runs through the old town and <bos> out to sea; 日本 🙂 naïve"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random checkpoint, and its Q4_0 weights as a GGUF file and as a transformers folder."""
    root = tmp_path_factory.mktemp("llamacpp")
    checkpoint = make_checkpoint(root / "model")
    packed = pack(checkpoint, root / "packed")
    export_gguf(packed, root / "model.gguf")
    export_hf(packed, root / "decoded")
    return {"checkpoint": checkpoint, "gguf": root / "model.gguf", "decoded": root / "decoded"}


@pytest.fixture(scope="module")
def llama(files: dict[str, Path]):
    with LlamaCpp(files["gguf"], context_tokens=600, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def decoded(files: dict[str, Path]):
    return AutoModelForCausalLM.from_pretrained(files["decoded"], dtype=torch.float32)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    windows = torch.randint(16, 4000, (4, 64), generator=torch.Generator().manual_seed(0))
    windows[:, 0] = 2  # <bos>
    return windows


def test_artifact_is_its_weights_and_its_loss_is_theirs(files: dict[str, Path], llama: LlamaCpp, decoded, windows):
    """llama.cpp's own rounding (8-bit activations) is the floor; rounding weights costs far more."""
    teacher = AutoModelForCausalLM.from_pretrained(files["checkpoint"], dtype=torch.float32)
    artifact = Candidate(source=llama.logits, runtime=llama.version, simulated=False)
    simulation = Candidate(source=transformers_source(decoded), runtime="transformers", simulated=True)
    loss = evaluate_many(transformers_source(teacher), {"artifact": artifact, "simulation": simulation}, windows)
    floor = evaluate_many(transformers_source(decoded), {"artifact": artifact}, windows)["artifact"]
    assert loss["artifact"].runtime.startswith("llama.cpp (llama-cpp-python ")
    assert floor.kl_mean_nats < 0.1 * loss["simulation"].kl_mean_nats
    assert loss["artifact"].kl_mean_nats == pytest.approx(loss["simulation"].kl_mean_nats, rel=0.1)
    assert floor.perplexity_ratio == pytest.approx(1, abs=0.01)


def test_windows_leave_no_trace_in_the_next(llama: LlamaCpp, windows: Tensor):
    first = llama.logits(windows[0])
    llama.logits(windows[1])
    llama.greedy(windows[2], 3)
    assert torch.equal(llama.logits(windows[0]), first)
    assert first.shape == (64, 4096) and first.dtype == torch.float32


def test_a_window_longer_than_a_batch_is_one_window(llama: LlamaCpp, decoded):
    window = torch.randint(16, 4000, (BATCH_TOKENS + 40,), generator=torch.Generator().manual_seed(1))
    logits = llama.logits(window)
    torch.testing.assert_close(logits[:BATCH_TOKENS], llama.logits(window[:BATCH_TOKENS]))
    expected = transformers_source(decoded)(window)
    difference = (logits - expected).abs()
    assert difference[BATCH_TOKENS:].max() < 2 * difference[:BATCH_TOKENS].max() < 1


def test_greedy_follows_the_largest_logit(llama: LlamaCpp):
    prompt = llama.tokenize("The river runs")
    tokens = llama.greedy(prompt, 8)
    assert 0 < len(tokens) <= 8
    logits = llama.logits(prompt + tokens)
    for position, token in enumerate(tokens, start=len(prompt) - 1):
        # one token at a time takes other kernels than a window, so near ties may fall either way
        assert logits[position, token] > logits[position].max() - 0.05
    assert llama.greedy(prompt, 0) == []


def test_tokenizer_agrees_with_transformers(files: dict[str, Path], llama: LlamaCpp):
    tokenizer = AutoTokenizer.from_pretrained(files["checkpoint"])
    assert llama.tokenize(TEXT) == tokenizer(TEXT)["input_ids"]
    plain = llama.tokenize(TEXT, add_special=False, parse_special=False)
    assert 2 not in plain and 2 in llama.tokenize(TEXT)
    assert llama.detokenize(plain).strip() == TEXT
    assert llama.detokenize([]) == ""


def test_wrong_windows_are_refused_before_llama_cpp_sees_them(llama: LlamaCpp):
    for window, words in (([], "0 tokens"), ([5] * 601, "601 tokens"), ([-1], "from -1"), ([5, 4096], "to 4096")):
        with pytest.raises(InputError, match=words):
            llama.logits(window)
    with pytest.raises(InputError, match="598 tokens and 8 to come: expected 1 to 600"):
        llama.greedy([5] * 598, 8)


def test_files_that_do_not_load_say_why(files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    whole = files["gguf"].read_bytes()
    broken = {"cut.gguf": whole[: len(whole) // 2], "noise.gguf": b"GGUF" + bytes(range(200)), "empty.gguf": b""}
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=rf"{name}: llama.cpp cannot load this model: \w+") as error:
            LlamaCpp(tmp_path / name)
        assert "it gave no reason" not in str(error.value)
    with pytest.raises(ConfigError, match="no such file"):
        LlamaCpp(tmp_path / "missing.gguf")
    assert capfd.readouterr() == ("", "")


def test_closing_twice_is_fine_and_using_it_afterwards_is_not(files: dict[str, Path]):
    model = LlamaCpp(files["gguf"], context_tokens=32, threads=1)
    assert math.isfinite(float(model.logits([2, 5]).sum()))
    model.close()
    model.close()
    with pytest.raises(ValueError, match="closed"):
        model.logits([2, 5])


def test_missing_package_names_the_extra(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", None)
    with pytest.raises(InputError, match=r"pip install 'intaglio\[llama\]'"):
        LlamaCpp(files["gguf"])
