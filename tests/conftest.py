"""Shared by every test: hypothesis without a clock and without chance, and exported tiny models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import settings

from intaglio.packed.model import PackedModel
from intaglio.train import distill
from tests.support.cases import CONFIGS, Case, make_case
from tests.support.hub import Hub, serve_hub
from tests.support.onnx import traced
from tests.support.tiny import GEMMA4, make_checkpoint, pack

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

os.environ["HF_HUB_OFFLINE"] = "1"  # a test speaks to the stand-in of tests/support/hub.py, or to no Hub at all

# A console keeps the width that COLUMNS had when its module was imported. A process of pytest-xdist has 80 there, and
# tests set it later. So the consoles are made here, before any test module is imported, and ask each time.
os.environ.pop("COLUMNS", None)
import_module("intaglio.cli.terminal_plan")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Spell out halves of surrogate pairs in what a test logged: no process can send them to another."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in of the Hub that nobody is logged in to, with an empty cache; the test runs in its own folder."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    with serve_hub(tmp_path / "cache") as hub:
        yield hub


@pytest.fixture(scope="session", autouse=True)
def _each_decoder_is_traced_once() -> Iterator[None]:
    """A trace takes seconds and depends on the config alone; exports of this process share it."""
    with patch("intaglio.formats.onnx.write_decoder.trace_decoder", traced):
        yield


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code runs as it is written: all that goes with it, in a second instead of a minute."""
    kernel = distill._kernel
    monkeypatch.setattr(distill, "_kernel", lambda function, softcaps, compiled: kernel(function, softcaps, False))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some thousand tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The whale swam past the ship, and nobody on it said a word.\n" * 40, "utf-8")
    return path


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: make_case(name, tmp_path_factory.mktemp(name)) for name in CONFIGS}


@pytest.fixture(params=list(CONFIGS))
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    """Each tiny model in turn. Shared: not to be changed."""
    return cases[request.param]


@pytest.fixture
def gemma4(cases: dict[str, Case]) -> Case:
    """The one with KV sharing and per-layer embeddings. Shared: not to be changed."""
    return cases["gemma4"]


@pytest.fixture
def packed_copy(gemma4: Case, tmp_path: Path) -> PackedModel:
    """A packed model that a test may change."""
    return PackedModel.open(shutil.copytree(gemma4.packed.path, tmp_path / "packed"))


@pytest.fixture(scope="session")
def mobile_packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """A random Gemma 4 by recipe `mobile`; `checkpoint` beside it is its source. Shared: not to be changed."""
    folder = tmp_path_factory.mktemp("mobile")
    return pack(make_checkpoint(folder / "checkpoint", GEMMA4), folder / "packed", "mobile")
