"""The web page: what is copied, from where, and what one is told to install. tests/runtimes open it in a browser."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

from intaglio.errors import InputError
from intaglio.formats.onnx.write_page import (
    BUILDS,
    LIBRARY,
    LIBRARY_VERSION,
    RUNTIME,
    copy_library,
    export_web,
    node_modules,
)
from tests.support.cases import Case
from tests.support.cli import contents, intaglio


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A folder as npm leaves it, as far as it is copied."""
    folder = tmp_path / "node_modules"
    for package, version in ((LIBRARY, LIBRARY_VERSION), (RUNTIME, "1.31.0")):
        (folder / package / "dist").mkdir(parents=True)
        (folder / package / "package.json").write_text(json.dumps({"version": version}))
    text = 'import*as a from"onnxruntime-web/webgpu";import{Tensor as b}from"onnxruntime-common";'
    (folder / LIBRARY / "dist" / "transformers.web.min.js").write_text(text)
    (folder / LIBRARY / "LICENSE").write_text("Apache")
    for build in BUILDS.values():
        for name in build:
            (folder / RUNTIME / "dist" / name).write_bytes(name.encode())
    return folder


def test_each_device_has_its_build_of_onnx_runtime(modules: Path, tmp_path: Path) -> None:
    versions = copy_library(modules, tmp_path / "vendor")
    assert versions == {LIBRARY: LIBRARY_VERSION, RUNTIME: "1.31.0"}
    for device, (script, binary) in BUILDS.items():
        text = (tmp_path / "vendor" / f"transformers.{device}.js").read_text()
        assert text == f'import*as a from"./{script}";import{{Tensor as b}}from"./{script}";'
        assert (tmp_path / "vendor" / binary).read_bytes() == binary.encode()


def test_two_pages_are_the_same_bytes(gemma4: Case, modules: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_web(gemma4.packed, tmp_path / name, transformers_js=modules)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_node_modules_are_found_in_a_folder_or_as_one(modules: Path) -> None:
    assert node_modules(modules) == node_modules(modules.parent) == modules


def test_what_is_missing_is_named_with_its_command(gemma4: Case, modules: Path, tmp_path: Path) -> None:
    install = f"npm install --ignore-scripts {LIBRARY}@{LIBRARY_VERSION}"
    outcome = intaglio("export", gemma4.packed.path, "web", f"--out={tmp_path / 'site'}")
    assert outcome.code == 2 and install in outcome.error and "--transformers-js" in outcome.error
    with pytest.raises(InputError, match="has no @huggingface/transformers, expected 4"):
        export_web(gemma4.packed, tmp_path / "site", transformers_js=tmp_path / "nothing")
    (modules / LIBRARY / "package.json").write_text('{"version": "3.0.0"}')
    with pytest.raises(InputError, match=r"has @huggingface/transformers 3\.0\.0, expected 4"):
        export_web(gemma4.packed, tmp_path / "site", transformers_js=modules)
    (modules / LIBRARY / "package.json").write_text(json.dumps({"version": LIBRARY_VERSION}))
    (modules / LIBRARY / "dist" / "transformers.web.min.js").write_text("export {};")
    with pytest.raises(InputError, match="does not import"):
        copy_library(modules, tmp_path / "vendor")
    assert not (tmp_path / "site").exists()


def test_the_option_is_for_the_page_alone(gemma4: Case, tmp_path: Path) -> None:
    outcome = intaglio("export", gemma4.packed.path, "gguf", f"--out={tmp_path / 'x'}", "--transformers-js=.")
    assert outcome.code == 2 and "--transformers-js is for the target web" in outcome.err


def test_the_page_is_confined_to_its_folder() -> None:
    """The page's own policy forbids it, and so does the server's, which also covers the workers."""
    page = files("intaglio.formats.onnx") / "page"
    html, server = (page / "index.html").read_text("utf-8"), (page / "serve.py").read_text("utf-8")
    found = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert found is not None
    for rule in ("default-src 'self'", "object-src 'none'", "base-uri 'none'", "form-action 'none'"):
        assert rule in found[1] and rule in server
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|<style|\sstyle=", html), "the policy lets nothing inline run"
    assert "unsafe-inline" not in html + server and "'unsafe-eval'" not in html + server
