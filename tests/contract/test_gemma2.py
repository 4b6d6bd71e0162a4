"""A Gemma 2 from a checkpoint to what ships: trained, packed, exported, read back and run in llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.cli import intaglio
from tests.support.tiny import GEMMA2, make_checkpoint

SETTINGS = ["--set=schedule.tokens=256", "--set=schedule.batch_size=2", "--set=schedule.sequence_length=64"]


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("gemma2")
    checkpoint = make_checkpoint(folder / "checkpoint", GEMMA2)
    options = ["--eval-tokens=256", f"--text={text}", "--references=none", "--precision=no"]
    outcome = intaglio("train", checkpoint, f"--data={text}", f"--out={folder / 'run'}", *options, *SETTINGS)
    assert outcome.code == 0, outcome.err
    return folder / "run"


@pytest.mark.runtime
def test_what_was_trained_is_what_llamacpp_runs(run: Path) -> None:
    rows = {row["label"]: row["comparison"] for row in json.loads((run / "report.json").read_text())["comparisons"]}
    assert rows["QAT, in llama.cpp"]["kl_mean_nats"] == pytest.approx(rows["QAT"]["kl_mean_nats"], abs=2e-5)
    for name in ("model.gguf", "hf"):
        said = json.loads(intaglio("verify", run / "packed", run / name, "--json").out)
        assert said["exact"] and not said["differing_facts"]


def test_the_release_has_what_the_row_allows_and_says_why_not(run: Path, tmp_path: Path) -> None:
    outcome = intaglio("export", run / "packed", "--to=all", f"--out={tmp_path / 'release'}")
    assert outcome.code == 0, outcome.err
    folders = {path.name for path in (tmp_path / "release").iterdir() if path.is_dir()}
    assert folders == {"gguf", "hf", "vllm", "ollama", "lmstudio"}
    said = " ".join((outcome.out + outcome.err).split())
    for export in ("the ONNX export", "the LiteRT bundle", "the mobile format"):
        assert f"{export} is for gemma4_text, this model is gemma2" in said
    assert "in mlx-lm every layer attends to the whole text" in said
