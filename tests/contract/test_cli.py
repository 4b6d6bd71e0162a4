"""The verbs of the command line: what they print, write and return."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from intaglio import errors
from intaglio.formats.verify import verify
from intaglio.measure.tasks import Asking, TaskScore
from intaglio.packed.model import PackedModel
from intaglio.packed.origin import model_name
from intaglio.plan.plan import make_plan
from intaglio.runs import compare
from intaglio.sizing import planning
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR, TRAIN_TEXT
from tests.support.cases import Case
from tests.support.cli import LOGS, contents, intaglio, names_of_folders

VERBS = ["demo", "plan", "quantize", "train", "export", "inspect", "convert", "verify", "eval", "report"]
VERBS += ["chat", "doctor"]
SETTINGS = ["--set=schedule.tokens=512", "--set=schedule.batch_size=2", "--set=schedule.sequence_length=32"]
REPORTS = {"report.html", "report.md", "report.json"}


@pytest.fixture(scope="module")
def finished(cases: dict[str, Case], text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on the model's own text, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    options = ["--eval-tokens=256", f"--text={text}", "--prompt=The whale", "--precision=no", "--no-compile"]
    outcome = intaglio("train", cases["gemma4"].checkpoint, f"--out={out}", *options, *SETTINGS)
    assert outcome.code == 0, outcome.err
    return out, outcome.out


# Help and errors


def test_without_arguments_it_shows_its_verbs() -> None:
    outcome = intaglio()
    assert outcome.code == 2
    assert all(re.search(rf"\b{verb}\b", outcome.out + outcome.err) for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    outcome = intaglio(verb, "--help")
    assert outcome.code == 0
    assert "Usage: intaglio " + verb in outcome.out
    assert outcome.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["polish"], "No such command 'polish'"),
        (["plan"], "expected a model, or --all"),
        (["plan", "e2b", "--all"], "expected a model, or --all"),
        (["plan", "e2b", "--batch=0"], "Invalid value for '--batch'"),
        (["plan", "x", "--nope"], "No such option: --nope"),
        (["export", "x", "tensorrt", "--out=y"], "'tensorrt': expected one of gguf, hf"),
        (["eval", "x", "--original=y", "--text=z", "--eval-tokens=many"], "Invalid value for '--eval-tokens'"),
    ],
)
def test_wrong_use_is_a_message_and_exit_code_2(arguments: list[str], message: str) -> None:
    outcome = intaglio(*arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


ERRORS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.IntaglioError)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_each_error_has_its_exit_code(kind: type[errors.IntaglioError], monkeypatch: pytest.MonkeyPatch) -> None:
    message = "[weights.linear] is [bold]wrong[/bold], " + "and this line is not wrapped " * 10

    def fail(*args: object, **options: object) -> None:
        raise kind(message)

    monkeypatch.setattr(planning, "survey", fail)
    outcome = intaglio("plan", "x")
    assert (outcome.code, outcome.error, outcome.out) == (kind.exit_code, message, "")


def test_a_mistake_of_ours_stays_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(planning, "survey", fail)
    with pytest.raises(ZeroDivisionError):
        intaglio("plan", "x")


# plan, quantize, export, verify


def test_plan_prints_every_tensor(gemma4: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plan = make_plan(gemma4.checkpoint, "q4_0")
    outcome = intaglio("plan", gemma4.checkpoint, "--tensors")
    assert outcome.code == 0
    for tensor in plan:
        pattern = rf"{re.escape(tensor.name)}\b.* {tensor.grid.name} .* {tensor.size_bytes:,} .*{tensor.rule.name}"
        assert re.search(pattern, outcome.out), tensor.name
    assert f"{plan.size_bytes:,} bytes" in outcome.out
    assert plan.digest[:12] in outcome.out


def test_plan_as_json_with_overrides(gemma4: Case) -> None:
    outcome = intaglio("plan", gemma4.checkpoint, "--set=weights.token_embedding.grid=q8_0", "--json")
    found = json.loads(outcome.out)
    assert set(found) >= {"digest", "bytes", "tensors", "static_scales", "sizes", "kv_cache", "training"}
    grids = {row["tensor"]: row["grid"] for row in found["tensors"]}
    assert grids["model.embed_tokens.weight"] == "q8_0"
    assert found["bytes"] == sum(row["bytes"] for row in found["tensors"])
    assert found["digest"] != make_plan(gemma4.checkpoint, "q4_0").digest


def test_quantize_export_and_verify(gemma4: Case, tmp_path: Path) -> None:
    packed, gguf, hf = tmp_path / "packed", tmp_path / "model.gguf", tmp_path / "hf"
    assert intaglio("quantize", gemma4.checkpoint, f"--out={packed}").code == 0
    assert PackedModel.open(packed).sha256() == gemma4.packed.sha256()
    for target, path in (("gguf", gguf), ("hf", hf)):
        exported = intaglio("export", packed, target, f"--out={path}")
        assert exported.code == 0 and f"{path.name}: exact" in exported.out
        assert intaglio("verify", packed, path).out == exported.out
        found = json.loads(intaglio("verify", packed, path, "--json").out)
        assert found["exact"] is True and found["differing_codes"] == 0 and found["artifact"] == str(path)
        assert intaglio("export", packed, target, f"--out={path}").code == 2
        assert intaglio("export", packed, target, f"--out={path}", "--replace").code == 0
    assert gguf.read_bytes()[-4096:] == gemma4.gguf.read_bytes()[-4096:]


def test_an_artifact_that_differs_has_an_exit_code_of_its_own(gemma4: Case, tmp_path: Path) -> None:
    hf = Path(shutil.copytree(gemma4.hf, tmp_path / "hf"))
    weights = load_file(hf / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    outcome = intaglio("verify", gemma4.packed.path, hf)
    assert outcome.code == 3
    assert "hf: NOT exact: 1 of" in outcome.error and "export it again" in outcome.error
    outcome = intaglio("verify", gemma4.packed.path, hf, "--json")
    assert outcome.code == 3
    assert json.loads(outcome.out)["differing_values"] == 1


# train, report, eval


def test_a_run_leaves_everything_it_promises(finished: tuple[Path, str], gemma4: Case) -> None:
    run, printed = finished
    names = {path.split("/")[0] for path in contents(run)}
    assert names == REPORTS | {
        *LOGS,
        *("heldout.npy", "packed", "stock", "fitted"),
        *("model.gguf", "stock.gguf", "hf"),
    }
    assert "report.html" in printed and "QAT" in printed
    assert printed.count(": exact: ") == 2
    packed = PackedModel.open(run / "packed")
    assert verify(packed, run / "model.gguf").exact and verify(packed, run / "hf").exact
    said = {"method": "quantization-aware training", "data": "the model's own samples"}
    assert packed.provenance == {"name": model_name(gemma4.checkpoint), **said}


def test_the_report_says_what_was_measured(finished: tuple[Path, str]) -> None:
    report = json.loads((finished[0] / "report.json").read_text())
    kinds = [(row["kind"], bool(row["comparison"] and row["comparison"]["simulated"])) for row in report["comparisons"]]
    assert kinds[0] == ("original", False)
    assert set(kinds[1:]) == {
        ("stock", True),
        ("fitted", True),
        ("trained", True),
        ("stock", False),
        ("trained", False),
    }
    assert len(report["loss_curve"]) == 8
    assert [sample["prompt"] for sample in report["samples"]] == ["The whale"]
    assert "--prompt=The whale" in report["provenance"]["command"]
    assert "--text=text.txt" in report["provenance"]["command"]
    assert not names_of_folders({name: (finished[0] / name).read_bytes() for name in REPORTS})


def test_report_measures_again_and_rewrites_nothing_else(
    finished: tuple[Path, str], gemma4: Case, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    before = contents(run)
    outcome = intaglio("report", run, f"--original={gemma4.checkpoint}")
    assert outcome.code == 0
    after = contents(run)
    assert {name for name in after if after[name] != before.get(name)} <= REPORTS
    old, new = (json.loads(files["report.json"]) for files in (before, after))
    assert old["comparisons"] == new["comparisons"]


def test_report_asks_tasks_of_the_run_s_artifact_and_the_card_has_them(
    finished: tuple[Path, str], gemma4: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(artifact: Path, original: Path, tasks: str, asking: Asking, **how: object) -> list[TaskScore]:
        assert (artifact, original, tasks) == (run / "model.gguf", gemma4.checkpoint, "arc_easy,my.yaml")
        assert asking == Asking(limit=10, shots=2, chat_template=True, context_tokens=99)
        figures = {"score": 0.25, "stderr": 0.1, "original_score": 0.5, "original_stderr": 0.2}
        figures |= {"difference_stderr": 0.05, "recovered": 0.5}
        return [
            TaskScore(task="arc_easy", metric="acc", runtime="llama.cpp", samples=10, higher_is_better=True, **figures)
        ]

    monkeypatch.setattr(compare, "evaluate_tasks", ask)
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    options = ["--tasks=arc_easy,my.yaml", "--limit=10", "--shots=2", "--chat-template", "--context=99"]
    outcome = intaglio("report", run, f"--original={gemma4.checkpoint}", *options)
    assert outcome.code == 0 and re.search(r"arc_easy.* 0\.250 ± 0\.100 .* −0\.250 ± 0\.050 .*50\.0%", outcome.out)
    row = "| arc_easy | acc | 10 | 0.250 ± 0.100 | 0.500 ± 0.200 | −0.250 ± 0.050 | 50.0% |"
    assert row in (run / "report.md").read_text("utf-8") and "arc_easy" in (run / "report.html").read_text("utf-8")
    assert json.loads((run / "report.json").read_text())["tasks"][0]["difference_stderr"] == 0.05
    assert intaglio("export", run / "packed", "--to=gguf", f"--out={tmp_path / 'release'}").code == 0
    assert row in (tmp_path / "release" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("kind", "runtime"), [("gguf", "llama.cpp"), ("packed", "transformers"), ("hf", "transformers")]
)
def test_eval_measures_any_artifact(kind: str, runtime: str, gemma4: Case, text: Path) -> None:
    artifact = {"gguf": gemma4.gguf, "packed": gemma4.packed.path, "hf": gemma4.hf}[kind]
    command = ["eval", artifact, f"--original={gemma4.checkpoint}", f"--text={text}", "--eval-tokens=256"]
    found = json.loads(intaglio(*command, "--json").out)
    assert found["runtime"].startswith(runtime)
    assert found["simulated"] == (kind == "packed")
    assert 0 < found["kl_mean_nats"] < 0.1
    printed = intaglio(*command)
    assert printed.code == 0 and f"{found['perplexity_candidate']:.3f}" in printed.out


def test_the_original_equals_itself(gemma4: Case, text: Path) -> None:
    command = ["eval", gemma4.checkpoint, f"--original={gemma4.checkpoint}", f"--text={text}", "--eval-tokens=256"]
    found = json.loads(intaglio(*command, "--json").out)
    assert found["kl_mean_nats"] == pytest.approx(0, abs=1e-9)
    assert found["same_top_share"] == 1.0


def test_training_moves_the_codes(finished: tuple[Path, str]) -> None:
    trained, fitted = (PackedModel.open(finished[0] / kind) for kind in ("packed", "fitted"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(trained.decode(name), fitted.decode(name))


def test_quantize_with_text_lets_gptq_choose_codes(tmp_path: Path) -> None:
    """GPTQ without training is nearer to the bundled model than the fit alone, and stays on the canonical grid."""
    command, gptq = ["quantize", MODEL_DIR, "--out"], ["--data", HELDOUT_TEXT, "--set=schedule.gptq_tokens=8192"]
    assert intaglio(*command, tmp_path / "fit").code == 0
    assert intaglio(*command, tmp_path / "gptq", *gptq, "--set=schedule.sequence_length=128").code == 0
    kl = {}
    for name in ("fit", "gptq"):
        measured = intaglio(
            *(
                "eval",
                tmp_path / name,
                f"--original={MODEL_DIR}",
                f"--text={TRAIN_TEXT}",
                "--eval-tokens=4096",
                "--json",
            )
        )
        kl[name] = json.loads(measured.out)["kl_mean_nats"]
    assert kl["gptq"] < 0.85 * kl["fit"], kl
    packed = PackedModel.open(tmp_path / "gptq")
    assert packed.provenance["method"].startswith("fit mse, GPTQ on ")
    assert intaglio("export", tmp_path / "gptq", "gguf", "--out", tmp_path / "model.gguf").code == 0
    outcome = intaglio(*command, tmp_path / "none", "--set=schedule.gptq_tokens=8192")
    assert outcome.code == 2 and "GPTQ needs text, and there is none: give --data" in outcome.error
    assert not (tmp_path / "none").exists()
