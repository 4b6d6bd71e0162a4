"""A runtime that dies, hangs or is not there costs its own rows of a report, and nothing else of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from intaglio.errors import InputError
from intaglio.measure import llamacpp
from intaglio.runs import train as workflow
from tests.support.cases import Case
from tests.support.cli import Outcome, intaglio
from tests.support.llama import library, running, stand_in

SETTINGS = ["--set=schedule.tokens=128", "--set=schedule.batch_size=2", "--set=schedule.sequence_length=32"]
DIED = "llama.cpp ended with signal 11 at the first window; see docs/gguf.md"
IN_LLAMA = {"QAT, in llama.cpp", "Stock rounding, in llama.cpp"}


@dataclass(frozen=True)
class Run:
    out: Path
    outcome: Outcome
    checkpoint: Path

    def failures(self) -> dict[str, str]:
        """Rows of the report that were not measured, with the reason."""
        rows: list[dict[str, Any]] = json.loads((self.out / "report.json").read_text())["comparisons"]
        assert all((row["comparison"] is None) == (bool(row["failure"]) or row["kind"] == "original") for row in rows)
        return {row["label"]: row["failure"] for row in rows if row["failure"]}


@pytest.fixture(scope="module")
def run(cases: dict[str, Case], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A training whose llama.cpp died of SIGSEGV at the first window."""
    folder, checkpoint = tmp_path_factory.mktemp("runtime"), cases["gemma4"].checkpoint
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in(monkeypatch, folder / "child", do="decode", fate="SIGSEGV")
        options = [f"--text={text}", f"--data={text}", "--eval-tokens=256", "--precision=no", "--no-compile"]
        outcome = intaglio("train", checkpoint, f"--out={folder / 'run'}", *options, *SETTINGS)
        assert running(folder / "child") == []
    yield Run(folder / "run", outcome, checkpoint)


def test_a_training_whose_runtime_dies_has_all_its_files(run: Run) -> None:
    assert run.outcome.code == 0, run.outcome.err
    names = {path.name for path in run.out.iterdir()}
    assert names >= {"packed", "model.gguf", "hf", "report.html", "report.md", "report.json"}
    assert run.failures() == dict.fromkeys(IN_LLAMA, DIED)
    for label in IN_LLAMA:
        assert f"{label}: not measured: {DIED}" in run.outcome.err.replace("\n", "")  # as it happens
        assert f"{label}: not measured: {DIED}" in run.outcome.out.replace("\n", "")  # below the table
    assert f"not measured: {DIED}" in (run.out / "report.html").read_text()
    assert "| not measured: llama.cpp ended with signal 11" in (run.out / "report.md").read_text()


@pytest.mark.parametrize(
    ("do", "fate", "code", "message"),
    [
        ("load", "SIGKILL", 1, r"llama.cpp ended with signal 9 while it loaded "),
        ("decode", "hang", 1, r"llama.cpp gave no answer for 0.6 s at the first window"),
        ("start", "garbage", 1, r"llama.cpp answered "),
        ("none", "exit", 0, None),
    ],
)
def test_a_report_that_lacks_a_runtime_is_written_and_ends_with_1(
    do: str, fate: str, code: int, message: str | None, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fate == "hang":
        monkeypatch.setattr(llamacpp, "work_seconds", lambda *work: 0.6)
    folder = stand_in(monkeypatch, tmp_path / "child", do=do, fate=fate)
    outcome = intaglio("report", run.out, f"--original={run.checkpoint}")
    assert outcome.code == code, outcome.err
    failures = run.failures()
    assert set(failures) == (IN_LLAMA if message else set())
    assert all(reason.startswith(message) for reason in failures.values())
    assert running(folder) == []


def test_a_measurement_that_was_asked_for_ends_with_1(
    gemma4: Case, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("eval", gemma4.gguf, f"--original={gemma4.checkpoint}", f"--text={text}", "--eval-tokens=256")
    stand_in(monkeypatch, tmp_path / "child", do="decode", fate="SIGSEGV")
    outcome = intaglio(*arguments)
    assert (outcome.code, outcome.error, outcome.out) == (1, DIED, "")
    monkeypatch.setenv("INTAGLIO_PATIENCE", "long")
    assert intaglio(*arguments).code == 2


@pytest.mark.parametrize(
    ("text_of_library", "reason"),
    [
        ("raise RuntimeError('Failed to load shared library')", "is installed but cannot be loaded (RuntimeError: Fai"),
        ("import os; os.kill(os.getpid(), 11)", "llama.cpp ended with signal 11 while its library was loaded"),
        (None, "llama-cpp-python is not installed: pip install"),
    ],
)
def test_what_will_not_be_measured_is_said_before_the_training(
    text_of_library: str | None, reason: str, gemma4: Case, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise InputError("here the training begins")

    monkeypatch.setattr(workflow, "train", stop)
    if text_of_library is None:
        monkeypatch.setattr(llamacpp, "installed", lambda: False)
    else:
        library(monkeypatch, tmp_path, text_of_library)
    outcome = intaglio("train", gemma4.checkpoint, f"--out={tmp_path / 'run'}", f"--data={text}", *SETTINGS)
    assert (outcome.code, outcome.error) == (2, "here the training begins")
    assert "No artifact will be run in llama.cpp: " in outcome.err and reason in outcome.err
