"""A run to the mobile format by the command line: every file it promises, measured with scales on and off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intaglio.formats.verify import verify
from intaglio.packed.model import PackedModel
from tests.support.cases import Case
from tests.support.cli import LOGS, contents, intaglio

SCHEDULE = {"tokens": 512, "batch_size": 2, "sequence_length": 32, "gptq_tokens": 128, "calibration_tokens": 128}
SETTINGS = [f"--set=schedule.{key}={value}" for key, value in SCHEDULE.items()]


@pytest.fixture(scope="module")
def run(cases: dict[str, Case], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mobile") / "run"
    options = [f"--data={text}", "--eval-tokens=256", f"--text={text}", "--prompt=The whale", "--no-compile"]
    command = ["train", cases["gemma4"].checkpoint, "--recipe=mobile", f"--out={out}", "--precision=no", *options]
    outcome = intaglio(*command, *SETTINGS)
    assert outcome.code == 0, outcome.err
    return out


def test_it_leaves_what_it_promises(run: Path) -> None:
    names = {path.split("/")[0] for path in contents(run)}
    reports = {"report.html", "report.md", "report.json"}
    folders = {"packed", "stock", "fitted", "start", "mobile", "stock-mobile"}
    assert names == reports | folders | {*LOGS, "heldout.npy"}
    packed = PackedModel.open(run / "packed")
    assert verify(packed, run / "mobile").exact
    assert all(value > 0 for value in packed.read_static().values())


def test_references_are_calibrated_and_differ_in_their_fit(run: Path) -> None:
    stock, fitted = (PackedModel.open(run / kind) for kind in ("stock", "fitted"))
    assert (stock.plan.recipe.fit, fitted.plan.recipe.fit) == ("absmax", "mse")
    assert all(value > 0 for packed in (stock, fitted) for value in packed.read_static().values())
    assert [t.grid for t in stock.plan] == [t.grid for t in fitted.plan]


def test_the_report_measures_with_scales_on_and_off(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    rows = {(row["kind"], row["variant"], row["comparison"]["simulated"]) for row in report["comparisons"][1:]}
    kinds, floats = ("stock", "fitted", "start", "trained"), "float activations"
    expected = {(kind, variant, True) for kind in kinds for variant in ("", floats)}
    assert rows == expected | {("stock", "", False), ("trained", "", False)}
    kl = {row["label"]: row["comparison"]["kl_mean_nats"] for row in report["comparisons"][1:]}
    assert kl["QAT"] != kl["QAT, float activations"]
    assert kl["QAT"] < kl["Absmax rounding"]


@pytest.mark.parametrize("arguments", [[], ["--int8-cache"]])
def test_eval_reads_a_packed_model_at_once_or_from_an_int8_cache(
    run: Path, gemma4: Case, text: Path, arguments: list[str]
) -> None:
    command = ["eval", run / "packed", f"--original={gemma4.checkpoint}", f"--text={text}", "--eval-tokens=256"]
    found = json.loads(intaglio(*command, *arguments, "--json").out)
    report = json.loads((run / "report.json").read_text())
    simulated = next(row["comparison"] for row in report["comparisons"] if row["label"] == "QAT")
    assert found["kl_mean_nats"] == pytest.approx(simulated["kl_mean_nats"], rel=0.05)


def test_quantize_with_text_calibrates(gemma4: Case, text: Path, run: Path, tmp_path: Path) -> None:
    command = ["quantize", gemma4.checkpoint, f"--data={text}", f"--out={tmp_path / 'packed'}", *SETTINGS]
    assert intaglio(*command, "--recipe=mobile").code == 0
    packed, fitted = PackedModel.open(tmp_path / "packed"), PackedModel.open(run / "fitted")
    assert packed.read_static() == pytest.approx(fitted.read_static(), rel=0.5)
    assert all(value > 0 for value in packed.read_static().values())
    outcome = intaglio(*command, "--recipe=q4_0", "--set=schedule.gptq_tokens=0", "--replace")
    assert outcome.code == 2 and "has no static scales to calibrate" in outcome.error


def test_an_int8_cache_needs_its_scales(gemma4: Case, text: Path) -> None:
    command = ["eval", "--int8-cache", f"--original={gemma4.checkpoint}", f"--text={text}", "--eval-tokens=256"]
    for artifact, message in (
        (gemma4.packed.path, "leaves the KV cache in floats"),
        (gemma4.hf, "only a packed model"),
    ):
        outcome = intaglio(*command, artifact)
        assert outcome.code == 2 and message in outcome.error


def test_a_mobile_recipe_trains_no_gemma3(cases: dict[str, Case], tmp_path: Path) -> None:
    outcome = intaglio("train", cases["gemma3"].checkpoint, "--recipe=mobile", f"--out={tmp_path / 'run'}")
    assert outcome.code == 2 and "is for gemma4_text" in outcome.error
    assert not (tmp_path / "run").exists()
