"""Verbs that look: at a model before it is made, at a checkpoint, at what a run made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intaglio.cli.options import (
    HUB,
    Columns,
    Context,
    EvalTokens,
    InChat,
    Json,
    Limit,
    Overrides,
    RecipeName,
    References,
    Replace,
    Shots,
    Tasks,
    Text,
    TextOnly,
    app,
    evaluation_of,
    located,
    print_json,
    print_notes,
    say_folder,
    source_of,
)
from intaglio.errors import RuntimeFailureError

PlannedDrafter = Annotated[
    str | None, typer.Option(help="Drafter to plan beside the model: folder or name.", show_default=False)
]
PlannedRecomputation = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Plan training that recomputes layers.")
]
WholeFamily = Annotated[bool, typer.Option("--all", help="Compare all five models with Google's published figures.")]
Budget = Annotated[
    str | None, typer.Option(help="Say what fits into this memory, for example 8GB.", show_default=False)
]


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model folder, its config.json, a name of the Hub, or e2b, e4b, 12b, 26b-a4b, 31b.",
            show_default=False,
        ),
    ] = None,
    recipe: RecipeName = "q4_0",
    overrides: Overrides = (),  # type: ignore[assignment]
    text_only: TextOnly = False,
    context: Annotated[str, typer.Option(help="Tokens in the KV cache of a sequence.")] = "32k",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    drafter: PlannedDrafter = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that training is sharded over.")] = 1,
    gradient_checkpointing: PlannedRecomputation = False,
    budget: Budget = None,
    metadata_bytes: Annotated[str, typer.Option(help="Keys and values of the GGUF: its tokenizer.")] = "15.8MB",
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor instead.")] = False,
    everything: WholeFamily = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts.", show_default=False)] = None,
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Say what a model takes on disk, in memory and in training; no weights are read."""
    from intaglio.cli.terminal import Bars
    from intaglio.cli.terminal_plan import print_family, print_survey, print_tensors
    from intaglio.packed.outputs import check_output
    from intaglio.plan.recipe import Recipe
    from intaglio.plan.units import parse_bytes, parse_tokens
    from intaglio.sizing import planning

    if html is not None:
        check_output(html, [model, recipe, drafter])
    if everything == (model is not None):
        raise typer.BadParameter("expected a model, or --all for the family")
    metadata = parse_bytes(metadata_bytes, "--metadata-bytes")
    if model is None:
        rows = planning.family(metadata)
        return print_json(planning.family_dict(rows)) if as_json else print_family(rows)
    wishes = planning.Wishes(
        context=parse_tokens(context, "--context"),
        batch=batch,
        gpus=gpus,
        gradient_checkpointing=gradient_checkpointing,
        metadata_bytes=metadata,
        budget_bytes=None if budget is None else parse_bytes(budget, "--budget"),
    )
    how = Recipe.load(recipe, overrides)
    say_folder(model)
    with Bars() as bars:
        made = planning.survey(model, how, wishes, drafter=drafter, text_only=text_only, progress=bars.progress)
    print_notes(made.notes)
    if html is not None:
        from intaglio.cli.plan_page import write_page

        write_page(made, html, replace=replace)
    if as_json:
        return print_json(made.to_dict())
    print_tensors(made.plan) if tensors else print_survey(made)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help=f"Checkpoint folder, .safetensors or .gguf, {HUB}.", show_default=False)],
    every: Annotated[bool, typer.Option("--all", help="A line for every tensor, not one for those of a kind.")] = False,
    as_json: Json = False,
) -> None:
    """Show which grid each tensor lies on, and what stock tools would make of it. Nothing is executed."""
    from intaglio.cli.terminal import Bars, print_inspection
    from intaglio.plan.hub import ARTIFACT
    from intaglio.sources.inspect import inspect as run_inspect

    path = located(path, *ARTIFACT)
    with Bars() as bars:
        found = run_inspect(path, on_tensor=lambda done, total, name: bars.part(done >> 20, total >> 20, "MB"))
    if as_json:
        print_json(found.to_dict())
    else:
        print_inspection(found, every=every)


@app.command("data")
def show_data(
    data: Annotated[str, typer.Argument(help="A file, a folder, or a dataset's name.", show_default=False)],
    model: Annotated[Path, typer.Option(help="Model whose tokenizer and chat template are used.", show_default=False)],
    columns: Columns = (),  # type: ignore[assignment]
    assistant_only: Annotated[
        bool, typer.Option("--assistant-only", help="Learn from assistant turns only, as schedule.assistant_only.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=2, help="Read so many tokens at most.")] = 10_000_000,
    as_json: Json = False,
) -> None:
    """Show what a model would be trained on: what is read and what is not, and documents as the model sees them."""
    from intaglio.packed.assets import load_tokenizer
    from intaglio.plan.hub import TEXTS
    from intaglio.train.data.preview import preview

    source = source_of(data, columns)
    assert source is not None
    found = preview(source, load_tokenizer(located(model, *TEXTS)), max_tokens=tokens, assistant_only=assistant_only)
    if as_json:
        return print_json(found.to_dict())
    for line in found.reading.lines():
        typer.echo(line)
    for number, sample in enumerate(found.samples, 1):
        typer.echo(f"\n--- document {number} ---\n{sample}")
    for warning in found.warnings:
        typer.echo(f"\nwarning: {warning}")


@app.command("eval")
def evaluate(
    artifact: Annotated[
        Path, typer.Argument(help=f"Packed model, .gguf or transformers folder, {HUB}.", show_default=False)
    ],
    original: Annotated[Path, typer.Option(help=f"The float checkpoint to compare with, {HUB}.", show_default=False)],
    text: Text = None,
    columns: Columns = (),  # type: ignore[assignment]
    eval_tokens: EvalTokens = 65536,
    int8_cache: Annotated[
        bool, typer.Option("--int8-cache", help="Read a packed mobile model token by token, from a cache of int8.")
    ] = False,
    tasks: Tasks = None,
    limit: Limit = None,
    shots: Shots = None,
    chat_template: InChat = False,
    context: Context = 4096,
    as_json: Json = False,
) -> None:
    """Measure an artifact's KL to the original, and scores in tasks: a .gguf in llama.cpp, others in transformers."""
    from dataclasses import asdict

    from intaglio.cli.terminal import Bars, print_comparison, print_scores
    from intaglio.measure.tasks import Asking, evaluate_tasks
    from intaglio.plan.hub import ARTIFACT
    from intaglio.runs.compare import compare

    if text is None and tasks is None:
        raise typer.BadParameter("expected --text, --tasks or both")
    artifact, original = located(artifact, *ARTIFACT), located(original)
    result, scores = None, None
    with Bars() as bars:
        if tasks is not None:
            asking = Asking(limit=limit, shots=shots, chat_template=chat_template, context_tokens=context)
            scores = evaluate_tasks(artifact, original, tasks, asking, progress=bars.progress)
        if text is not None:
            evaluation = evaluation_of(text, eval_tokens, [], columns)
            result = compare(artifact, original, evaluation, bars.progress, int8_cache=int8_cache)
    if as_json:
        rows = {} if scores is None else {"tasks": [asdict(score) for score in scores]}
        return print_json((result.to_dict() if result else {}) | rows)
    if result is not None:
        print_comparison(artifact.name, result)
    if scores is not None:
        print_scores(artifact.name, scores)


@app.command()
def watch(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run: training, ended or finished.", show_default=False)],
    port: Annotated[int, typer.Option(help="Port of this machine to serve it at; 0: any that is free.")] = 8420,
) -> None:
    """Serve a page that shows a run while it trains, to this machine alone. Ctrl-C ends it."""
    from intaglio.runs.watch import watch as run_watch

    run_watch(run_dir, port=port, on_start=typer.echo)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    original: Annotated[Path, typer.Option(help=f"The float checkpoint, {HUB}.", show_default=False)],
    text: Text = None,
    columns: Columns = (),  # type: ignore[assignment]
    eval_tokens: EvalTokens = 65536,
    prompt: Annotated[list[str], typer.Option(help="Show continuations of this.")] = (),  # type: ignore[assignment]
    references: References = None,
    tasks: Tasks = None,
    limit: Limit = None,
    shots: Shots = None,
    chat_template: InChat = False,
    context: Context = 4096,
) -> None:
    """Measure a finished run again and rewrite report.html, report.md and report.json."""
    from intaglio.cli.terminal import Bars, print_report
    from intaglio.measure.tasks import Asking
    from intaglio.runs.compare import report as run_report

    original = located(original)
    with Bars() as bars:
        made = run_report(
            original,
            run_dir,
            evaluation=evaluation_of(text, eval_tokens, prompt, columns, references),
            tasks=tasks,
            asking=Asking(limit=limit, shots=shots, chat_template=chat_template, context_tokens=context),
            progress=bars.progress,
        )
    print_report(made, run_dir)
    if any(row.failure for row in made.comparisons):
        raise typer.Exit(RuntimeFailureError.exit_code)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is here: processor, GPUs, packages, runtimes, and what each verb can do. Exit code 1 for a fault."""
    from dataclasses import asdict

    from intaglio.cli.terminal_doctor import print_doctor
    from intaglio.runs.doctor import FAULT
    from intaglio.runs.doctor import doctor as run_doctor

    facts = run_doctor()
    print_json([asdict(fact) for fact in facts]) if as_json else print_doctor(facts)
    if any(fact.state == FAULT for fact in facts):
        raise typer.Exit(RuntimeFailureError.exit_code)
