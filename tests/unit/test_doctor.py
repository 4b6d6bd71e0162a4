"""The doctor: what it says of packages, GPUs and runtimes, and that no runtime's death is its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from intaglio.cli import app
from intaglio.runs import doctor as doctor_module
from intaglio.runs.doctor import FAULT, FINE, MISSING, USES, Fact, doctor
from tests.support.cli import intaglio

WORKS = {name: {"found": "runs"} for name in doctor_module.TRIED}
FOR_DEVELOPERS = {"dev", "docs", "release"}
TRIAL = """
import json, os, signal, time
for name in {names}:
    print("loading", name)
    print(json.dumps({{"name": name, "found": "runs", "gpus": []}}), flush=True)
os.write(2, b"ggml.c:1: GGML_ASSERT failed")
{fate}
"""


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial in which everything runs."""
    monkeypatch.setattr(doctor_module, "_trial", lambda: WORKS)


def named(facts: list[Fact]) -> dict[str, Fact]:
    """Facts by name; transformers is the runtime, since its package comes before."""
    return {fact.name: fact for fact in facts}


def test_every_extra_and_every_verb_is_in_the_table() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    assert {extra for _, _, extra in USES} - {"", "c++"} == set(project["optional-dependencies"]) - FOR_DEVELOPERS
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert {verb for verbs, _, _ in USES for verb in verbs.split(", ")} == commands - {"demo", "doctor"}


@pytest.mark.runtime
def test_it_runs_the_bundled_model_in_both_runtimes() -> None:
    outcome = intaglio("doctor", "--json")
    assert outcome.code == 0
    facts = named([Fact(**row) for row in json.loads(outcome.out)])
    assert facts["transformers"].found == "runs the bundled model"
    assert facts["llama.cpp"].found == "runs the bundled model as GGUF"
    assert facts["[llama]"].found == "llama-cpp-python 0.3.36"


@pytest.mark.parametrize(
    ("names", "fate", "message"),
    [
        (["torch", "transformers"], "os.kill(os.getpid(), signal.SIGSEGV)", "signal 11 while llama.cpp was tried"),
        (["torch"], "os.abort()", "while transformers was tried.*GGML_ASSERT failed"),
        ([], "time.sleep(600)", "gave no answer for .* while torch was tried"),
    ],
)
def test_a_trial_that_dies_or_hangs_is_one_fault(
    names: list[str], fate: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trial_of_the_test.py").write_text(TRIAL.format(names=names, fate=fate))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor_module, "TRIAL", "trial_of_the_test")
    monkeypatch.setattr(doctor_module, "TRIAL_SECONDS", 1.0 if "sleep" in fate else 60.0)
    tried = doctor_module._trial()
    name = doctor_module.TRIED[len(names)]
    assert re.search(message, tried[name][FAULT])
    assert set(tried) == {*names, name}
    facts = named(doctor())
    if name in doctor_module.TRIED[:2]:
        assert {fact.state for fact in facts.values() if fact.section == doctor_module.VERBS} == {FAULT}
    else:
        assert "not .gguf in llama.cpp [llama]" in facts["eval, report, chat"].advice
        assert facts["llama.cpp"].state == FAULT and facts["export"].state == FINE


def test_a_fault_has_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for fault in ({}, {"llama.cpp": {"fault": "died"}}):
        monkeypatch.setattr(doctor_module, "_trial", lambda fault=fault: WORKS | fault)
        assert intaglio("doctor").code == (1 if fault else 0)


def test_nothing_native_is_loaded(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom intaglio.runs import doctor\n"
        f"doctor._trial = lambda: {WORKS!r}\ndoctor.doctor()\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'llama_cpp') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_is_missing_or_does_not_fit_says_what_to_install(works: None, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"peft": "", "onnx": "1.10.0", "transformers": "9.0", "llama-cpp-python": "0.3.36"}
    real = doctor_module._version
    monkeypatch.setattr(doctor_module, "_version", lambda name: here.get(name, real(name)))
    facts = named(doctor())
    assert (facts["[lora]"].state, facts["[lora]"].advice) == (MISSING, "pip install 'intaglio[lora]'")
    assert facts["[onnx]"].state == FAULT and "onnx 1.10.0, not >=1.21" in facts["[onnx]"].found
    rows = [fact for fact in doctor() if fact.name == "transformers"]
    assert [fact.state for fact in rows] == [FAULT, FINE] and "<5.24" in rows[0].advice
    assert "schedule.lora_rank [lora]" in facts["train"].advice
    assert "onnx, web [onnx]" in facts["export"].advice


def test_a_gpu_that_torch_does_not_see_is_a_fault(works: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "NVIDIA", tmp_path / "version")
    assert named(doctor())["GPU"].state == MISSING
    (tmp_path / "version").touch()
    assert "install torch for CUDA" in named(doctor())["GPU"].advice
    gpus = {"torch": {"found": "2", "gpus": [{"name": "NVIDIA H200", "bytes": 150_000_000_000}] * 2}}
    monkeypatch.setattr(doctor_module, "_trial", lambda: WORKS | gpus)
    assert [fact.found for fact in doctor() if fact.name == "GPU"] == ["NVIDIA H200, 150 GB"] * 2
    assert next(fact for fact in doctor() if fact.name == "quantize").found.startswith("on 2 x NVIDIA H200")


def test_amx_is_named(works: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("model name\t: Some Processor\nflags\t\t: fpu amx_tile\n")
    monkeypatch.setattr("intaglio.measure.process.CPUINFO", tmp_path / "cpuinfo")
    assert "docs/gguf.md" in named(doctor())["processor"].advice


def test_programs_say_their_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, script in {"new": "echo version: 8200 '(abc)' >&2", "odd": "exit 3", "node": "echo v20.1.2"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = [doctor_module._program_version(name) for name in ("new", "odd", "node", "none")]
    assert found == ["8200", str(tmp_path / "odd"), "20.1.2", ""]


def test_a_page_fits_80_columns(works: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = intaglio("doctor")
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert all(fact.name in outcome.out for fact in doctor())
