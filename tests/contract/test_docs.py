"""Every block of code in README, CONTRIBUTING and docs/ runs here, or a comment above it says why it does not."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from intaglio.formats.mobile.write import export_mobile
from intaglio.packed.model import FILE_NAME, PackedModel
from intaglio.plan.recipe import Recipe
from intaglio.tiny import DRAFTER_DIR, MODEL_DIR
from tests.support.cases import Case
from tests.support.cli import intaglio
from tests.support.tiny import pack
from tests.support.training import small_corpus

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^(?:[ ]*<!-- not run: (?P<reason>\S[^\n]*) -->\n)?(?P<indent>[ ]*)```(?P<kind>\w+)\n(?P<code>.*?)^[ ]*```$",
    re.M | re.S,
)
KINDS = {"bash", "python", "js", "toml", "text"}
SHORT = ["tokens=128", "batch_size=2", "sequence_length=32", "gptq_tokens=256", "layer_tokens=128", "layer_batch=2"]
SHORT += ["calibration_tokens=64"]
# Put behind what a page says, so that a command takes seconds.
FASTER = {
    "train": ["--eval-tokens=64", "--precision=no", "--no-compile", "--prompt=The"],
    "train-drafter": ["--prompts=2", "--prompt-tokens=8", "--written-tokens=12", "--precision=no"],
}


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@dataclass(frozen=True)
class Block:
    """A block of a page."""

    place: str
    kind: str
    code: str
    reason: str


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, by the lines that they begin in."""
    text = page.read_text("utf-8")
    return [
        Block(
            f"{page.name}:{text.count(chr(10), 0, found.start('code'))}",
            found["kind"],
            re.sub(rf"^{found['indent']}", "", found["code"], flags=re.M),
            found["reason"] or "",
        )
        for found in BLOCK.finditer(text)
    ]


ALL = [block for page in PAGES for block in blocks(page)]


def those(kind: str) -> Any:
    """A parameter for each block of a kind that runs."""
    found = [block for block in ALL if block.kind == kind and not block.reason]
    return pytest.mark.parametrize("block", found, ids=[block.place for block in found])


def test_no_block_escapes() -> None:
    fences = sum(len(re.findall(r"^ *```", page.read_text("utf-8"), re.M)) for page in PAGES)
    assert 2 * len(ALL) == fences, "a block without a language, or one that does not end"
    assert {block.kind for block in ALL} <= KINDS
    assert all(block.reason for block in ALL if block.kind == "js")
    for block in ALL:
        if block.kind == "bash" and not block.reason:
            other = [line for line in lines(block) if line[0] != "intaglio"]
            assert not other, f"{block.place}: only intaglio's own commands run here: say <!-- not run: REASON -->"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_what_they_print(path: Path) -> None:
    """tests/runtimes runs them."""
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells and not [cell for cell in cells if cell["outputs"] or cell["execution_count"]]


def lines(block: Block) -> list[list[str]]:
    """The commands of a block, as a shell would cut them up."""
    found = [shlex.split(line, comments=True) for line in block.code.splitlines()]
    return [line for line in found if line]


@pytest.fixture(scope="module")
def inputs(
    cases: dict[str, Case], mobile_packed: PackedModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The objects that the pages take as given, by their names there."""
    gemma4, folder = cases["gemma4"], tmp_path_factory.mktemp("inputs")
    text = "The whale swam past the ship, and nobody on it said a word. " * 10
    chat = [{"role": "user", "content": "Who swam?"}, {"role": "assistant", "content": "The whale."}]
    (folder / "corpus.jsonl").write_text(f"{json.dumps({'text': text})}\n" * 20, "utf-8")
    (folder / "chats.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 200, "utf-8")
    (folder / "heldout.txt").write_text(text * 2, "utf-8")
    (folder / "drafter").mkdir()
    pack(DRAFTER_DIR, folder / "drafter" / "packed", "drafter-q4_0")
    export_mobile(mobile_packed, folder / "mobile")
    run = gemma4.packed.path.parent  # a folder with packed/ in it, as a run leaves it
    shared = {name: folder / name for name in ("corpus.jsonl", "chats.jsonl", "heldout.txt", "mobile")}
    return shared | {
        **{name: gemma4.checkpoint for name in ("MODEL", "OTHER", "path/to/checkpoint")},
        **{name: run for name in ("RUN", "run")},
        "CHECKPOINT": gemma4.hf,
        "DRAFTER": folder / "drafter",
        "src": ROOT / "src",
    }


@pytest.fixture
def place(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


def lay_out(block: Block, inputs: dict[str, Path], place: Path) -> None:
    """Link what a block names and does not make itself."""
    made = re.findall(r"(?:-o|--out)[ =](\S+)", block.code)
    for name, path in inputs.items():
        if re.search(rf"\b{re.escape(name)}\b", block.code) and name not in made:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path, place / name)


def shortened(command: list[str]) -> list[str]:
    """The command with a schedule that takes seconds; a packed model has its references."""
    verb = command[0]
    if verb not in ("train", "train-drafter", "quantize"):
        return command
    faster = FASTER.get(verb, [])
    if verb == "train" and not (Path(command[1]) / FILE_NAME).is_file():
        faster = [*faster, "--references=none"]
    settings = [setting for setting in SHORT if not setting.startswith(("gptq", "layer"))]
    settings += [s for s in SHORT if any(f"schedule.{s.partition('=')[0]}=" in word for word in command)]
    if any("schedule.stages" in word for word in command):
        settings += [setting for setting in SHORT if setting.startswith("layer")]
    return [*command, *faster, *(word for setting in settings for word in ("--set", f"schedule.{setting}"))]


@those("bash")
def test_commands_run(block: Block, inputs: dict[str, Path], place: Path) -> None:
    own = dict(inputs)
    if block.place.startswith("drafter.md"):  # a drafter is made for one model
        pack(MODEL_DIR, place / "target" / "packed")
        own |= {"MODEL": MODEL_DIR, "run": place / "target", "DRAFTER": DRAFTER_DIR}
    lay_out(block, own, place)
    for _, *command in lines(block):
        command = [{"256": "128"}.get(word, word) for word in command]  # the bundled model itself is 256 wide
        outcome = intaglio(*shortened(command))
        assert outcome.code == 0, f"{block.place}: {shlex.join(command)}: {outcome.err}"


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """A Trainer's dataset: token ids that are their own labels."""

    ids = torch.from_numpy(small_corpus(sequences=16, length=12).tokens).long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@those("python")
def test_snippets_run(block: Block, inputs: dict[str, Path], place: Path) -> None:
    from datasets import Dataset as Table

    lay_out(block, inputs, place)
    given = Table.from_dict({"input_ids": Sequences.ids.tolist()}) if "SFTConfig" in block.code else Sequences()
    code = block.code.replace("max_steps=100", "max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, bf16=False")
    exec(compile(code, block.place, "exec"), {"dataset": given, "loader": DataLoader(Sequences(), batch_size=16)})
    if "pack_model" in code:
        assert PackedModel.open(place / "packed").plan.recipe.name == "q4_0"


@those("toml")
def test_recipes_load(block: Block) -> None:
    assert Recipe.from_toml(block.code).rules
