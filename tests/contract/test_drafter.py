"""`intaglio train-drafter`: from a packed model to a drafter's files and report, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

from intaglio.formats.verify import verify
from intaglio.packed.model import PackedModel
from intaglio.tiny import DRAFTER_DIR
from tests.support.cases import Case
from tests.support.cli import contents, intaglio
from tests.support.tiny import GEMMA4, make_checkpoint

SHORT = ["--set=schedule.tokens=256", "--set=schedule.batch_size=2", "--set=schedule.sequence_length=32"]
SMALL = ["--width=64", "--mlp=64", "--heads=4", "--prompts=2", "--prompt-tokens=8", "--written-tokens=12"]


def train(target: Path, text: Path, out: Path, *more: str) -> list[object]:
    return ["train-drafter", target, f"--out={out}", f"--data={text}", *SHORT, *more]


def test_a_new_drafter_and_its_files(gemma4: Case, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = intaglio(*train(gemma4.packed.path, text, out, *SMALL))
    assert outcome.code == 0, outcome.err
    assert "target, retrained, quantized" in " ".join(outcome.out.split())
    packed = PackedModel.open(out / "packed")
    assert packed.plan.recipe.name == "drafter-q4_0"
    for artifact in ("hf", "model.gguf"):
        assert verify(packed, out / artifact).exact
    report = json.loads((out / "drafter.json").read_text())
    assert [pair["drafter"] for pair in report["pairs"]] == ["retrained, float", "retrained, quantized"]
    for pair in report["pairs"]:
        assert [row["draft_length"] for row in pair["greedy"]] == list(range(1, 9))
        assert all(1 <= row["length"] <= row["draft_length"] + 1 for row in pair["greedy"] + pair["sampled"])
    assert "retrained, quantized" in (out / "drafter.html").read_text()
    before = contents(out)
    again = intaglio(*train(gemma4.packed.path, text, out, *SMALL))
    assert again.code == 2 and "is not empty" in again.error
    assert contents(out) == before


def test_all_four_pairs_from_an_existing_drafter(gemma4: Case, text: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert intaglio(*train(gemma4.checkpoint, text, first, "--recipe=drafter", *SMALL)).code == 0
    outcome = intaglio(
        *train(gemma4.packed.path, text, tmp_path / "out", "--json", *SMALL[3:]),
        f"--drafter={first / 'hf'}",
        f"--original={gemma4.checkpoint}",
    )
    assert outcome.code == 0, outcome.err
    pairs = [(pair["target"], pair["drafter"]) for pair in json.loads(outcome.out)["pairs"]]
    retrained = [("target", f"retrained, {kind}") for kind in ("float", "quantized")]
    assert pairs == [("original", "original"), ("target", "original"), *retrained]


def test_a_run_that_was_cut_short_goes_on(gemma4: Case, text: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out in (whole, cut):
        assert intaglio(*train(gemma4.packed.path, text, out, "--checkpoint-every=2", *SMALL)).code == 0
    for name in ("packed", "hf", "quantized/packed"):
        for file in (cut / name).iterdir():
            file.unlink()
        (cut / name).rmdir()
    (cut / "model.gguf").unlink()
    outcome = intaglio(*train(gemma4.packed.path, text, cut, "--checkpoint-every=2", "--resume", *SMALL))
    assert outcome.code == 0, outcome.err
    assert contents(cut / "packed") == contents(whole / "packed")
    assert (cut / "model.gguf").read_bytes() == (whole / "model.gguf").read_bytes()


def test_what_it_refuses(gemma4: Case, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wider = make_checkpoint(tmp_path / "wider", GEMMA4 | {"hidden_size": 512})
    first = tmp_path / "first"
    assert intaglio(*train(wider, text, first, "--recipe=drafter", *SMALL)).code == 0
    cases = [
        ([f"--drafter={first / 'hf'}"], "backbone_hidden_size is 512 in the drafter and 256 in the target"),
        ([f"--drafter={gemma4.checkpoint}"], "is no drafter: expected an assistant model"),
        ([f"--drafter={first / 'hf'}", "--width=64"], "--drafter has its shape: leave out --width"),
        (["--original=x"], "--original is compared with the drafter that was made for it"),
        (["--width=256"], "llama.cpp"),
        (["--clusters=7"], "7 clusters: expected a divisor of the vocabulary's 4096 tokens"),
        (["--set=schedule.sequence_length=4", *SMALL], "sequences of 4 tokens: expected 5 or more for 3 draft steps"),
        (["--recipe=q4"], "no recipe 'q4'"),
        (["--written-tokens=4"], "expected one or more prompts of one or more tokens, and 10 or more behind them"),
    ]
    for arguments, says in cases:
        outcome = intaglio(*train(gemma4.packed.path, text, out, *arguments))
        assert outcome.code == 2, arguments
        assert says in " ".join(outcome.err.split())
        assert not out.exists() or not any(out.iterdir())


def test_a_recipe_for_models_is_none_for_drafters(gemma4: Case, text: Path, tmp_path: Path) -> None:
    outcome = intaglio(*train(gemma4.packed.path, text, tmp_path / "out", "--recipe=mobile", *SMALL))
    assert outcome.code == 2
    assert "recipe mobile is for gemma4_text, this model is gemma4_assistant" in outcome.error


def test_a_target_that_is_none(gemma4: Case, text: Path, tmp_path: Path) -> None:
    sliding = make_checkpoint(tmp_path / "sliding", GEMMA4 | {"layer_types": ["sliding_attention"] * 4})
    for target, says in (
        (DRAFTER_DIR, "is a drafter itself: expected the model that it is to draft for"),
        (sliding, "the target has no full_attention layer with keys and values of its own"),
    ):
        outcome = intaglio(*train(target, text, tmp_path / "out", *SMALL))
        assert outcome.code == 2 and says in outcome.error, outcome.err
