"""`release --push`: what is uploaded and what never is. The Hub is a stand-in; huggingface_hub is the real one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from huggingface_hub import HfApi

from intaglio import Recipe, make_release, push_release, quantize_model
from intaglio.errors import InputError
from intaglio.packed.model import PackedModel
from tests.support.cli import intaglio
from tests.support.hub import TOKEN, Hub, serve_hub
from tests.support.tiny import make_checkpoint

BASE, NAME = "user/tiny-gemma", "user/tiny-gemma-q4"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[PackedModel, Path]:
    """A packed model whose source has a name on the Hub, and its release. Shared: not to be changed."""
    folder = tmp_path_factory.mktemp("push")
    checkpoint = make_checkpoint(folder / "checkpoint")
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    with serve_hub(folder / "cache") as hub:
        hub.add(BASE, checkpoint)
        packed, _ = quantize_model(BASE, Recipe.load("q4_0-stock"), folder / "packed")
    make_release(packed, folder / "release", "gguf,mlx")
    return packed, folder / "release"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve_hub(tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def verified() -> Iterator[None]:
    """Verification, which takes seconds and finds nothing, is left out."""
    with patch("intaglio.runs.push.verify_release", return_value=([], [])):
        yield


def head(card: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_what_was_verified_is_what_is_uploaded(hub: Hub, made: tuple[PackedModel, Path], tmp_path: Path) -> None:
    packed, release = made
    hub.add("user/packed", packed.path)
    done = intaglio("release", "user/packed", release, "--push", NAME, "--private")
    assert done.code == 0, done.err
    repo = hub.repos[f"models/{NAME}"]
    assert repo.private
    files = repo.commits[repo.branches["main"]]
    del files[".gitattributes"]
    assert files == {path: (release / path).read_bytes() for path in files}
    assert {"README.md", "SHA256SUMS", "gguf/model.gguf", "mlx/config.json"} <= files.keys()
    assert not [path for path in files if ".intaglio" in path]
    card = head(files["README.md"].decode())
    assert (card["base_model"], card["base_model_relation"]) == (BASE, "quantized")
    assert card["license"] == "apache-2.0" and "intaglio" in card["tags"]  # type: ignore[operator]
    assert intaglio("verify", packed.path, f"{NAME}:gguf").code == 0


@pytest.mark.usefixtures("verified")
def test_each_format_has_a_repository_of_its_own(hub: Hub, made: tuple[PackedModel, Path]) -> None:
    packed, release = made
    pushed = push_release(packed, release, NAME, each=True)
    assert [repo.repo for repo in pushed] == [f"{NAME}-gguf", f"{NAME}-mlx"]
    repo = hub.repos[f"models/{NAME}-mlx"]
    files = repo.commits[repo.branches["main"]]
    assert files["config.json"] == (release / "mlx" / "config.json").read_bytes()
    assert head(files["README.md"].decode())["base_model"] == BASE
    assert b"  config.json\n" in files["SHA256SUMS"] and b"gguf" not in files["SHA256SUMS"]


@pytest.mark.usefixtures("verified")
def test_a_dry_run_shows_all_and_asks_nobody(hub: Hub, made: tuple[PackedModel, Path]) -> None:
    packed, release = made
    done = intaglio("release", packed.path, release, "--push", NAME, "--dry-run")
    assert done.code == 0, done.err
    assert f"{(release / 'gguf' / 'model.gguf').stat().st_size:,}  gguf/model.gguf" in done.out
    assert (release / "README.md").read_text() in done.out
    (said,) = json.loads(intaglio("release", packed.path, release, "--push", NAME, "--dry-run", "--json").out)
    assert said["bytes"] == sum(said["files"].values()) and said["unknown"] == []
    assert not hub.requests


@pytest.mark.usefixtures("verified")
def test_an_upload_that_broke_off_sends_the_rest(hub: Hub, made: tuple[PackedModel, Path]) -> None:
    packed, release = made
    hub.cut = 100_000
    with pytest.raises(InputError, match=NAME):
        push_release(packed, release, NAME)
    repo = hub.repos[f"models/{NAME}"]
    assert repo.commits[repo.branches["main"]].keys() == {".gitattributes"}, "half a release is visible"
    sent = set(hub.blobs)
    hub.requests.clear()
    (pushed,) = push_release(packed, release, NAME)
    again = {line.rpartition("/")[2] for line in hub.requests if line.startswith("PUT")}
    assert again == set(hub.blobs) - sent
    assert repo.commits[repo.branches["main"]].keys() - {".gitattributes"} == pushed.files.keys()
    hub.requests.clear()
    push_release(packed, release, NAME)
    assert not hub.count("PUT", "/blob/")


def test_what_differs_is_not_uploaded(hub: Hub, made: tuple[PackedModel, Path], tmp_path: Path) -> None:
    packed, release = made
    changed = shutil.copytree(release, tmp_path / "release")
    with open(changed / "README.md", "a") as file:
        file.write("better than the original\n")
    done = intaglio("release", packed.path, changed, "--push", NAME)
    assert done.code == 3 and "README.md has other bytes: nothing is uploaded" in done.error
    assert intaglio("release", packed.path, tmp_path, "--push", NAME).error.endswith(
        "as `intaglio export --to` writes it"
    )
    for name in ("tiny", "../x/y", "user/a@main", "user/a:b"):
        assert "expected user/name" in intaglio("release", packed.path, release, "--push", name).error
    assert not hub.requests


@pytest.mark.usefixtures("verified")
def test_refusals(hub: Hub, made: tuple[PackedModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    packed, release = made
    hub.add(NAME, {"old.bin": b""})
    with pytest.raises(InputError, match=f"{NAME}: is there already and is public"):
        push_release(packed, release, NAME, private=True)
    with (
        patch.object(HfApi, "create_commit", side_effect=ValueError("Invalid metadata in README.md")),
        pytest.raises(InputError, match=f"{NAME}: is refused: ValueError: Invalid metadata"),
    ):
        push_release(packed, release, NAME)
    for token, said in (("hf_wrong", "the Hub refuses the token (401)"), ("", "the Hub forbids it (403): use a token")):
        monkeypatch.setenv("HF_TOKEN", token)
        done = intaglio("release", packed.path, release, "--push", NAME)
        assert done.code == 2 and said in done.error
        assert "hf_wrong" not in done.out + done.err


def test_a_card_stays_yaml_whatever_a_stranger_wrote(made: tuple[PackedModel, Path], tmp_path: Path) -> None:
    odd = "x: [\n---\n- 'evil': {\x07 #"
    packed = replace(
        made[0], provenance={"name": odd, "license": odd, "base_model": odd, "datasets": [odd], "data": odd}
    )
    make_release(packed, tmp_path / "out", "mlx")
    for card in (tmp_path / "out" / "README.md", tmp_path / "out" / "mlx" / "README.md"):
        said = head(card.read_text("utf-8"))
        assert (said["license"], said["datasets"]) == (odd, [odd])
