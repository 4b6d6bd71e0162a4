"""The project's files agree with each other: versions, paths and what CI runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.M))
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def loaded(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text("utf-8"))


def test_pre_commit_has_the_versions_that_were_tested() -> None:
    hooks = [hook for repo in loaded(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "codespell", "mypy"}
    for hook in hooks:
        tool = hook["entry"].split()[0]
        if hook["language"] == "system":
            assert tool == f".venv/bin/{hook['id']}"
        else:
            assert hook["additional_dependencies"] == [f"{tool}=={PINS[tool]}"]


def test_the_wheel_says_that_it_is_typed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]
    assert "py.typed" in settings["setuptools"]["package-data"]["intaglio"]
    assert settings["mypy"]["strict"] and (ROOT / "src/intaglio/py.typed").is_file()


@pytest.mark.parametrize("extra", ["dev", "docs", "release"])
def test_every_tool_is_pinned(extra: str) -> None:
    names = {re.split(r"[=>]", need)[0].lower() for need in PROJECT["optional-dependencies"][extra]}
    assert names <= {name.lower() for name in PINS}
    for need in PROJECT["optional-dependencies"][extra]:
        name, exact, version = need.partition("==")
        assert not exact or version == PINS[name]


def test_ci_runs_what_a_contributor_runs() -> None:
    jobs = loaded(".github/workflows/ci.yml")["jobs"]
    assert [step["run"] for step in jobs["linux"]["steps"] if "run" in step] == [".ci/run"]
    assert [step["run"] for step in jobs["macos"]["steps"] if "run" in step] == ["make light"]
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    assert jobs["linux"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    run = re.findall(r"^make ([\w-]+)", (ROOT / ".ci/run").read_text("utf-8") + CONTRIBUTING, re.M)
    assert {"test", "test-runtimes", "check", "docs"} <= set(run) <= targets


def test_forms_can_be_filled_in() -> None:
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    for path in forms:
        form = loaded(str(path.relative_to(ROOT)))
        assert form["name"] and form["description"]
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids)) > 2
        assert all(field["attributes"]["label"] for field in form["body"])
    assert len(forms) == 3


def test_the_citation_is_of_this_version() -> None:
    citation = loaded("CITATION.cff")
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


def files_of(heading: str) -> set[str]:
    """Paths in the list under a heading of CONTRIBUTING.md."""
    section = CONTRIBUTING.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"`((?:src|tests|docs|benchmarks)/[\w./-]*|mkdocs\.yml)`", section))


@pytest.mark.parametrize("heading", re.findall(r"^## (Add a .*)$", CONTRIBUTING, re.M))
def test_contributing_lists_files_that_exist(heading: str) -> None:
    listed = files_of(heading)
    assert len(listed) > 4
    assert not [path for path in listed if "NAME" not in path and not (ROOT / path).exists()]


def naming(word: str) -> set[str]:
    """Source files that have this word."""
    files = {path: path.read_text("utf-8") for path in (ROOT / "src/intaglio").rglob("*.py")}
    return {str(path.relative_to(ROOT)) for path, text in files.items() if re.search(word, text)}


def test_the_lists_have_every_file_of_their_example() -> None:
    assert naming(r"(?<!F\.)\bcross_entropy\b|chunked_cross_entropy") <= files_of("Add a loss")
    assert naming(r"\bRUNTIMES: dict") <= files_of("Add a runtime")
