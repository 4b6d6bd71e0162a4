"""Outputs keep inputs and strangers' files, leftovers go, and a run folder has one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from intaglio.errors import OutputError
from intaglio.packed.outputs import MARKER, check_output, clear_leftovers, started_at, temporary_path, why_kept
from intaglio.packed.store import new_path
from intaglio.runs.bench import PACKED
from intaglio.runs.demo import _remove_run
from intaglio.train.run_folder import LOCK_FILE, check_run_dir, hold
from tests.support.cases import Case
from tests.support.cli import contents, intaglio

# Outputs over inputs


@pytest.fixture
def place(gemma4: Case, tmp_path: Path) -> Path:
    """A folder with a model, its packed model and a GGUF, and links to them."""
    home = tmp_path / "home"
    shutil.copytree(gemma4.checkpoint, home / "model")
    shutil.copytree(gemma4.packed.path, home / "packed")
    shutil.copytree(gemma4.hf, home / "hf")
    shutil.copyfile(gemma4.gguf, home / "model.gguf")
    os.link(home / "model.gguf", home / "same.gguf")
    (home / "recipe.toml").write_text("name = 'x'")
    (home / "text.txt").write_text("words " * 100)
    (home / "link").symlink_to(home / "model", target_is_directory=True)
    (home / "packed-link").symlink_to(home / "packed", target_is_directory=True)
    blobs = home / "blobs"
    blobs.mkdir()
    (home / "cached").mkdir()
    shutil.copyfile(home / "model/config.json", home / "cached/config.json")
    shutil.move(home / "model/model.safetensors", blobs / "abc")
    (home / "model/model.safetensors").symlink_to(blobs / "abc")
    return home


OVERLAPS = [
    ("quantize", "model", "model"),
    ("quantize", "model", "link"),
    ("quantize", "link", "model"),
    ("quantize", "model", "."),
    ("quantize", "model", "blobs"),
    ("quantize", "model", "blobs/abc"),
    ("quantize", "model", "model/../model/"),
    ("quantize", "model/", "packed/../model"),
    ("quantize", "model --data text.txt", "text.txt"),
    ("quantize", "model --recipe recipe.toml", "recipe.toml"),
    ("quantize", "model --trained packed", "packed"),
    ("export", "packed hf", "packed"),
    ("export", "packed hf", "packed-link"),
    ("export", "packed-link mlx", "packed"),
    ("export", "packed gguf", "packed"),
    ("export", "packed gguf", "packed/packed.safetensors"),
    ("export", "packed gguf", "packed/config.json"),
    ("export", "packed ollama --draft model.gguf", "model.gguf"),
    ("export", "packed --to mlx", "."),
    ("export", "packed --to mlx", "packed"),
    ("convert", "hf", "hf"),
    ("convert", "model.gguf --config model", "model.gguf"),
    ("convert", "model.gguf --config model", "same.gguf"),
    ("convert", "model.gguf --config model", "model"),
    ("plan", "model --recipe recipe.toml", "recipe.toml"),
    ("plan", "model", "model/config.json"),
    ("train", "model --data text.txt", "model"),
    ("train", "packed --data text.txt", "packed"),
    ("train-drafter", "packed", "packed"),
]


@pytest.mark.parametrize(("verb", "inputs", "out"), OVERLAPS, ids=[" ".join(case) for case in OVERLAPS])
def test_an_input_is_never_replaced(
    verb: str, inputs: str, out: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = contents(place)
    option = {"plan": "--html", "train": "--out", "train-drafter": "--out"}.get(verb, "--out")
    replace = ["--replace"] if not verb.startswith("train") else []
    outcome = intaglio(verb, *inputs.split(), option, out, *replace)
    assert outcome.code == 2 and "choose another" in outcome.error
    assert contents(place) == before


STRANGERS: dict[str, dict[str, str]] = {
    "sums": {"SHA256SUMS": "", "letter.txt": "dear"},
    "Modelfile": {"Modelfile": "FROM x"},
    "GGUFs": {"a.gguf": "GGUF"},
    "weights": {"model.safetensors": "", "config.json": "{}"},
    "onnx": {"onnx/decoder_model_merged_q4.onnx": ""},
    "marker of others": {MARKER: "not json"},
    "marker that lists nothing": {MARKER: '{"files": 3}', "a": ""},
    "marker nested too deep": {MARKER: "[" * 100_000},
}


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("target", ["hf", "mlx", "lmstudio", "onnx", "--to=mlx"])
def test_a_folder_of_others_is_not_replaced(kind: str, target: str, gemma4: Case, tmp_path: Path) -> None:
    for name, text in STRANGERS[kind].items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    before = contents(tmp_path)
    outcome = intaglio("export", gemma4.packed.path, target, "-o", tmp_path / "out", "--replace")
    assert outcome.code == 2 and "so it is not replaced: choose another output" in outcome.error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["years of work", "GGUF of somebody", "<html>my page</html>"])
def test_a_file_of_others_is_not_replaced(text: str, gemma4: Case, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(text)
    for command in (["export", gemma4.packed.path, "gguf", "-o"], ["plan", gemma4.checkpoint, "--html"]):
        outcome = intaglio(*command, tmp_path / "x", "--replace")
        assert outcome.code == 2 and "is a file that intaglio did not write" in outcome.error
        assert (tmp_path / "x").read_text() == text


def test_what_we_wrote_is_replaced_unless_something_was_added(gemma4: Case, tmp_path: Path) -> None:
    commands = {
        "hf": ["export", gemma4.packed.path, "hf"],
        "packed": ["quantize", gemma4.checkpoint],
        "x.gguf": ["export", gemma4.packed.path, "gguf"],
        "release": ["export", gemma4.packed.path, "--to", "mlx,lmstudio"],
    }
    for name, command in commands.items():
        assert intaglio(*command, "-o", tmp_path / name).code == 0
        again = intaglio(*command, "-o", tmp_path / name, "--replace")
        assert again.code == 0, again.err
    assert intaglio("plan", gemma4.checkpoint, "--html", tmp_path / "p.html").code == 0
    assert intaglio("plan", gemma4.checkpoint, "--html", tmp_path / "p.html", "--replace").code == 0
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    outcome = intaglio(*commands["hf"], "-o", tmp_path / "hf", "--replace")
    assert outcome.code == 2 and "holds notes.txt, which intaglio did not write" in outcome.error


def test_names_that_are_no_paths_are_no_inputs(tmp_path: Path) -> None:
    check_output(tmp_path / "out", ["wikitext:train", None, "x" * 5000, tmp_path / "none"])
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    check_output(tmp_path / "loop", [tmp_path])


# Leftovers


def ended_process() -> tuple[int, int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        start = started_at(process.pid)
        process.communicate(b"\n")
    return process.pid, start


def test_leftovers_of_ended_processes_go_and_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid, start = ended_process()
    mine = temporary_path(tmp_path / "out")
    where = mine.name.split(".")[2].split("-")[0]
    dead = tmp_path / f".out.{where}-{pid}-{start}-01234567.partial"
    reused = tmp_path / f".out.{where}-{os.getpid()}-{started_at(os.getpid()) - 1}-01234567.partial"
    elsewhere = tmp_path / f".out.ffffffff-{pid}-{start}-01234567.partial"
    of_old = tmp_path / f".out.eeeeeeee-{pid}-{start}-01234567.partial"
    foreign = [tmp_path / ".out.partial", tmp_path / ".x.abc.partial", tmp_path / "out.partial"]
    for path in (dead, reused, elsewhere, of_old, mine, *foreign):
        path.mkdir()
        (path / "weights").touch()
    os.utime(of_old, (0, 0))
    assert set(clear_leftovers(tmp_path)) == {dead, reused, of_old}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (mine, elsewhere, *foreign)}


def test_a_killed_export_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    program = (
        "import os; from pathlib import Path; from intaglio.packed.store import new_path\n"
        f"with new_path(Path({str(tmp_path / 'out')!r})) as t: t.mkdir(); (t / 'x').touch(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    with new_path(tmp_path / "other") as temporary:
        temporary.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_an_output_with_a_long_name(tmp_path: Path) -> None:
    with new_path(tmp_path / ("x" * 250)) as temporary:
        temporary.write_text("x")
    assert why_kept(tmp_path / ("x" * 250)) == "is a file that intaglio did not write"


# The lock of a run folder


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    program = (
        "import sys; from pathlib import Path; from intaglio.train.run_folder import hold\n"
        f"with hold(Path({str(folder)!r})): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", program, "train", "--lr=1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_second_run_is_told_who_holds_the_folder(resume: list[str], gemma4: Case, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with held(run) as process:
        for command in (
            ["train", gemma4.checkpoint, "--data", text, "-o", run, *resume],
            ["train", gemma4.packed.path, "--data", text, "-o", run, "--set=schedule.loss=cross_entropy", *resume],
            ["train-drafter", gemma4.packed.path, "--data", text, "-o", run, *resume],
        ):
            outcome = intaglio(*command)
            assert outcome.code == 2
            assert f"run: process {process.pid} on " in outcome.error and "train --lr=1, since 2" in outcome.error
        process.kill()
        process.wait()
    assert (run / LOCK_FILE).is_file()  # of a process that could not remove it
    with hold(run):
        assert json.loads((run / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list(run.iterdir()) == []


def test_a_folder_that_a_refused_run_made_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(tmp_path / "a/run"):
        raise ZeroDivisionError
    assert not (tmp_path / "a/run").exists()


def test_a_lock_file_that_says_nothing(tmp_path: Path) -> None:
    with held(tmp_path / "run"):
        for content in ("", "{", "[]", '{"pid": 3}', "[" * 99_999):
            (tmp_path / "run" / LOCK_FILE).write_text(content)
            with pytest.raises(OutputError, match="another process works in it"), hold(tmp_path / "run"):
                pass


def test_only_the_first_process_of_a_distributed_run_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path / "run"):
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with hold(tmp_path / "run"):
            pass


# Settings of a run that is resumed

RECIPE = "name = 'x'\nfit = 'mse'\n[schedule]\nlr = 0.0001\nseed = 0\n"
IDENTITY = {"plan": "a" * 64, "recipe": RECIPE, "precision": "no", "corpus": "b" * 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf16"}, "cannot resume: precision is bf16, and the run there began with no"),
        ({"corpus": "c" * 64}, f"corpus is {'c' * 12}, and the run there began with {'b' * 12}:"),
        ({"plan": "c" * 64}, f"plan is {'c' * 12}, and the run there began with {'a' * 12}:"),
        ({"recipe": RECIPE.replace("0.0001", "0.5")}, "schedule.lr is 0.5, and the run there began with 0.0001"),
        ({"recipe": RECIPE.replace("seed = 0", "seed = 1"), "plan": "d" * 64}, "schedule.seed is 1, and the run"),
        ({"recipe": RECIPE.replace("fit = 'mse'\n", "")}, "fit is None, and the run there began with mse"),
        ({"start": "e"}, "does not say start: another version"),
    ],
    ids=str,
)
def test_a_setting_that_differs_is_named_with_both_values(
    changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(IDENTITY))
    check_run_dir(tmp_path, IDENTITY, True)
    with pytest.raises(OutputError) as refused:
        check_run_dir(tmp_path, IDENTITY | changes, True)
    assert message in str(refused.value)


@pytest.mark.parametrize("other", [None, "thesis"])
def test_a_demo_is_replaced_with_all_that_a_run_leaves(other: str | None, tmp_path: Path) -> None:
    for name in filter(None, (*PACKED.values(), "checkpoints", other)):
        (tmp_path / name).mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"plan": "", "corpus": ""}), "utf-8")
    if other:
        with pytest.raises(OutputError, match="holds thesis, which is no demo's"):
            _remove_run(tmp_path, True)
    else:
        _remove_run(tmp_path, True)
        assert not list(tmp_path.iterdir())
