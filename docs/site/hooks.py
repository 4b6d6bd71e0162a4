"""Pages of the site that are not files of docs/: the command line's reference, CONTRIBUTING.md and CHANGELOG.md."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from intaglio.cli import app

ROOT = Path(__file__).parents[2]
KINDS = {str: "TEXT", Path: "PATH", int: "N", float: "X"}
SPECIAL, BACKSLASH = r"([|<>*_\[\]])", r"\\\1"
INTRO = """
This page lists every verb with its options and their defaults. [Python](python.md) says which function each verb is.

| exit code | meaning |
|---|---|
| 0 | fine |
| 1 | a quality gate failed, or a runtime did |
| 2 | wrong use or input |
| 3 | an artifact differs from the packed model |
| 128 + N | signal N ended the command |
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"cli.md": command_line()}
    for name in ("CONTRIBUTING", "CHANGELOG"):
        # links from the root of the repository into docs/
        pages[f"{name.lower()}.md"] = (ROOT / f"{name}.md").read_text("utf-8").replace("](docs/", "](")
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def command_line() -> str:
    """A section for each verb, from the application itself: what --help prints, as tables."""
    group: Any = typer.main.get_command(app)
    return "\n\n".join(
        [
            "# Command line",
            INTRO,
            *(_section(name, verb) for name, verb in sorted(group.commands.items())),
        ]
    )


def _section(name: str, verb: Any) -> str:
    arguments = [option for option in verb.params if option.param_type_name == "argument"]
    given = [a.name.upper() if a.required else f"[{a.name.upper()}]" for a in arguments]
    usage = " ".join(["intaglio", name, "[OPTIONS]", *given])
    rows = [_row(option) for option in verb.params if option.name != "help"]
    table = "\n".join(["| option | meaning | default |", "|---|---|---|", *rows])
    return f"## {name}\n\n{verb.help}\n\n```text\n{usage}\n```\n\n{table}"


def _row(option: Any) -> str:
    """Names, kind, help and default of an argument or option, as a row of a table."""
    argument = option.param_type_name == "argument"
    names = [option.name.upper()] if argument else [*option.opts, *option.secondary_opts]
    annotation = option.type_descriptor.annotation
    kinds = [KINDS[kind] for kind in typing.get_args(annotation) or (annotation,) if kind in KINDS]
    kind = "".join(f" {kind}" for kind in kinds if not argument) + ", repeated" * option.multiple
    default = "required" if option.required else option.default if option.show_default else ""
    default = "" if default in (None, False, ()) else default
    said = re.sub(SPECIAL, BACKSLASH, option.help or "")
    return f"| {', '.join(f'`{name}`' for name in names)}{kind} | {said} | {default} |"
