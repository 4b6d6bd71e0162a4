"""`intaglio plan`: what it says, in the terminal, as JSON and as a page."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from intaglio.measure.render import size
from intaglio.plan.bundled import bundled_config, bundled_name, find_config
from intaglio.plan.plan import make_plan
from intaglio.sizing.planning import Wishes, bundled_spec, survey
from intaglio.sizing.published import LEFT_OUT, PUBLISHED_GB
from tests.support.cases import Case
from tests.support.cli import intaglio
from tests.support.tiny import MULTIMODAL, make_checkpoint


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_a_name_is_enough() -> None:
    outcome = intaglio("plan", "e2b", "--drafter=e2b-assistant", "--budget=3GB")
    assert outcome.code == 0, outcome.err
    for line in (
        r"gemma-4-e2b +5\.1 B parameters, recipe q4_0",
        r"on disk +3\.35 GB",
        r"resident +1\.41 GB .*towers 951 MB more",
        r"mapped +1\.93 GB",
        r"per-layer embeddings +2\.35 B +1\.93 GB +- +1\.93 GB",
        r"e2b-assistant +77\.7 M",
        r"16 bits +6\.29 MB +201 MB +208 MB +2\.63 GB",
        r"8 bits +3\.15 MB +101 MB +104 MB",
        r"Training on one GPU, 16,384 tokens a forward",
        r"mobile-e2b .* 128k, its limit",
    ):
        assert re.search(line, outcome.out), line
    assert all(len(line) <= 80 for line in outcome.out.splitlines())
    assert "…" not in outcome.out  # nothing is cut off


def test_a_drafter_on_mobile_grids_is_its_codes_and_scales() -> None:
    command = ("plan", "e4b", "--recipe=mobile-e4b", "--drafter=e4b-assistant", "--json")
    drafter = json.loads(intaglio(*command).out)["drafter"]
    expected = make_plan(bundled_spec("gemma-4-e4b-assistant"), "drafter-mobile").size_bytes
    assert drafter["file"]["total"] == sum(part["disk_bytes"] for part in drafter["parts"]) == expected


def test_the_family_beside_what_is_published() -> None:
    outcome = intaglio("plan", "--all")
    for name, figures in PUBLISHED_GB.items():
        short = name.removeprefix("gemma-4-")
        assert re.search(rf"{short} .*\({figures['bf16']:g}\) .*\({figures['q4_0']:g}\)", outcome.out), name
    assert re.search(r"e2b .* 1\.14 GB \(1\.1\) +796 MB \(0\.84\)", outcome.out)
    words = " ".join(outcome.out.split())
    assert all(note in words for note in LEFT_OUT)
    assert "…" not in outcome.out
    found = json.loads(intaglio("plan", "--all", "--json").out)
    assert [row["name"] for row in found["models"]] == list(PUBLISHED_GB)


def test_json_says_what_the_tables_say() -> None:
    found = json.loads(intaglio("plan", "e4b", "--recipe=mobile-e4b", "--context=64k", "--batch=2", "--json").out)
    parts = found["sizes"]["parts"]
    for field in ("disk_bytes", "resident_bytes", "mapped_bytes", "parameters"):
        assert found["sizes"]["total"][field] == sum(part[field] for part in parts)
    assert found["sizes"]["total"]["parameters"] == 7_941_100_832
    assert found["sizes"]["file"]["data"] == found["sizes"]["total"]["disk_bytes"]
    kv = found["kv_cache"]
    assert (kv["context"], kv["batch"]) == (65536, 2)
    assert kv["bits_16"]["total"] == 2 * kv["bits_8"]["total"]
    needed = found["sizes"]["total"]["resident_bytes"] + kv["bits_8"]["total"]
    assert found["needed_bytes"]["bits_8"] == needed
    rows = {name: size for name, size in found["training"].items() if name in TRAINING}
    learning = max(rows["activations"] + rows["loss"], rows["gradients"])  # gradients come as activations go
    rest = sum(size for name, size in rows.items() if name not in ("activations", "loss", "gradients"))
    assert found["training"]["total"] == rest + learning


TRAINING = {"teacher", "student", "masters", "scales", "gradients", "optimizer", "gathered", "activations", "loss"}


@pytest.mark.parametrize("gib", [2, 4, 16])
def test_what_fits_a_budget_fits(gib: int) -> None:
    wishes = Wishes(budget_bytes=gib * 2**30)
    from intaglio.plan.recipe import Recipe

    made = survey("e2b", Recipe.load("q4_0"), wishes)
    assert {fit.recipe for fit in made.fits} == {"q4_0", "q2_0", "mobile", "mobile-e2b"}
    for fit in made.fits:
        fitting = survey("e2b", Recipe.load(fit.recipe), Wishes(context=max(1, fit.longest[16])))
        assert (fitting.needed_bytes(16) <= gib * 2**30) == (fit.longest[16] > 0)
        assert fit.longest[8] >= fit.longest[16]


def test_towers_may_be_left_out(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", MULTIMODAL)
    whole, text = (json.loads(intaglio("plan", model, "--json", *more).out) for more in ([], ["--text-only"]))
    assert whole["sizes"]["text_only"] == text["sizes"]["total"]
    assert whole["sizes"]["total"]["parameters"] > text["sizes"]["total"]["parameters"]
    assert whole["sizes"]["file"] == text["sizes"]["file"]  # a GGUF has none


def test_a_path_wins_over_a_name(gemma4: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_config("e2b") == bundled_config("gemma-4-e2b")
    monkeypatch.chdir(tmp_path)
    os.symlink(gemma4.checkpoint, "e2b")
    assert find_config("e2b")["hidden_size"] == 256
    assert "gemma-4-e2b" not in intaglio("plan", "e2b").out


@pytest.mark.parametrize(
    "name", ["e2b", "E2B", "gemma-4-e2b", "gemma-4-E2B-it", "google/gemma-4-E2B-it", "google/gemma-4-E2B"]
)
def test_names_as_people_write_them(name: str) -> None:
    assert bundled_name(name) == "gemma-4-e2b"
    assert bundled_name(f"{name}-assistant") == "gemma-4-e2b-assistant"


def test_other_names_are_none() -> None:
    assert bundled_name("e3b") is bundled_name("gemma-3-e2b") is bundled_name("") is None


def test_the_page_has_every_part(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    options = ["--text-only", "--budget=4GB", f"--html={page}"]
    found = json.loads(intaglio("plan", "e2b", *options, "--json").out)
    text = page.read_text("utf-8")
    for part in found["sizes"]["parts"]:
        assert part["label"] in text and size(part["disk_bytes"]) in text
    for title in ("KV cache", "Training", "What fits 4 GB", found["digest"]):
        assert title in text
    widths = [float(width) for width in re.findall(r'style="width:([\d.]+)%"', text)]
    assert max(widths) == 100 and min(widths) >= 0


def test_a_page_of_a_drafter_has_no_cache_and_no_training(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    outcome = intaglio("plan", "31b-assistant", f"--html={page}")
    assert "reads keys and values of the model that it drafts for" in outcome.out
    assert "<h2>Training</h2>" not in page.read_text("utf-8")
    assert "<h2>KV cache</h2>" not in page.read_text("utf-8")


def test_a_bundle_of_litert_has_no_predicted_size() -> None:
    outcome = intaglio("plan", "e2b", "--recipe=q4_0-litert")
    assert outcome.code == 2 and "sizes of its bundles are not predicted" in outcome.error
