"""The LiteRT export as far as it goes without LiteRT's environment: refusals, the hand-over, and the reader."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from intaglio.errors import ConfigError, InputError, RecipeError, RuntimeFailureError
from intaglio.formats.litert import read_tflite as tflite
from intaglio.formats.litert import write as litert
from intaglio.formats.litert.converter import ERROR_MARK
from intaglio.formats.litert.converter.worker import check_versions
from intaglio.formats.litert.read_flatbuffer import Budget, Table
from intaglio.formats.litert.read_tflite import read_message, unzip_tokenizer
from intaglio.formats.litert.write import export_litert, find_python
from intaglio.formats.verify import verify
from intaglio.numerics.fit import fit_absmax, fit_mse
from intaglio.numerics.grid import Q4_0_POSITIVE
from intaglio.packed.model import PackedModel
from intaglio.packed.write import write_packed
from tests.support.cli import intaglio
from tests.support.tiny import GEMMA3, GEMMA4, make_checkpoint, pack


@pytest.fixture
def no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAGLIO_RUNTIMES", str(tmp_path / "none"))


def interpreter(folder: Path, script: str) -> Path:
    """Something that is started as LiteRT's Python would be."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{script}", "utf-8")
    path.chmod(0o755)
    return path


def test_a_missing_environment_is_told_how_to_make(
    mobile_packed: PackedModel, tmp_path: Path, no_environment: None
) -> None:
    with pytest.raises(ConfigError, match=r"make \.runtimes/litert/\.done.*pip install -r .*requirements\.txt"):
        export_litert(mobile_packed, tmp_path / "x.litertlm")
    with pytest.raises(InputError, match="no such file: expected the interpreter"):
        find_python(tmp_path / "absent")
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_it_too(mobile_packed: PackedModel, tmp_path: Path, no_environment: None) -> None:
    outcome = intaglio("export", mobile_packed.path, "litert", "-o", tmp_path / "x.litertlm")
    assert outcome.code == 2 and "make .runtimes/litert/.done" in outcome.error
    outcome = intaglio("export", mobile_packed.path, "gemma-mobile", "--context", "64", "-o", tmp_path / "x")
    assert outcome.code == 2 and "--context is for the target litert" in outcome.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["q4_0", "q4_0-free"])
def test_negative_scales_are_refused(tmp_path: Path, name: str) -> None:
    packed = pack(make_checkpoint(tmp_path / "c", GEMMA4), tmp_path / "p", name)
    with pytest.raises(RecipeError, match=r"scales may be negative.*mobile or q4_0-litert"):
        export_litert(packed, tmp_path / "x.litertlm")


def test_another_family_is_refused(tmp_path: Path) -> None:
    packed = pack(make_checkpoint(tmp_path / "c", GEMMA3), tmp_path / "p")
    with pytest.raises(RecipeError, match="is for gemma4_text"):
        export_litert(packed, tmp_path / "x.litertlm")


@pytest.mark.parametrize(("context", "prefill"), [(1 << 20, None), (64, 65), (64, 1)])
def test_a_context_that_the_model_has_not_is_refused(
    mobile_packed: PackedModel, tmp_path: Path, context: int, prefill: int | None
) -> None:
    with pytest.raises(InputError, match="expected at most the model's 2048"):
        export_litert(mobile_packed, tmp_path / "x", context_tokens=context, prefill_tokens=prefill)


def test_half_an_int8_linear_is_refused(mobile_packed: PackedModel, tmp_path: Path) -> None:
    plan = mobile_packed.plan
    with write_packed(tmp_path / "p", plan, assets=mobile_packed.path, provenance={}) as writer:
        for tensor in plan.everything:
            writer.add(tensor.name, mobile_packed.read(tensor.name))
        writer.leave_static_off()
        writer.add_static("model.layers.0.self_attn.o_proj.input_activation_scale", 0.5)
    with pytest.raises(InputError, match=r"o_proj\.input_activation_scale = 0\.5, but .*: calibrate both, or set both"):
        export_litert(PackedModel.open(tmp_path / "p"), tmp_path / "x.litertlm")


def test_the_worker_gets_the_package_alone(
    mobile_packed: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSTARTUP", "ours")
    python = interpreter(
        tmp_path,
        "import json, os, sys\nfrom pathlib import Path\n"
        "seen = {'arguments': sys.argv[1:], 'package': os.listdir(os.environ['PYTHONPATH']),"
        " 'variables': sorted(name for name in os.environ if name.startswith('PYTHON'))}\n"
        "Path(sys.argv[4]).write_text(json.dumps(seen))\n",
    )
    export_litert(mobile_packed, tmp_path / "x.litertlm", python=python, context_tokens=64, prefill_tokens=8)
    seen = json.loads((tmp_path / "x.litertlm").read_text("utf-8"))
    assert seen["package"] == ["intaglio"]
    assert seen["variables"] == ["PYTHONHASHSEED", "PYTHONPATH"]
    assert seen["arguments"][:3] == ["-m", "intaglio.formats.litert.converter.worker", str(mobile_packed.path)]
    assert seen["arguments"][4:] == ["--context-tokens", "64", "--prefill-tokens", "8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["python", "x.litertlm"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (f"import sys\nprint('noise', {ERROR_MARK + 'say so'!r}, sep='\\n', file=sys.stderr)\nsys.exit(2)", "^say so$"),
        ("raise RuntimeError('of theirs')", r"converter ended with code 1: RuntimeError: of theirs"),
        ("import os\nos.abort()", r"converter ended with signal 6: it said nothing$"),
        ("import os\nos.kill(os.getpid(), 9)", r"signal 9; systems do this .* when memory runs out: it said nothing$"),
    ],
)
def test_a_worker_that_fails_is_one_message_and_leaves_nothing(
    mobile_packed: PackedModel, tmp_path: Path, script: str, message: str
) -> None:
    (tmp_path / "out").mkdir()
    error = RuntimeFailureError if "signal" in message else InputError
    with pytest.raises(error, match=message):
        export_litert(mobile_packed, tmp_path / "out/x.litertlm", python=interpreter(tmp_path, script))
    assert not list((tmp_path / "out").iterdir())


def test_other_versions_than_required_are_named(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("# numpy==0\nnumpy==0.1.0\n", "utf-8")
    with pytest.raises(InputError, match=r"has numpy .*, expected 0\.1\.0"):
        check_versions(tmp_path / "r.txt")
    (tmp_path / "r.txt").write_text("no-such-package==1\n", "utf-8")
    with pytest.raises(InputError, match=r"has no-such-package none, expected 1"):
        check_versions(tmp_path / "r.txt")
    assert litert.REQUIREMENTS.is_file()


@pytest.mark.parametrize("fit", [fit_mse, fit_absmax])
def test_positive_q4_0_steps_are_exact_in_half_and_bfloat16(fit) -> None:
    values = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 3, 8).unsqueeze(1)
    values[0, :32] = 0
    quantized = fit(values, Q4_0_POSITIVE)
    assert (quantized.step > 0).all()
    assert torch.equal(quantized.step.bfloat16().float(), quantized.step)
    assert torch.equal(quantized.decode().bfloat16().float(), quantized.decode())
    assert torch.equal(Q4_0_POSITIVE.encode(quantized.decode(), quantized.step), quantized.codes)


@pytest.mark.parametrize("data", [b"", b"LITERTLM", b"LITERTLM" + bytes(100), b"LITERTLM" + b"\xff" * 500])
def test_damaged_bundles_are_refused(mobile_packed: PackedModel, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.litertlm").write_bytes(data)
    with pytest.raises(ConfigError):
        verify(mobile_packed, tmp_path / "x.litertlm")


def test_a_flatbuffer_is_read_as_flatbuffers_are_written() -> None:
    # a table of three fields, the second of them absent: a 32-bit number and a list of two floats
    vtable = np.array([10, 12, 4, 0, 8], "<u2").tobytes() + bytes(2)
    table = np.array([12, 7, 8], "<i4").tobytes()
    data = np.frombuffer(
        vtable + table + bytes(4) + np.array([2], "<u4").tobytes() + np.array([1.5, -2], "<f4").tobytes(), np.uint8
    )
    read = Table(data, 12, Budget(data))
    assert read.number(0, "<i") == 7
    assert read.number(1, "<i") == 0
    assert read.vector(2, "<f4").tolist() == [1.5, -2.0]
    assert read.number(9, "<i") == 0


def test_a_message_is_read_as_protobuf_writes_it() -> None:
    # 1: 300, 2: "ab", 3: float32 0.5, 1 again: 1
    assert read_message(b"\x08\xac\x02\x12\x02ab\x1d\x00\x00\x00\x3f\x08\x01") == {
        1: [300, 1],
        2: [b"ab"],
        3: [b"\x00\x00\x00\x3f"],
    }


@pytest.mark.parametrize("data", [b"\x12\x05ab", b"\x0b", b"\x08\xff", b"\x12" + b"\xff" * 8 + b"\x7f"])
def test_a_damaged_message_is_an_error(data: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        read_message(data)


def test_a_tokenizer_that_would_fill_the_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tflite, "LARGEST_TOKENIZER", 1000)
    for size in (100, 100_000):
        section = np.frombuffer(size.to_bytes(8, "little") + zlib.compress(bytes(size)), np.uint8)
        if size == 100:
            assert unzip_tokenizer(section) == bytes(size)
        else:
            with pytest.raises(ValueError, match="1000 bytes of a tokenizer of 100000"):
                unzip_tokenizer(section)
    with pytest.raises(ValueError, match="no zlib stream"):
        unzip_tokenizer(np.zeros(100, np.uint8))
