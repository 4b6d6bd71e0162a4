"""`export --to`: a folder for every runtime, a card, a manifest; and what `verify` finds in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from intaglio.errors import InputError
from intaglio.formats.table import EXPORTERS
from intaglio.packed.model import PackedModel
from intaglio.packed.outputs import MARKER
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.runs.release import MANIFEST, RUNTIMES, make_release, parse_targets
from intaglio.train.quantize import quantize
from tests.support.cases import Case
from tests.support.cli import contents, intaglio, names_of_folders
from tests.support.tiny import GEMMA4, GEMMA4_MOE, make_checkpoint, pack


@pytest.fixture(scope="module")
def release(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Q4_0 release for all. Shared: not to be changed."""
    out = tmp_path_factory.mktemp("release") / "out"
    outcome = intaglio("export", cases["gemma4"].packed.path, "--to", "all", "-o", out)
    assert outcome.code == 0, outcome.err
    assert "gemma-mobile: left out: model.embed_tokens.weight: recipe q4_0 puts it on grid q6_k" in outcome.out
    assert "web: left out: it needs --transformers-js" in outcome.out
    return out


def test_every_runtime_has_an_exporter_and_a_command() -> None:
    assert set(RUNTIMES) <= set(EXPORTERS)
    assert set(EXPORTERS) == set(RUNTIMES), "an exporter without a row: add it to release.RUNTIMES"
    assert all("{path}" in runtime.command for runtime in RUNTIMES.values())


def test_each_folder_has_its_artifact_a_readme_and_the_card_its_command(gemma4: Case, release: Path) -> None:
    folders = {path.name for path in release.iterdir() if path.is_dir()}
    assert folders >= {"gguf", "hf", "vllm", "mlx", "onnx", "ollama", "lmstudio"}
    card = (release / "README.md").read_text()
    assert f"`{gemma4.packed.sha256()}`" in card and "left out" in card and "was not measured" in card
    for name in folders:
        readme = (release / name / "README.md").read_text()
        assert "Read back: exact" in readme and "```bash" in readme
        assert f"[`{name}/`]({name})" in card
    assert "vllm serve vllm" in card and "vllm serve ." in (release / "vllm" / "README.md").read_text()


def test_the_manifest_is_what_sha256sum_reads(release: Path) -> None:
    done = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", MANIFEST], cwd=release, check=False)
    assert done.returncode == 0
    listed = {line.split("  ")[1] for line in (release / MANIFEST).read_text().splitlines()}
    assert listed == set(contents(release)) - {MANIFEST, MARKER}


PROGRAM = """
import sys
from pathlib import Path
from intaglio.formats.table import EXPORTERS
from intaglio.plan.plan import make_plan
from intaglio.train.quantize import quantize
checkpoint, out, recipe, *names = sys.argv[1:]
print(list({"full_attention", "sliding_attention"}))
packed = quantize(Path(checkpoint), make_plan(checkpoint, recipe), Path(out) / "packed")
for name in names:
    EXPORTERS[name](packed, Path(out) / name)
"""


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("q4_0", ("gguf", "hf", "vllm", "mlx", "ollama")),
        ("mobile", ("gemma-mobile", "mlx")),
        pytest.param("q4_0", ("onnx",), marks=pytest.mark.environment),
    ],
)
def test_two_processes_write_the_same_bytes(gemma4: Case, tmp_path: Path, recipe: str, names: tuple[str, ...]) -> None:
    """They go through sets in other orders. LiteRT's bundle and the page have tests of their own."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(gemma4.checkpoint), str(tmp_path / seed), recipe, *names],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
        )
        for seed in "13"
    ]
    orders = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0] and orders[0] != orders[1]
    one, other = (contents(tmp_path / seed) for seed in "13")
    assert one.keys() == other.keys() and not [name for name in one if one[name] != other[name]]


def test_verify_reads_all_of_it_back(gemma4: Case, release: Path) -> None:
    outcome = intaglio("verify", gemma4.packed.path, release)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert len(lines) == sum(path.is_dir() for path in release.iterdir())
    assert all("0 bits differ" in line for line in lines)
    outcome = intaglio("verify", gemma4.packed.path, release, "--json")
    assert json.loads(outcome.out)["exact"] is True


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vllm/model.safetensors", "vllm: NOT exact: 1 of"),
        ("mlx/model.safetensors", "mlx: NOT exact: 1 of"),
        ("onnx/onnx/embed_tokens_q4.onnx_data", "onnx: NOT exact: 1 of"),
        ("hf/model.safetensors", "hf: NOT exact: 1 of"),
        ("gguf/model.gguf", "gguf: NOT exact: 1 of"),
        ("ollama/model.gguf", "ollama: NOT exact: 1 of"),
        ("vllm/tokenizer.json", "vllm/tokenizer.json has other bytes"),
    ],
)
def test_a_single_bit_anywhere_is_exit_code_3(
    gemma4: Case, release: Path, tmp_path: Path, name: str, said: str
) -> None:
    copy = shutil.copytree(release, tmp_path / "copy")
    data = bytearray((copy / name).read_bytes())
    data[-2] ^= 1
    (copy / name).write_bytes(data)
    outcome = intaglio("verify", gemma4.packed.path, copy)
    assert outcome.code == 3
    assert said in outcome.error and f"{name} has other bytes" in outcome.error
    assert intaglio("verify", gemma4.packed.path, copy / name.split("/")[0]).code == 3


def test_files_that_are_missing_or_strange_are_found(gemma4: Case, release: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(release, tmp_path / "copy")
    (copy / "mlx" / "tokenizer.json").unlink()
    (copy / "mlx" / "notes.txt").write_text("x")
    outcome = intaglio("verify", gemma4.packed.path, copy)
    assert outcome.code == 3
    assert f"mlx/tokenizer.json is missing; mlx/notes.txt is not in {MANIFEST}" in outcome.error
    (copy / MANIFEST).write_text("nonsense\n")
    assert "expected a SHA-256" in intaglio("verify", gemma4.packed.path, copy).error


def test_names_are_checked_before_anything_is_written(gemma4: Case, tmp_path: Path) -> None:
    assert parse_targets("mlx, gguf,mlx") == ["mlx", "gguf"]
    with pytest.raises(InputError, match="--to 'tensorrt'"):
        make_release(gemma4.packed, tmp_path / "out", "tensorrt")
    outcome = intaglio("export", gemma4.packed.path, "--to", "mlx,gemma-mobile", "-o", tmp_path / "out")
    assert outcome.code == 2 and "which the mobile format does not have" in outcome.error
    for arguments in ((), ("gguf", "--to", "all"), ("gguf", "--draft", "x.gguf")):
        assert intaglio("export", gemma4.packed.path, *arguments, "-o", tmp_path / "out").code == 2
    assert not list(tmp_path.iterdir())


def test_a_release_is_replaced_and_nothing_else(gemma4: Case, tmp_path: Path) -> None:
    make_release(gemma4.packed, tmp_path / "out", "mlx")
    first = contents(tmp_path / "out")
    make_release(gemma4.packed, tmp_path / "out", "mlx", replace=True)
    assert contents(tmp_path / "out") == first
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    outcome = intaglio("export", gemma4.packed.path, "--to", "mlx", "-o", tmp_path / "home", "--replace")
    assert outcome.code == 2 and (tmp_path / "home" / "letter.txt").is_file()


def test_the_card_shows_what_the_run_measured(gemma4: Case, tmp_path: Path) -> None:
    shutil.copytree(gemma4.packed.path, tmp_path / "run" / "packed")
    run = tmp_path / "run"
    (run / "report.json").write_text(json.dumps({"recipe_toml": gemma4.packed.plan.recipe.to_toml()}))
    (run / "report.md").write_text("# x\n\n## Against the original\n\n| a table |\n\n## Notes\n\nnone\n")
    outcome = intaglio("export", run / "packed", "--to", "mlx", "-o", tmp_path / "out")
    assert outcome.code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| a table |" in card and "## Notes" not in card
    (run / "report.json").write_text(json.dumps({"recipe_toml": "another"}))
    intaglio("export", run / "packed", "--to", "mlx", "-o", tmp_path / "other")
    assert "was not measured" in (tmp_path / "other" / "README.md").read_text()


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("experts")
    return pack(make_checkpoint(folder / "c", GEMMA4_MOE), folder / "p")


def test_a_mixture_of_experts_is_released_in_what_holds_it(experts: PackedModel, tmp_path: Path) -> None:
    outcome = intaglio("export", experts.path, "--to", "all", "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} >= {"gguf", "hf", "vllm", "ollama"}
    for name in ("mlx", "litert", "gemma-mobile"):
        (line,) = (line for line in outcome.out.splitlines() if line.startswith(f"{name}: left out"))
        assert "experts" in line and "export it to gguf, hf or vllm" in line
    assert intaglio("verify", experts.path, tmp_path / "out").code == 0
    assert "experts" in intaglio("export", experts.path, "mlx", "-o", tmp_path / "mlx").error


def test_one_targets_failure_never_takes_the_others(
    gemma4: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        Path(str(args[1])).mkdir(parents=True)
        raise ValueError("a bug")

    for name in set(EXPORTERS) - {"gguf", "vllm"}:
        monkeypatch.setitem(EXPORTERS, name, broken)
    outcome = intaglio("export", gemma4.packed.path, "--to", "all", "-o", tmp_path / "out")
    assert outcome.code == 0 and "mlx: left out: ValueError: a bug: this is a bug, please report it" in outcome.out
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"gguf", "vllm"}


def test_an_artifact_that_does_not_match_is_left_out_with_exit_code_3(
    gemma4: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = EXPORTERS["mlx"]

    def wrong(packed: PackedModel, path: Path, **options: object) -> None:
        write(packed, path, **options)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))

    for name in set(EXPORTERS) - {"gguf", "mlx"}:
        monkeypatch.delitem(RUNTIMES, name)
    monkeypatch.setitem(EXPORTERS, "mlx", wrong)
    outcome = intaglio("export", gemma4.packed.path, "--to", "all", "-o", tmp_path / "out")
    assert outcome.code == 3 and "rms_norm_eps is 0.1, the model's is 1e-06" in outcome.error
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"gguf"}


def test_no_file_names_a_folder_of_this_machine(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where LiteRT's environment is missing, or the packed model is made of a text."""
    monkeypatch.setenv("INTAGLIO_RUNTIMES", str(tmp_path / "runtimes"))
    checkpoint = make_checkpoint(tmp_path / "c", GEMMA4)
    plan = make_plan(checkpoint, "mobile")
    packed = quantize(checkpoint, plan, tmp_path / "p", provenance={"data": str(text)})
    for name in ("onnx", "web"):
        monkeypatch.delitem(RUNTIMES, name)
    left_out = make_release(packed, tmp_path / "out").left_out
    assert str(tmp_path / "runtimes") in left_out["litert"]
    assert "litert is left out: LiteRT's packages need" in (tmp_path / "out" / "README.md").read_text()
    assert packed.provenance["data"] == text.name
    assert not names_of_folders(contents(tmp_path / "out"))


def test_a_recipe_that_bfloat16_does_not_hold_is_named(mobile_packed: PackedModel, tmp_path: Path) -> None:
    outcome = intaglio("export", mobile_packed.path, "--to", "all", "-o", tmp_path / "out")
    assert "hf: left out: bfloat16 does not hold this recipe's weights" in outcome.out


def test_a_card_shows_a_strange_name_as_it_is(gemma4: Case, tmp_path: Path) -> None:
    odd = "<img src=x onerror=alert(1)> [x](http://e) `rm` | **b**\n---\nevil: yes \udcff"
    packed = replace(gemma4.packed, provenance={"name": odd, "method": "a | b\n# c"})
    make_release(packed, tmp_path / "out", "mlx,ollama")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert r"\<img src=x onerror=alert(1)\> \[x\](http://e) \`rm\` \| \*\*b\*\* --- evil: yes ?" in card
    assert "\nevil" not in card and "\n# c" not in card and card.count("---\n") == 2
    assert not set("<>[]`|* ") & set(card.split("ollama create ")[1].split(" -f")[0])


def test_the_card_names_the_grids_of_the_plan(tmp_path: Path) -> None:
    recipe = Recipe.load("q4_0", ["weights.ple_embedding.grid=q8_0"])
    packed = pack(make_checkpoint(tmp_path / "c", GEMMA4), tmp_path / "p", recipe)
    make_release(packed, tmp_path / "out", "mlx")
    assert "ple embedding on q8_0" in (tmp_path / "out" / "README.md").read_text()
