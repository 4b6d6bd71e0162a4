"""The order of a run: files first, then what they are compared with; and what a failure there leaves alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from intaglio.errors import ConfigError, InputError, OutputError, RecipeError
from intaglio.formats.verify import verify
from intaglio.packed.model import FILE_NAME, PackedModel
from intaglio.plan.recipe import Recipe
from intaglio.progress import Progress
from intaglio.runs import bench, proof
from intaglio.runs import train as workflow
from intaglio.runs.compare import report
from intaglio.runs.proof import Evaluation
from intaglio.runs.train import run
from intaglio.train import loop
from intaglio.train.options import Options
from intaglio.train.pack import pack_model
from tests.support.cases import Case
from tests.support.cli import LOGS, contents, intaglio

SCHEDULE = {"tokens": 128, "batch_size": 2, "sequence_length": 32}
FILES = LOGS | {"packed", "model.gguf", "hf", "heldout.npy"}
REPORTS = {"report.html", "report.md", "report.json"}


@dataclass
class Log(Progress):
    """Stages of a run, with what the folder held when each began, and its notes."""

    out: Path
    stages: list[tuple[str, set[str]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def note(self, line: str) -> None:
        self.notes.append(line)

    def stage(self, name: str) -> None:
        self.stages.append((name, names(self.out)))

    def at(self, start: str) -> set[str]:
        return next(held for name, held in self.stages if name.startswith(start))


def names(out: Path) -> set[str]:
    return {path.split("/")[0] for path in contents(out)} - {"run.lock"}  # there while the run lasts


def train(case: Case, text: Path, out: Path, references: str, **schedule: Any) -> tuple[dict[str, Any], Log]:
    log = Log(out)
    run(
        case.checkpoint,
        Recipe.load("q4_0").with_schedule(**SCHEDULE | schedule),
        out,
        data=text,
        evaluation=Evaluation(text=text, tokens=64, window=32, references=references, prompts=("The whale",)),
        options=Options(precision="no", compiled=False),
        progress=log,
    )
    return json.loads((out / "report.json").read_text()), log


def kinds(values: dict[str, Any]) -> set[str]:
    return {row["kind"] for row in values["comparisons"] if row["comparison"]}


@pytest.fixture(scope="module")
def everything(cases: dict[str, Case], text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    out = tmp_path_factory.mktemp("references") / "run"
    return out, *train(cases["gemma4"], text, out, "all", gptq_tokens=64)


def test_the_files_are_there_before_anything_is_compared(everything: tuple[Any, ...]) -> None:
    out, _, log = everything
    order = [name for name, _ in log.stages]
    expected = ["Loading the original", "Reading text", "Training", "Packing", "Writing files"]
    expected += ["Making Stock rounding", "Making MSE fit", "Loading the original"]
    assert order[: len(expected)] == expected and order[len(expected)].startswith("Measuring")
    assert log.at("Packing") == LOGS | {"start"}
    assert log.at("Making Stock") == FILES | {"start"}
    assert log.at("Measuring") == FILES | {"stock", "stock.gguf", "fitted", "start"}
    for name in ("packed", "model.gguf", "hf"):
        assert f"{out / name}: holds what was trained, 0 bits differ" in log.notes


def test_the_start_is_measured_beside_what_training_added(everything: tuple[Any, ...]) -> None:
    out, values, _ = everything
    assert kinds(values) == {"stock", "fitted", "start", "trained"}
    kl = {row["kind"]: row["comparison"]["kl_mean_nats"] for row in values["comparisons"][1:5]}
    start = {"label": "GPTQ start"} | {f"kl_{kind}_nats": kl[kind] for kind in ("stock", "start", "trained")}
    assert values["start"] == start
    assert "its GPTQ start alone" in values["headline"]
    for name in ("report.md", "report.html"):
        assert "GPTQ start" in (out / name).read_text() and "s KL." in (out / name).read_text()
    assert set(values["samples"][0]["continuations"]) == {"Original", "Stock rounding", "MSE fit", "GPTQ start", "QAT"}
    assert set(values["layers"][0]["relative_rms"]) == {"stock", "fit", "GPTQ", "QAT"}


def test_the_start_that_is_measured_is_where_training_began(
    everything: tuple[Any, ...], gemma4: Case, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _ = everything
    packed, begun = PackedModel.open(out / "start"), out.parent / "begun"

    def stop(session: Any, *arguments: Any) -> None:
        pack_model(session.latents, begun / "first", assets=gemma4.checkpoint)
        raise InterruptedError

    monkeypatch.setattr(loop.Session, "run", stop)
    with pytest.raises(InterruptedError):
        train(gemma4, text, begun, "none", gptq_tokens=64)
    assert not (begun / "start").exists()
    first = load_file(begun / "first" / FILE_NAME)
    assert all(torch.equal(first[name], value) for name, value in load_file(packed.path / FILE_NAME).items())


def test_a_start_that_cannot_be_packed_stops_no_training(
    gemma4: Case, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = workflow.pack_model

    def fail(latents: Any, path: Path, **how: Any) -> None:
        if path.name == "start":
            raise OutputError("the disk is full")
        plain(latents, path, **how)

    monkeypatch.setattr(workflow, "pack_model", fail)
    values, _ = train(gemma4, text, tmp_path / "run", "all", gptq_tokens=64)
    assert {row["label"]: row["failure"] for row in values["comparisons"] if row["failure"]} == {
        "GPTQ start": "the disk is full"
    }


@pytest.mark.parametrize(("references", "made"), [("none", set()), ("stock", {"stock", "stock.gguf"})])
def test_references_can_be_left_out(references: str, made: set[str], gemma4: Case, text: Path, tmp_path: Path) -> None:
    values, _ = train(gemma4, text, tmp_path / "run", references)
    assert names(tmp_path / "run") == FILES | REPORTS | made
    assert kinds(values) == {"trained"} | ({"stock"} if made else set())
    assert values["headline"].startswith("QAT ") if made else values["headline"].endswith(", q4_0")


def test_a_word_that_is_no_choice_of_references(gemma4: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="references 'some': expected one of none, stock, all"):
        Evaluation(references="some")
    for arguments in (
        ["train", gemma4.checkpoint, f"--out={tmp_path / 'run'}"],
        ["report", tmp_path, f"--original={gemma4.checkpoint}"],
    ):
        outcome = intaglio(*arguments, "--references=some")
        assert outcome.code == 2 and "expected one of none, stock, all" in outcome.error
    outcome = intaglio("train", gemma4.packed.path, f"--out={tmp_path / 'run'}", "--references=none")
    assert outcome.code == 2 and "leave it out" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_report_measures_the_references_that_it_is_asked_for(
    everything: tuple[Any, ...], gemma4: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before, _ = everything
    options = [out, f"--original={gemma4.checkpoint}", "--references=stock"]
    assert intaglio("report", *options).code == 0
    values = json.loads((out / "report.json").read_text())
    assert kinds(values) == {"stock", "trained"}
    by_label = [{row["label"]: row for row in found["comparisons"]} for found in (before, values)]
    for label in ("Stock rounding", "QAT"):
        assert by_label[0][label] == by_label[1][label]


# Failures


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        ("quantize", RecipeError("Q6_K wants rows of 256")),
        ("make_files", ConfigError("the disk is odd")),
        ("quantize", torch.OutOfMemoryError("CUDA out of memory\nand more")),
    ],
)
def test_a_reference_that_fails_is_a_row_with_the_reason(
    failing: str, error: Exception, gemma4: Case, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = getattr(bench, failing)

    def fail(*arguments: Any, **how: Any) -> Any:
        if "stock" in map(str, arguments) or Path(str(arguments[2:3] and arguments[2])).name == "stock":
            raise error
        return plain(*arguments, **how)

    monkeypatch.setattr(bench, failing, fail)
    values, _ = train(gemma4, text, tmp_path / "run", "stock")
    packed = PackedModel.open(tmp_path / "run" / "packed")
    assert verify(packed, tmp_path / "run/model.gguf").exact and verify(packed, tmp_path / "run/hf").exact
    failed = [row for row in values["comparisons"] if row["failure"]]
    assert [(row["label"], row["failure"]) for row in failed] == [("Stock rounding", str(error).splitlines()[0])]
    assert kinds(values) == {"trained"}
    for name in ("report.md", "report.html"):
        assert "not measured: " in (tmp_path / "run" / name).read_text()


def test_an_artifact_that_cannot_be_run_is_a_row_with_the_reason(
    everything: tuple[Any, ...], gemma4: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _ = everything

    def fail(path: Path, *arguments: Any, **how: Any) -> Any:
        raise ConfigError("llama.cpp ended with signal 11 at the first window")

    monkeypatch.setattr(proof, "artifact_candidate", fail)
    monkeypatch.setattr(proof, "installed", lambda: True)
    result = report(gemma4.checkpoint, out, evaluation=Evaluation(references="stock"))
    failed = {row.label: row.failure for row in result.comparisons if row.failure}
    reason = "llama.cpp ended with signal 11 at the first window"
    assert failed == {"QAT, in llama.cpp": reason, "Stock rounding, in llama.cpp": reason}
    assert result.headline().startswith("QAT ")
    outcome = intaglio("report", out, f"--original={gemma4.checkpoint}", "--references=stock")
    assert outcome.code == 1 and f"QAT, in llama.cpp: not measured: {reason}" in " ".join(outcome.out.split())


@pytest.mark.parametrize("failing", ["open_original", "greedy"])
def test_an_original_that_cannot_be_measured_leaves_the_files(
    failing: str, gemma4: Case, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(proof, failing, fail)
    values, _ = train(gemma4, text, tmp_path / "run", "none")
    assert names(tmp_path / "run") == FILES | REPORTS
    failed = {row["label"]: row["failure"] for row in values["comparisons"] if row["failure"]}
    reason = "CUDA out of memory. Tried to allocate 20.00 GiB."
    assert failed == ({"QAT": reason} if failing == "open_original" else {})
    assert not values["samples"] or reason in values["samples"][0]["continuations"]["QAT"]


def test_a_report_does_without_a_reference_that_is_damaged(
    everything: tuple[Any, ...], gemma4: Case, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(everything[0], tmp_path / "run"))
    (out / "stock" / FILE_NAME).write_bytes(b"not a packed model")
    result = report(gemma4.checkpoint, out, evaluation=Evaluation(references="stock"))
    failed = {row.label: row.failure for row in result.comparisons if row.failure}
    assert list(failed) == ["Stock rounding"] and "not a valid safetensors file" in failed["Stock rounding"]
    assert {row.kind for row in result.comparisons if row.comparison} == {"trained"}
