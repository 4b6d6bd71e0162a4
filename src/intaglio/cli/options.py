"""Shared parts of the verbs: the application, options that several have, and how they print JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from intaglio.packed.model import PackedModel
    from intaglio.runs.proof import Evaluation
    from intaglio.train.data.sources import Data

app = typer.Typer(
    help="Quantization-aware training for Gemma 4: what was trained is, bit for bit, what ships.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

HUB = "or a name of the Hub: user/model, user/model@revision"
ModelDir = Annotated[Path, typer.Argument(help=f"Folder of a transformers checkpoint, {HUB}.", show_default=False)]
PackedDir = Annotated[Path, typer.Argument(help=f"Folder that train or quantize wrote, {HUB}.", show_default=False)]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="A preset, or the path of a TOML file.")]
Overrides = Annotated[list[str], typer.Option("--set", help="Change a recipe key: schedule.lr=1e-4.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Replace = Annotated[bool, typer.Option("--replace", help="Replace an existing output.")]
TextOnly = Annotated[bool, typer.Option("--text-only", help="Leave out vision and audio towers.")]
Text = Annotated[Path | None, typer.Option("--text", help="Held-out text (.txt, .jsonl, .parquet).")]
Columns = Annotated[
    list[str],
    typer.Option(
        "--column", help="Name of a column: text=NAME, messages=NAME, prompt=NAME, completion=NAME, tools=NAME."
    ),
]
EvalTokens = Annotated[int, typer.Option("--eval-tokens", help="Held-out tokens to measure on.")]
Tasks = Annotated[str | None, typer.Option(help="Tasks of lm_eval, with commas between: names or .yaml files.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Questions of each task.")]
Shots = Annotated[int | None, typer.Option(min=0, help="Examples before a question of a task.")]
InChat = Annotated[bool, typer.Option("--chat-template", help="Ask tasks in a chat.")]
Context = Annotated[int, typer.Option(min=2, help="Tokens of a task's question and answer.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")]
CheckpointEvery = Annotated[int, typer.Option(help="Optimizer steps between checkpoints; 0: none.")]
Precision = Annotated[str | None, typer.Option(help="bf16 or no; by default bf16 on a GPU.")]
References = Annotated[
    str | None, typer.Option(help="Untrained models to measure beside it: none, stock, or all (default).")
]


def evaluation_of(
    text: str | Path | None, tokens: int, prompts: list[str], columns: list[str], references: str | None = None
) -> Evaluation:
    """The text to measure on, as the options say it."""
    from intaglio.runs.proof import Evaluation

    held_out = source_of(text, columns)
    return Evaluation(text=held_out, tokens=tokens, prompts=tuple(prompts), references=references or "all")


def source_of(text: str | Path | None, columns: list[str]) -> Data | None:
    """Text with the names of its columns, as the options say it."""
    from intaglio.train.data.sources import Source

    if text is not None:
        say_folder(text)
    if not columns or text is None:
        return text
    pairs = [column.partition("=") for column in columns]
    if wrong := next((column for column, pair in zip(columns, pairs, strict=True) if not (pair[0] and pair[2])), None):
        raise typer.BadParameter(f"--column {wrong}: expected ROLE=NAME, for example text=body")
    return Source(text, {role: name for role, _, name in pairs})


def located(name: Path, *files: str) -> Path:
    """The path of a model argument; what a name of the Hub stands for is downloaded, with a bar.

    files: patterns of the files that are wanted, as `find_model` takes them; by default those of a checkpoint.
    """
    from intaglio.cli.terminal import Bars
    from intaglio.plan.hub import MODEL, NAME, find_model

    say_folder(name)
    if name.exists() or not NAME.fullmatch(str(name)):
        return name
    with Bars() as bars:
        return find_model(name, bars.progress, files or MODEL)


def say_folder(name: str | Path) -> None:
    """Say that a folder is taken, where its name could be one of the Hub too. Nobody means a packed model otherwise."""
    from intaglio.packed.identity import PACKED_FILE
    from intaglio.plan.hub import NAME

    if NAME.fullmatch(str(name)) and Path(name).is_dir() and not (Path(name) / PACKED_FILE).is_file():
        print_notes([f"{name}: taken as the folder of this name, not as a repository of the Hub"])


def print_json(value: Any) -> None:
    """Print a value as JSON, for programs."""
    typer.echo(json.dumps(value, indent=2))


def print_notes(notes: list[str]) -> None:
    """Say what a user has to hear before the work begins; beside what a program reads."""
    for note in notes:
        typer.echo(note, err=True)


def print_towers_off(packed: PackedModel) -> None:
    """Say it where activations of a tower stay floats."""
    from intaglio.plan.carried import scales_in_use

    for kind, (known, total) in scales_in_use(packed.plan.carried_scales, packed.read_static()).items():
        if known < total:
            option = {"vision": "--images", "audio": "--audio"}[kind]
            typer.echo(
                f"{kind} tower: {total - known} of {total} activation scales are 0, off: `quantize {option} DIR` "
                "calibrates them"
            )
