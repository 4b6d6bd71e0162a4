"""An exported GGUF evaluated in llama.cpp itself, against transformers holding the same weights."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from intaglio.errors import ConfigError, InputError, RuntimeFailureError
from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.gguf.write import export_gguf
from intaglio.measure.evaluate import Candidate, evaluate_many, transformers_source
from intaglio.measure.llama_child import BATCH_TOKENS
from intaglio.measure.llamacpp import LlamaCpp, why_unusable
from tests.support.llama import is_alive, tokenizer_of
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
    assert torch.equal(llama.logits(windows[0]), first)
    assert first.shape == (64, 4096) and first.dtype == torch.float32


def test_a_window_longer_than_a_batch_is_one_window(llama: LlamaCpp, decoded):
    window = torch.randint(16, 4000, (BATCH_TOKENS + 40,), generator=torch.Generator().manual_seed(1))
    logits = llama.logits(window)
    torch.testing.assert_close(logits[:BATCH_TOKENS], llama.logits(window[:BATCH_TOKENS]))
    expected = transformers_source(decoded)(window)
    difference = (logits - expected).abs()
    assert difference[BATCH_TOKENS:].max() < 2 * difference[:BATCH_TOKENS].max() < 1


def test_tokenizer_agrees_with_transformers(files: dict[str, Path]):
    tokenizer, llama = AutoTokenizer.from_pretrained(files["checkpoint"]), tokenizer_of(files["gguf"])
    assert llama.tokenize(TEXT.encode(), special=True) == tokenizer(TEXT)["input_ids"]
    plain = llama.tokenize(TEXT.encode(), add_bos=False)
    assert 2 not in plain and 2 in llama.tokenize(TEXT.encode(), special=True)
    assert llama.detokenize(plain).decode().strip() == TEXT


def test_wrong_windows_are_refused_before_llama_cpp_sees_them(llama: LlamaCpp):
    for window, words in (([], "0 tokens"), ([5] * 601, "601 tokens"), ([-1], "from -1"), ([5, 4096], "to 4096")):
        with pytest.raises(InputError, match=words):
            llama.logits(window)


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
    with pytest.raises(InputError, match=r"pip install 'intaglio\[llama\]'"):
        LlamaCpp(files["gguf"])


def test_it_runs_in_a_process_of_its_own_without_torch(files: dict[str, Path]):
    assert why_unusable() is None
    program = """
import sys
from pathlib import Path
from intaglio.measure.llamacpp import LlamaCpp
with LlamaCpp(sys.argv[1], context_tokens=32, threads=1) as model:
    mapped = Path(f"/proc/{model._child.pid}/maps").read_text()
    assert "libllama" in mapped and "libtorch" not in mapped
    assert "libllama" not in Path("/proc/self/maps").read_text()
    print(model._child.pid)
"""
    done = subprocess.run([sys.executable, "-c", program, str(files["gguf"])], check=True, stdout=subprocess.PIPE)
    assert not is_alive(int(done.stdout))


@pytest.mark.parametrize(("how", "message"), [("SIGSEGV", "ended with signal 11"), ("SIGSTOP", "gave no answer for")])
def test_a_process_that_fails_at_a_window_is_a_clear_line(files: dict[str, Path], how: str, message: str):
    with LlamaCpp(files["gguf"], context_tokens=32, threads=1) as model:
        model.logits([2, 5])
        model._child._patience = 0.01
        os.kill(model._child.pid, getattr(signal, how))
        with pytest.raises(RuntimeFailureError, match=rf"^llama\.cpp {message} .*at window 2"):
            model.logits([2, 5])
    assert not is_alive(model._child.pid)


def peak_bytes(model: LlamaCpp) -> int:
    """Most address space that the model's process has had."""
    status = Path(f"/proc/{model._child.pid}/status").read_text()
    return int(status.partition("VmPeak:")[2].split()[0]) * 1024


def test_too_little_memory_is_a_failure_of_the_runtime(files: dict[str, Path]):
    """Whatever llama.cpp says to it, or dies of: it is no fault of the file."""
    with LlamaCpp(files["gguf"], context_tokens=2048, threads=1) as model:
        loaded = peak_bytes(model)
        model.logits([2] * 2048)
        used = peak_bytes(model)
    start = subprocess.Popen
    for limit in (loaded - (8 << 20), used - (68 << 20), used - (4 << 20)):
        limited = ["prlimit", f"--as={limit}", "--"]
        with (
            patch.object(subprocess, "Popen", lambda command, limited=limited, **how: start(limited + command, **how)),
            pytest.raises(RuntimeFailureError) as error,
            LlamaCpp(files["gguf"], context_tokens=2048, threads=1) as model,
        ):
            model.logits([2] * 2048)
        assert error.value.exit_code == 1


def test_without_extra_buffers_the_same_is_computed(
    files: dict[str, Path], llama: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Extra buffers are off, as on a processor with AMX. The kernels differ, and so does the order of their sums."""
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu amx_tile\n")
    monkeypatch.setattr("intaglio.measure.process.CPUINFO", tmp_path / "cpuinfo")
    window = torch.randint(16, 4000, (64,), generator=torch.Generator().manual_seed(2))
    with LlamaCpp(files["gguf"], context_tokens=64, threads=1) as plain:
        assert plain.version.endswith(", extra buffers off: the processor has AMX)")
        torch.testing.assert_close(plain.logits(window), llama.logits(window), atol=1e-3, rtol=1e-3)
