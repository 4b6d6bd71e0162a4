"""Verbs for drafters: train-drafter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intaglio.cli.options import (
    HUB,
    CheckpointEvery,
    Columns,
    Json,
    Overrides,
    Precision,
    Resume,
    Text,
    app,
    located,
    print_json,
    source_of,
)

if TYPE_CHECKING:
    from intaglio.drafter.model import Shape


@app.command("train-drafter")
def train_drafter(
    target: Annotated[
        Path, typer.Argument(help=f"Packed model that it drafts for, or a float checkpoint, {HUB}.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder.", show_default=False)],
    drafter: Annotated[
        Path | None, typer.Option(help="Drafter to begin with; by default a new one.", show_default=False)
    ] = None,
    original: Annotated[
        Path | None, typer.Option(help="Float checkpoint that --drafter was made for, to compare.", show_default=False)
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="drafter (floats), drafter-q4_0, drafter-mobile, or a TOML file.")
    ] = "drafter-q4_0",
    overrides: Overrides = (),  # type: ignore[assignment]
    data: Annotated[str | None, typer.Option(help="Text, as for train; by default the target writes it.")] = None,
    columns: Columns = (),  # type: ignore[assignment]
    width: Annotated[int | None, typer.Option(min=32, help="Width of a new drafter; by default Google's.")] = None,
    mlp: Annotated[int | None, typer.Option(min=32, help="Width of a new drafter's MLPs.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads of a new drafter.")] = None,
    clusters: Annotated[int, typer.Option(min=0, help="Clusters of a new drafter's head; 0: none.")] = 0,
    text: Text = None,
    prompts: Annotated[int, typer.Option(help="Prompts to measure acceptance on.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 32,
    written_tokens: Annotated[int, typer.Option(help="Tokens that the target writes after each.")] = 96,
    resume: Resume = False,
    checkpoint_every: CheckpointEvery = 100,
    precision: Precision = None,
    as_json: Json = False,
) -> None:
    """Train a drafter on a quantized model, export it, and measure what the model accepts of its drafts."""
    from intaglio.cli.terminal import Bars
    from intaglio.cli.terminal_drafter import print_drafter
    from intaglio.plan.recipe import Recipe
    from intaglio.runs.drafter import Texts, run
    from intaglio.train.options import Options

    if original is not None and drafter is None:
        raise typer.BadParameter("--original is compared with the drafter that was made for it: name that by --drafter")
    target = located(target)
    drafter, original = (None if path is None else located(path) for path in (drafter, original))
    shape = _shape_of_a_new_one(target, drafter, width=width, mlp=mlp, heads=heads, clusters=clusters or None)
    with Bars() as bars:
        report = run(
            target,
            Recipe.load(recipe, overrides),
            out,
            data=source_of(data, columns),
            drafter_dir=drafter,
            shape=shape,
            original_dir=original,
            texts=Texts(
                text=source_of(text, columns), prompts=prompts, prompt_tokens=prompt_tokens, tokens=written_tokens
            ),
            options=Options(precision=precision, checkpoint_every=checkpoint_every),
            resume=resume,
            progress=bars.progress,
        )
    if report is not None:  # else another process has it
        print_json(report.to_dict()) if as_json else print_drafter(report, out)


def _shape_of_a_new_one(target: Path, drafter: Path | None, **sizes: int | None) -> Shape | None:
    """Google's with the sizes that were asked for; none where there is a drafter to begin with."""
    from intaglio.drafter.model import Shape, target_config

    asked = {name: size for name, size in sizes.items() if size is not None}
    if drafter is None:
        return Shape.official(target_config(target), **asked)
    if asked:
        raise typer.BadParameter(f"--drafter has its shape: leave out --{next(iter(asked))}")
    return None
