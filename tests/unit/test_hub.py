"""Models by their names on the Hub: what is downloaded, and what each refusal says. The Hub is a stand-in."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from unittest.mock import patch

import pytest

from intaglio import load_tokenizer, make_plan
from intaglio.errors import ConfigError, InputError, OutputError
from intaglio.packed.origin import model_name, provenance_of
from intaglio.plan.hub import ARTIFACT, CONFIG_ONLY, find_model, origin
from intaglio.progress import Progress
from intaglio.sources.open import open_source
from intaglio.train.loop import run_identity
from intaglio.train.run_folder import check_run_dir, claim
from tests.support.cli import intaglio
from tests.support.hub import TOKEN, Hub
from tests.support.tiny import make_checkpoint

NAME = "user/tiny-gemma"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    (folder / "packed").mkdir()
    (folder / "packed" / "packed.safetensors").touch()
    return make_checkpoint(folder / "checkpoint")


class Notes:
    """Keeps what a user would see."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, name: str) -> None:
        self.lines.append(name)

    def note(self, line: str) -> None:
        self.lines.append(line)

    def step(self, info: object) -> None: ...

    def part(self, done: int, total: int, figures: str) -> None:
        self.lines.append(f"{done} of {total} {figures}")


def test_a_name_is_a_folder_of_the_cache_without_code_and_pickles(hub: Hub, checkpoint: Path) -> None:
    repo = hub.add(NAME, checkpoint)
    commit = repo.commit(
        {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"", "original/model.safetensors": b""}
    )
    notes = Notes()
    path = find_model(NAME, Progress(notes))
    assert notes.lines[0] == f"Downloading {NAME}"
    assert {file.name for file in path.rglob("*")} == {file.name for file in checkpoint.iterdir()}
    assert (origin(path), model_name(path)) == (f"{NAME}@{commit}", "tiny-gemma")
    hub.requests.clear()
    assert find_model(NAME) == find_model(f"{NAME}@main") == find_model(f"{NAME}@{commit}") == path
    assert not hub.count("GET", "/resolve/"), "what is in the cache was downloaded again"


def test_functions_take_names(hub: Hub, checkpoint: Path) -> None:
    hub.add(NAME, checkpoint)
    assert make_plan(NAME, "q4_0").digest == make_plan(checkpoint, "q4_0").digest
    assert load_tokenizer(NAME).vocab_size == load_tokenizer(checkpoint).vocab_size
    assert not hub.count("GET", ".safetensors"), "weights were downloaded for a plan"
    assert provenance_of(open_source(NAME).path)["name"] == "tiny-gemma"


NONE = "user/none"
MODEL_ARGUMENTS = [
    ("plan", NONE),
    ("plan", "e2b", "--drafter", NONE),
    ("quantize", NONE, "-o", "out"),
    ("quantize", "MODEL", "-o", "out", "--trained", NONE),
    ("train", NONE, "-o", "out"),
    ("train", "PACKED", "-o", "out", "--teacher", NONE),
    ("train-drafter", NONE, "-o", "out"),
    ("train-drafter", "MODEL", "-o", "out", "--drafter", NONE),
    ("train-drafter", "MODEL", "-o", "out", "--drafter", "MODEL", "--original", NONE),
    ("inspect", NONE),
    ("convert", NONE, "-o", "out"),
    ("convert", "MODEL", "-o", "out", "--config", NONE),
    ("data", "MODEL", "--model", NONE),
    ("eval", NONE, "--original", "MODEL", "--text", "text.txt"),
    ("eval", "MODEL", "--original", NONE, "--text", "text.txt"),
    ("eval", NONE, "--original", "MODEL", "--tasks", "task.yaml"),
    ("chat", NONE, "--prompt", "Hello"),
    ("chat", "MODEL", "--beside", NONE, "--prompt", "Hello"),
    ("report", "PACKED", "--original", NONE),
    ("export", NONE, "gguf", "-o", "out"),
    ("verify", NONE, "MODEL"),
    ("verify", "PACKED", NONE),
    ("release", NONE, "out", "--push", "user/name"),
]


@pytest.mark.parametrize("command", MODEL_ARGUMENTS, ids=" ".join)
def test_every_model_argument_may_be_a_name(command: tuple[str, ...], hub: Hub, checkpoint: Path) -> None:
    places = {"MODEL": checkpoint, "PACKED": checkpoint.parent / "packed"}
    with patch("intaglio.packed.model.PackedModel.open", lambda path: find_model(path)):
        done = intaglio(*(places.get(word, word) for word in command))
    assert (done.code, NONE in done.error, "no such model on the Hub" in done.error) == (2, True, True), done.err


def test_a_folder_wins_and_it_is_said(hub: Hub, checkpoint: Path) -> None:
    hub.add(NAME, checkpoint)
    assert intaglio("inspect", NAME).code == 0
    shutil.copytree(checkpoint, NAME)
    hub.requests.clear()
    for command in (("plan", NAME), ("data", "text.txt", "--model", NAME)):
        assert f"{NAME}: taken as the folder of this name" in intaglio(*command).err
    assert not hub.requests


def test_one_file_or_folder_of_many(hub: Hub, checkpoint: Path) -> None:
    weights = (checkpoint / "model.safetensors").read_bytes()
    hub.add(
        "user/many", {"a.gguf": b"GGUF", "b.gguf": b"GGUF1", "hf/model.safetensors": weights, "hf/config.json": b"{}"}
    )
    with pytest.raises(ConfigError, match=r"holds a.gguf, b.gguf: name one of them, for example user/many:a.gguf"):
        find_model("user/many", files=ARTIFACT)
    assert not hub.count("GET", "/resolve/")
    assert find_model("user/many:b.gguf").read_bytes() == b"GGUF1"
    assert {file.name for file in find_model("user/many:hf").iterdir()} == {"model.safetensors", "config.json"}
    with pytest.raises(ConfigError, match=r"user/many: has no file that is wanted.* it holds a.gguf.*user/many:FOLDER"):
        find_model("user/many")


def test_a_file_that_breaks_off_goes_on_there(hub: Hub, checkpoint: Path) -> None:
    hub.add(NAME, checkpoint)
    hub.cut = 1_000_000
    with patch("time.sleep"):
        path = find_model(NAME)
    assert (path / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert [line for line in hub.requests if line.startswith("GET") and "bytes=" in line]


def test_a_download_that_was_stopped_keeps_its_files(hub: Hub, checkpoint: Path) -> None:
    hub.add(NAME, checkpoint)
    hub.broken = "model.safetensors"
    with patch("time.sleep"), pytest.raises(InputError, match=r"repeat the command: files that are whole are kept"):
        find_model(NAME)
    hub.broken = "nothing"
    hub.requests.clear()
    assert {file.name for file in find_model(NAME).iterdir()} == {file.name for file in checkpoint.iterdir()}
    again = [line.rpartition("/")[2] for line in hub.requests if "GET" in line and "/resolve/" in line]
    assert again == ["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        (
            "user/none",
            {},
            "no such file or folder, and no such model on the Hub: check the name; if it is private, log",
        ),
        ("user/private", {"private": True}, "if it is private, log in with `hf auth login`, or set HF_TOKEN"),
        ("user/gated", {"gated": True}, "is gated: accept its terms on its page of the Hub, then log in"),
        ("user/open@v9", {}, "user/open@v9: no such revision: expected a branch, a tag or a commit"),
    ],
)
def test_refusals(hub: Hub, name: str, how: dict[str, bool], said: str) -> None:
    if name != "user/none":
        hub.add(name.partition("@")[0], {"config.json": b"{}", "model.safetensors": b""}, **how)
    with pytest.raises(InputError) as error:
        find_model(name)
    assert said in str(error.value)


def test_a_wrong_token_is_not_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("user/gated", {"config.json": b"{}", "model.safetensors": b""}, gated=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert find_model("user/gated").is_dir()
    for token in ("hf_wrong", "hf_\u00e9\x01"):  # the second fits in no header
        monkeypatch.setenv("HF_TOKEN", token)
        done = intaglio("inspect", "user/gated")
        assert (done.code, token in done.out + done.err) == (2, False)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the Hub refuses the token (401)" in intaglio("inspect", "user/gated").error


def test_without_a_network_the_cache_serves(hub: Hub, checkpoint: Path) -> None:
    hub.add(NAME, checkpoint)
    path = find_model(NAME)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with patch("huggingface_hub.constants.ENDPOINT", away):
            assert find_model(NAME) == path
            with pytest.raises(
                InputError, match="user/other: no such file or folder, and no model of this name can be read"
            ):
                find_model("user/other")


def test_a_branch_that_moved_is_said_and_a_commit_stays(hub: Hub, checkpoint: Path) -> None:
    repo = hub.add(NAME, checkpoint)
    first = find_model(NAME)
    old, new = repo.branches["main"], repo.commit({"README.md": b"other"})
    notes = Notes()
    second = find_model(NAME, Progress(notes))
    assert notes.lines[0] == f"{NAME}: has moved to {new}, which is taken; before it was {NAME}@{old}"
    assert second != first == find_model(f"{NAME}@{old}")


def test_a_run_is_not_resumed_from_another_commit(tmp_path: Path, checkpoint: Path) -> None:
    plan = make_plan(checkpoint, "q4_0")
    began, now = (run_identity(plan, None, None, f"{NAME}@{commit * 40}") for commit in "ab")
    claim(tmp_path, began)
    check_run_dir(tmp_path, began, resume=True)
    with pytest.raises(OutputError, match=rf"model is {NAME}@b{{40}}, and the run there began with {NAME}@a{{40}}"):
        check_run_dir(tmp_path, now, resume=True)


def test_progress_shows_the_bytes(hub: Hub) -> None:
    hub.add(NAME, {"model.safetensors": bytes(3_000_000), "config.json": b"{}"})
    notes = Notes()
    find_model(NAME, Progress(notes))
    assert notes.lines[0] == f"Downloading {NAME}"
    assert notes.lines[-1] == "3 of 3 MB"


def test_a_disk_that_is_too_full(hub: Hub, checkpoint: Path) -> None:
    hub.add(NAME, checkpoint)
    with (
        patch("shutil.disk_usage", return_value=shutil._ntuple_diskusage(10, 10, 0)),
        pytest.raises(OutputError, match=rf"{NAME}: takes [\d,]+ bytes, and the disk of .* has 0 free"),
    ):
        find_model(NAME)
    assert not hub.count("GET", "/resolve/")


def test_a_repository_of_pickles_is_refused_before_anything_is_downloaded(hub: Hub) -> None:
    hub.add("user/pickled", {"config.json": b"{}", "pytorch_model.bin": b""})
    with pytest.raises(ConfigError, match=r"it holds config.json, pytorch_model.bin: pickles and code are never"):
        find_model("user/pickled")
    assert not hub.count("GET", "/resolve/")
    assert (find_model("user/pickled", files=CONFIG_ONLY) / "config.json").is_file()


def test_an_adapter_says_how_to_merge_it(hub: Hub) -> None:
    config = b'{"base_model_name_or_path": "google/gemma-4-E2B-it", "peft_type": "LORA"}'
    hub.add("user/lora", {"adapter_config.json": config, "adapter_model.safetensors": b""})
    done = intaglio("inspect", "user/lora")
    assert "an adapter (LORA) without its model: merge it into its base, google/gemma-4-E2B-it" in done.error


@pytest.mark.parametrize(
    "name", ["../user/model", "user/../model", "user/..", "user/model@../x", "user/model:../x", "/etc"]
)
def test_what_is_no_name_never_leaves_the_machine(hub: Hub, name: str) -> None:
    assert find_model(name) == Path(name)
    assert intaglio("inspect", name).code == 2
    assert not hub.requests
