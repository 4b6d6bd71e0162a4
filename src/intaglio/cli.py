"""The command line: verbs and their options. What they do is elsewhere, and imported when needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from intaglio.errors import IntaglioError

if TYPE_CHECKING:
    from intaglio.packed.model import PackedModel
    from intaglio.packed.verify import Verification
    from intaglio.proof import Evaluation

TARGETS = "gguf, hf (a transformers checkpoint of floats), gemma-mobile, vllm, mlx, onnx, web, ollama, lmstudio"

# Options of `export` that one target alone knows.
OWN_OPTIONS = {"draft": "ollama", "python": "litert", "context_tokens": "litert", "transformers_js": "web"}

app = typer.Typer(
    help="Quantization-aware training for Gemma 4: what was trained is, bit for bit, what ships.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelDir = Annotated[Path, typer.Argument(help="Folder of a transformers checkpoint.", show_default=False)]
PackedDir = Annotated[Path, typer.Argument(help="Folder that train or quantize wrote.", show_default=False)]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="A preset, or the path of a TOML file.")]
Overrides = Annotated[list[str], typer.Option("--set", help="Change a recipe key: schedule.lr=1e-4.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Replace = Annotated[bool, typer.Option("--replace", help="Replace an existing output.")]
TextOnly = Annotated[bool, typer.Option("--text-only", help="Leave out vision and audio towers.")]
Text = Annotated[Path | None, typer.Option("--text", help="Held-out text (.txt, .jsonl, .parquet).")]
EvalTokens = Annotated[int, typer.Option("--eval-tokens", help="Held-out tokens to measure on.")]


def main() -> None:
    """Run the command line; a user's mistake is one message and an exit code, never a traceback."""
    try:
        code = app(prog_name="intaglio", standalone_mode=False)  # typer.Exit comes back as its code, and Ctrl-C as 130
    except IntaglioError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: cannot be read or written: {error.strerror or error}", 2)
    except Exception as error:
        if not hasattr(error, "show"):  # wrong options: typer has had click's exceptions and its own
            raise
        error.show()
        code = error.exit_code  # type: ignore[attr-defined]
    if code == 130:
        _fail("stopped; a training run continues from its last checkpoint with --resume", 130)
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    from rich.console import Console
    from rich.text import Text as RichText

    Console(stderr=True).print(RichText("error: ", style="bold red") + RichText(message), soft_wrap=True)
    sys.exit(code)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder.")] = Path("intaglio-demo"),
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="q4_0 or mobile.")] = "q4_0",
    replace: Replace = False,
) -> None:
    """Train the bundled tiny Gemma 4, export it, run it, and show the proof. A few minutes."""
    from intaglio.demo import run_demo
    from intaglio.terminal import Bars, print_report

    with Bars() as bars:
        report = run_demo(out, recipe=recipe, replace=replace, progress=bars.progress)
    print_report(report, out)


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model folder, its config.json, or a name: e2b, e4b, 12b, 26b-a4b, 31b.", show_default=False
        ),
    ] = None,
    recipe: RecipeName = "q4_0",
    overrides: Overrides = (),  # type: ignore[assignment]
    text_only: TextOnly = False,
    context: Annotated[str, typer.Option(help="Tokens in the KV cache of a sequence.")] = "32k",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    drafter: Annotated[
        str | None, typer.Option(help="A drafter beside it: folder or name.", show_default=False)
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that training is sharded over.")] = 1,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="In training.")] = False,
    budget: Annotated[str | None, typer.Option(help="Say what fits this, for example 8GB.", show_default=False)] = None,
    metadata_bytes: Annotated[str, typer.Option(help="Keys and values of the GGUF: its tokenizer.")] = "15.8MB",
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor instead.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="The family beside Google's published figures.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts.", show_default=False)] = None,
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Say what a model takes on disk, in memory and in training; no weights are read."""
    from intaglio import planning
    from intaglio.plan.recipe import Recipe
    from intaglio.plan.units import parse_bytes, parse_tokens

    if everything == (model is not None):
        raise typer.BadParameter("expected a model, or --all for the family")
    metadata = parse_bytes(metadata_bytes, "--metadata-bytes")
    if model is None:
        rows = planning.family(metadata)
        if as_json:
            return _print_json(planning.family_dict(rows))
        from intaglio.terminal_plan import print_family

        return print_family(rows)
    wishes = planning.Wishes(
        context=parse_tokens(context, "--context"),
        batch=batch,
        gpus=gpus,
        gradient_checkpointing=gradient_checkpointing,
        metadata_bytes=metadata,
        budget_bytes=None if budget is None else parse_bytes(budget, "--budget"),
    )
    made = planning.survey(model, Recipe.load(recipe, overrides), wishes, drafter=drafter, text_only=text_only)
    if html is not None:
        from intaglio.planning_page import write_page

        write_page(made, html, replace=replace)
    if as_json:
        return _print_json(made.to_dict())
    from intaglio.terminal_plan import print_survey, print_tensors

    print_tensors(made.plan) if tensors else print_survey(made)


@app.command()
def quantize(
    model: ModelDir,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the packed model.", show_default=False)],
    recipe: RecipeName = "q4_0",
    overrides: Overrides = (),  # type: ignore[assignment]
    data: Annotated[str | None, typer.Option(help="Text to calibrate static scales on; None: they are off.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images, for the scales of the vision tower.", show_default=False)
    ] = None,
    audio: Annotated[
        Path | None, typer.Option(help="Folder of .wav files, for those of the audio tower.", show_default=False)
    ] = None,
    text_only: TextOnly = False,
    trained: Annotated[
        Path | None,
        typer.Option(help="Take text model and recipe from this packed model; fit towers only.", show_default=False),
    ] = None,
    replace: Replace = False,
) -> None:
    """Fit scales without training and write a packed model; then `export` it."""
    from intaglio.packed.checkpoint import checkpoint_spec
    from intaglio.packed.model import PackedModel
    from intaglio.plan.plan import make_plan
    from intaglio.plan.recipe import Recipe
    from intaglio.terminal import Bars
    from intaglio.workflow import quantize_model

    if data is not None and trained is not None:
        raise typer.BadParameter("--trained has its static scales: expected it or --data, not both")
    text = None if trained is None else PackedModel.open(trained)
    chosen = Recipe.load(recipe, overrides) if text is None else text.plan.recipe
    made = make_plan(checkpoint_spec(model, text_only=text_only), chosen)
    with Bars() as bars:
        errors = quantize_model(
            model,
            made,
            out,
            data=data,
            images=images,
            audio=audio,
            trained=text,
            replace=replace,
            progress=bars.progress,
        )
    typer.echo(f"{out}: {made.size_bytes:,} bytes of tensors on recipe {made.recipe.name}")
    for kind, error in errors.items():
        typer.echo(f"{kind} tower: 8-bit activations change its output on these samples by {error:.2%} (RMS)")
    _print_towers_off(PackedModel.open(out))


@app.command()
def train(
    model: Annotated[
        Path, typer.Argument(help="Folder of a transformers checkpoint, or of a packed model.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(help="Text: .txt, .jsonl, .parquet, a folder of them, or a dataset's name. None: its own."),
    ] = None,
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
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    checkpoint_every: Annotated[int, typer.Option(help="Optimizer steps between checkpoints; 0: none.")] = 100,
    precision: Annotated[str | None, typer.Option(help="bf16 or no; by default bf16 on a GPU.")] = None,
    compiled: Annotated[bool | None, typer.Option("--compile/--no-compile", help="By default on a GPU.")] = None,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log into the run folder.")] = False,
) -> None:
    """Train a checkpoint to its grids, or a packed model on them; leaves artifacts, packed model and report."""
    from intaglio.packed.model import FILE_NAME
    from intaglio.plan.recipe import Recipe
    from intaglio.terminal import Bars, print_comparison, print_report
    from intaglio.train.loop import Options

    options = Options(
        precision=precision,
        compiled=compiled,
        checkpoint_every=checkpoint_every,
        tensorboard=tensorboard,
        gradient_checkpointing=gradient_checkpointing,
    )
    evaluation = _evaluation(text, eval_tokens, prompt)
    common: dict[str, Any] = {"data": data, "evaluation": evaluation, "options": options, "resume": resume}
    if (model / FILE_NAME).is_file():
        if recipe is not None:
            raise typer.BadParameter(
                f"{model} is packed and has its recipe: leave out --recipe, or change it with --set"
            )
        from intaglio.finetune import finetune

        with Bars() as bars:
            tuned = finetune(model, out, teacher_dir=teacher, overrides=overrides, progress=bars.progress, **common)
        print_comparison("before", tuned.before)
        print_comparison("after", tuned.after)
        for path in tuned.files:
            typer.echo(f"{path}: holds what was trained, 0 bits differ")
        return
    if teacher is not None:
        raise typer.BadParameter(
            f"--teacher: {model} is a checkpoint of floats, which learns from itself: leave it out"
        )
    from intaglio.workflow import run

    loaded = Recipe.load(recipe or "q4_0", overrides)
    with Bars() as bars:
        report = run(model, loaded, out, progress=bars.progress, **common)
    print_report(report, out)


@app.command()
def export(
    packed: PackedDir,
    out: Annotated[Path, typer.Option("--out", "-o", help="File or folder to write.", show_default=False)],
    target: Annotated[str | None, typer.Argument(help=f"One of {TARGETS}.", show_default=False)] = None,
    to: Annotated[
        str | None, typer.Option(help="Instead of a target: a release for these, with commas between, or for all.")
    ] = None,
    draft: Annotated[Path | None, typer.Option(help="Of ollama: GGUF of a drafter that goes along.")] = None,
    python: Annotated[Path | None, typer.Option(help="Of litert: interpreter of its environment.")] = None,
    context: Annotated[int | None, typer.Option(help="Of litert: tokens that the KV cache holds.")] = None,
    transformers_js: Annotated[
        Path | None, typer.Option(help="Of web: node_modules with @huggingface/transformers.", show_default=False)
    ] = None,
    text_only: TextOnly = False,
    replace: Replace = False,
) -> None:
    """Write a packed model in a runtime's format and read it back. Nothing is re-quantized."""
    from intaglio.export import EXPORTERS
    from intaglio.packed.model import PackedModel

    if (target is None) == (to is None):
        raise typer.BadParameter(f"expected a target, one of {', '.join(EXPORTERS)}, or --to, and not both")
    if target is not None and target not in EXPORTERS:
        raise typer.BadParameter(f"{target!r}: expected one of {', '.join(EXPORTERS)}")
    given = {"draft": draft, "python": python, "context_tokens": context, "transformers_js": transformers_js}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if target != OWN_OPTIONS[name] and not (to is not None and name == "transformers_js"):
            option = {"context_tokens": "context"}.get(name, name).replace("_", "-")
            raise typer.BadParameter(f"--{option} is for the target {OWN_OPTIONS[name]}")
    model = PackedModel.open(packed)
    model = model.text_only() if text_only else model
    if to is not None:
        _release(model, out, to, replace, given)
    elif target is not None:
        EXPORTERS[target](model, out, replace=replace, **given)
        if target == "gemma-mobile":
            _print_towers_off(model)
        _verify(packed, out, as_json=False)
        if target == "gguf" and model.plan.model.whole and not text_only:
            typer.echo(
                f"{out} is the text model alone: for images and sound export the hf folder too, and make an mmproj "
                "file of it with llama.cpp's convert_hf_to_gguf.py --mmproj"
            )


def _release(model: PackedModel, out: Path, to: str, replace: bool, options: dict[str, Any]) -> None:
    from intaglio.release import make_release
    from intaglio.terminal import Bars

    with Bars() as bars:
        release = make_release(model, out, to, replace=replace, options=options, progress=bars.progress)
    for result in release.verified.values():
        typer.echo(result.summary())
    for name, reason in release.left_out.items():
        typer.echo(f"{name}: left out: {reason}")


def _print_towers_off(packed: PackedModel) -> None:
    """Say it where activations of a tower stay floats."""
    from intaglio.plan.carried import scales_in_use

    for kind, (known, total) in scales_in_use(packed.plan.carried_scales, packed.read_static()).items():
        if known < total:
            option = {"vision": "--images", "audio": "--audio"}[kind]
            typer.echo(
                f"{kind} tower: {total - known} of {total} activation scales are 0, off: `quantize {option} DIR` "
                "calibrates them"
            )


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Checkpoint folder, .safetensors or .gguf.", show_default=False)],
    every: Annotated[bool, typer.Option("--all", help="A line for every tensor, not one for those of a kind.")] = False,
    as_json: Json = False,
) -> None:
    """Show which grid each tensor lies on, and what stock tools would make of it. Nothing is executed."""
    from intaglio.sources.inspect import inspect as run_inspect
    from intaglio.terminal import Bars, print_inspection

    with Bars() as bars:
        found = run_inspect(path, on_tensor=lambda done, total, name: bars.part(done >> 20, total >> 20, "MB"))
    if as_json:
        _print_json(found.to_dict())
    else:
        print_inspection(found, every=every)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A QAT checkpoint: floats on a grid, mobile folder, W4A16 folder, or Q4_0 .gguf.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the packed model.", show_default=False)],
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="None: the grids that are found.")] = None,
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
    from intaglio.plan.recipe import Recipe
    from intaglio.sources.convert import convert as run_convert
    from intaglio.terminal import Bars, print_conversion

    if overrides and recipe is None:
        raise typer.BadParameter("--set changes a recipe: say which with --recipe")
    with Bars() as bars:
        result = run_convert(
            source,
            out,
            recipe=None if recipe is None else Recipe.load(recipe, overrides),
            config=config,
            requantize=requantize,
            text_only=text_only,
            replace=replace,
            on_tensor=bars.part,
        )
    if as_json:
        _print_json(result.to_dict())
    else:
        print_conversion(result)


@app.command()
def verify(
    packed: PackedDir,
    artifact: Annotated[
        Path, typer.Argument(help="What `export` wrote: a file, a folder or a release.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Compare an artifact with the packed model bit for bit. Exit code 3 if anything differs."""
    _verify(packed, artifact, as_json)


def _verify(packed: Path, artifact: Path, as_json: bool) -> None:
    from intaglio.errors import MismatchError
    from intaglio.packed.model import PackedModel
    from intaglio.packed.verify import verify as run_verify
    from intaglio.release import is_release, verify_release

    model = PackedModel.open(packed)
    wrong: list[str] = []
    if is_release(artifact):
        results, wrong = verify_release(model, artifact)
        rows: Any = {"artifacts": [_row(r) for r in results], "files": wrong, "exact": _exact(results) and not wrong}
    else:
        results = [run_verify(model, artifact)]
        rows = _row(results[0])
    if as_json:
        _print_json(rows)
    else:
        for result in results:
            if result.exact:
                typer.echo(result.summary())
    wrong = [result.summary() for result in results if not result.exact] + wrong
    if wrong:
        raise MismatchError(f"{'; '.join(wrong)}: export it again from the packed model")


def _row(result: Verification) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(result), "artifact": str(result.artifact), "exact": result.exact}


def _exact(results: list[Verification]) -> bool:
    return all(result.exact for result in results)


@app.command("eval")
def evaluate(
    artifact: Annotated[Path, typer.Argument(help="Packed model, .gguf or transformers folder.", show_default=False)],
    original: Annotated[Path, typer.Option(help="The float checkpoint to compare with.", show_default=False)],
    text: Annotated[Path, typer.Option("--text", help="Held-out text.", show_default=False)],
    eval_tokens: EvalTokens = 65536,
    int8_cache: Annotated[
        bool, typer.Option("--int8-cache", help="Read a packed mobile model token by token, from a cache of int8.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure an artifact's KL to the original: a .gguf in llama.cpp, the others in transformers."""
    from intaglio.terminal import Bars, print_comparison
    from intaglio.workflow import compare

    with Bars() as bars:
        evaluation = _evaluation(text, eval_tokens, [])
        result = compare(artifact, original, evaluation, bars.progress, int8_cache=int8_cache)
    if as_json:
        _print_json(result.to_dict())
    else:
        print_comparison(artifact.name, result)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    original: Annotated[Path, typer.Option(help="The float checkpoint.", show_default=False)],
    text: Text = None,
    eval_tokens: EvalTokens = 65536,
    prompt: Annotated[list[str], typer.Option(help="Show continuations of this.")] = (),  # type: ignore[assignment]
) -> None:
    """Measure a finished run again and rewrite report.html, report.md and report.json."""
    from intaglio.terminal import Bars, print_report
    from intaglio.workflow import report as run_report

    with Bars() as bars:
        made = run_report(original, run_dir, evaluation=_evaluation(text, eval_tokens, prompt), progress=bars.progress)
    print_report(made, run_dir)


def _evaluation(text: Path | None, tokens: int, prompts: list[str]) -> Evaluation:
    from intaglio.proof import Evaluation

    return Evaluation(text=text, tokens=tokens, prompts=tuple(prompts))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
