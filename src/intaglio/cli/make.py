"""Verbs that make a packed model: demo, quantize, train, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from intaglio.cli.options import (
    HUB,
    CheckpointEvery,
    Columns,
    EvalTokens,
    Json,
    ModelDir,
    Overrides,
    Precision,
    RecipeName,
    References,
    Replace,
    Resume,
    Text,
    TextOnly,
    app,
    evaluation_of,
    located,
    print_json,
    print_notes,
    print_towers_off,
    source_of,
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder.")] = Path("intaglio-demo"),
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="q4_0 or mobile.")] = "q4_0",
    drafter: Annotated[bool, typer.Option("--drafter", help="Then train its drafter again for it.")] = False,
    replace: Replace = False,
) -> None:
    """Train the bundled tiny Gemma 4, export it, run it, and show the proof. A few minutes."""
    from intaglio.cli.terminal import Bars, print_report
    from intaglio.runs.demo import run_demo, run_demo_drafter

    with Bars() as bars:
        report = run_demo(out, recipe=recipe, replace=replace, progress=bars.progress)
    print_report(report, out)
    if drafter:
        from intaglio.cli.terminal_drafter import print_drafter

        with Bars() as bars:
            found = run_demo_drafter(out, recipe=recipe, progress=bars.progress)
        print_drafter(found, out / "drafter")


@app.command()
def quantize(
    model: ModelDir,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the packed model.", show_default=False)],
    recipe: RecipeName = "q4_0",
    overrides: Overrides = (),  # type: ignore[assignment]
    data: Annotated[
        str | None,
        typer.Option(help="Text for static scales, which are off without it, and for schedule.gptq_tokens."),
    ] = None,
    columns: Columns = (),  # type: ignore[assignment]
    images: Annotated[
        Path | None, typer.Option(help="Folder of images, for the scales of the vision tower.", show_default=False)
    ] = None,
    audio: Annotated[
        Path | None, typer.Option(help="Folder of .wav files, for the scales of the audio tower.", show_default=False)
    ] = None,
    text_only: TextOnly = False,
    trained: Annotated[
        Path | None,
        typer.Option(help="Take text model and recipe from this packed model; fit towers only.", show_default=False),
    ] = None,
    replace: Replace = False,
) -> None:
    """Fit scales without training and write a packed model; then `export` it."""
    from intaglio.cli.terminal import Bars
    from intaglio.packed.checkpoint import checkpoint_spec, notes
    from intaglio.packed.model import PackedModel
    from intaglio.packed.outputs import check_output
    from intaglio.plan.recipe import Recipe
    from intaglio.runs.quantize import quantize_model

    check_output(out, [recipe])
    model = located(model)
    text = None if trained is None else PackedModel.open(located(trained))
    chosen = Recipe.load(recipe, overrides) if text is None else text.plan.recipe
    print_notes(notes(model, checkpoint_spec(model, text_only=text_only)))
    with Bars() as bars:
        packed, errors = quantize_model(
            model,
            chosen,
            out,
            data=source_of(data, columns),
            images=images,
            audio=audio,
            text_only=text_only,
            trained=text,
            replace=replace,
            progress=bars.progress,
        )
    typer.echo(f"{out}: {packed.plan.size_bytes:,} bytes of tensors on recipe {packed.plan.recipe.name}")
    for kind, error in errors.items():
        typer.echo(f"{kind} tower: 8-bit activations change its output on these samples by {error:.2%} (RMS)")
    print_towers_off(packed)


TrainingText = Annotated[
    str | None,
    typer.Option(
        help="Text or chats: file, folder (its train split) or name of a dataset; by default the model writes text."
    ),
]
Compiled = Annotated[bool | None, typer.Option("--compile/--no-compile", help="Compile layers; by default on a GPU.")]
Recomputed = Annotated[bool, typer.Option("--gradient-checkpointing", help="Recompute layers: less memory, more time.")]
Track = Annotated[
    list[str], typer.Option(help="Tell every step to wandb, trackio, tensorboard or mlflow; commas between.")
]


@app.command()
def train(
    model: Annotated[
        Path,
        typer.Argument(help=f"Folder of a transformers checkpoint or of a packed model, {HUB}.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder.", show_default=False)],
    data: TrainingText = None,
    columns: Columns = (),  # type: ignore[assignment]
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A preset (q4_0 by default), or the path of a TOML file.")
    ] = None,
    overrides: Overrides = (),  # type: ignore[assignment]
    teacher: Annotated[
        Path | None, typer.Option(help="Checkpoint that a packed model learns from.", show_default=False)
    ] = None,
    text: Text = None,
    eval_tokens: EvalTokens = 65536,
    prompt: Annotated[list[str], typer.Option(help="Show continuations of this in the report.")] = (),  # type: ignore[assignment]
    references: References = None,
    resume: Resume = False,
    checkpoint_every: CheckpointEvery = 100,
    precision: Precision = None,
    compiled: Compiled = None,
    gradient_checkpointing: Recomputed = False,
    eval_every: Annotated[int, typer.Option(help="Steps between measurements on held-out text; 0: none.")] = 0,
    track: Track = (),  # type: ignore[assignment]
) -> None:
    """Train a checkpoint to its grids, or a packed model on them; leaves artifacts, packed model and report."""
    from intaglio.packed.model import FILE_NAME
    from intaglio.train.options import Options

    options = Options(
        precision=precision,
        compiled=compiled,
        checkpoint_every=checkpoint_every,
        eval_every=eval_every,
        track=tuple(name for names in track for name in names.split(",")),
        gradient_checkpointing=gradient_checkpointing,
    )
    evaluation = evaluation_of(text, eval_tokens, prompt, columns, references)
    source, model = source_of(data, columns), located(model)
    common: dict[str, Any] = {"data": source, "evaluation": evaluation, "options": options, "resume": resume}
    if (model / FILE_NAME).is_file():
        if recipe is not None:
            raise typer.BadParameter(
                f"{model} is packed and has its recipe: leave out --recipe, or change it with --set"
            )
        if references is not None:
            raise typer.BadParameter(
                f"--references: {model} is packed, and is measured before and after training: leave it out"
            )
        teacher = None if teacher is None else located(teacher)
        _train_packed(model, out, teacher_dir=teacher, overrides=overrides, **common)
    else:
        if teacher is not None:
            raise typer.BadParameter(
                f"--teacher: {model} is a checkpoint of floats, which learns from itself: leave it out"
            )
        _train_floats(model, out, recipe or "q4_0", overrides, **common)


def _train_floats(model: Path, out: Path, recipe: str, overrides: list[str], **common: Any) -> None:
    """A checkpoint is brought to its recipe's grids."""
    from intaglio.cli.terminal import Bars, print_report
    from intaglio.packed.checkpoint import notes
    from intaglio.packed.identity import CHECKPOINT, expect
    from intaglio.plan.family import read_spec
    from intaglio.plan.recipe import Recipe
    from intaglio.runs.train import run

    expect(model, CHECKPOINT)
    print_notes(notes(model, read_spec(model)))
    loaded = Recipe.load(recipe, overrides)
    with Bars() as bars:
        report = run(model, loaded, out, progress=bars.progress, **common)
    if report is not None:  # the main process has it
        print_report(report, out)


def _train_packed(model: Path, out: Path, **how: Any) -> None:
    """A packed model goes on learning on its grids."""
    from intaglio.cli.terminal import Bars, print_comparison
    from intaglio.runs.finetune import finetune

    with Bars() as bars:
        tuned = finetune(model, out, progress=bars.progress, **how)
    print_comparison("before", tuned.before)
    print_comparison("after", tuned.after)
    for path in tuned.files:
        typer.echo(f"{path}: holds what was trained, 0 bits differ")


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A QAT checkpoint: floats on a grid, mobile folder, W4A16 folder, Q4_0 .gguf, or a name of the Hub.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the packed model.", show_default=False)],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A preset or TOML file; by default the grids that are found.")
    ] = None,
    overrides: Overrides = (),  # type: ignore[assignment]
    config: Annotated[
        Path | None, typer.Option(help="Folder of config.json and tokenizer, for a .gguf or .safetensors.")
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Fit blocks anew that are on no grid; the result is lossy.")
    ] = False,
    text_only: TextOnly = False,
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Take the trained codes out of a checkpoint, ours or anyone's, into a packed model; then `export` it."""
    from intaglio.cli.terminal import Bars, print_conversion
    from intaglio.packed.outputs import check_output
    from intaglio.plan.hub import ARTIFACT, TEXTS
    from intaglio.plan.recipe import Recipe
    from intaglio.sources.convert import convert as run_convert

    check_output(out, [source, config, recipe])
    source, config = located(source, *ARTIFACT), None if config is None else located(config, *TEXTS)
    with Bars() as bars:
        result = run_convert(
            source,
            out,
            recipe=None if recipe is None else Recipe.load(recipe, overrides),
            overrides=() if recipe is not None else overrides,
            config=config,
            requantize=requantize,
            text_only=text_only,
            replace=replace,
            on_tensor=bars.part,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        print_conversion(result)
