"""Verbs that write a packed model for a runtime and read it back: export, verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intaglio.cli.options import (
    Json,
    PackedDir,
    Replace,
    TextOnly,
    app,
    located,
    print_json,
    print_notes,
    print_towers_off,
)

if TYPE_CHECKING:
    from intaglio.formats.verify import Verification
    from intaglio.packed.model import PackedModel

TARGETS = "gguf, hf (a transformers checkpoint of floats), gemma-mobile, vllm, mlx, litert, onnx, web, ollama, lmstudio"

# Options of `export` that one target alone knows.
OWN_OPTIONS = {"draft": "ollama", "python": "litert", "context_tokens": "litert", "transformers_js": "web"}


@app.command()
def export(
    packed: PackedDir,
    out: Annotated[Path, typer.Option("--out", "-o", help="File or folder to write.", show_default=False)],
    target: Annotated[str | None, typer.Argument(help=f"One of {TARGETS}.", show_default=False)] = None,
    to: Annotated[
        str | None, typer.Option(help="Write a release instead: targets with commas between, or all.")
    ] = None,
    draft: Annotated[Path | None, typer.Option(help="For ollama: GGUF of a drafter that goes along.")] = None,
    python: Annotated[Path | None, typer.Option(help="For litert: interpreter of its environment.")] = None,
    context: Annotated[int | None, typer.Option(help="For litert: tokens that the KV cache holds.")] = None,
    transformers_js: Annotated[
        Path | None, typer.Option(help="For web: node_modules with @huggingface/transformers.", show_default=False)
    ] = None,
    text_only: TextOnly = False,
    replace: Replace = False,
) -> None:
    """Write a packed model in a runtime's format and read it back. Nothing is re-quantized."""
    from intaglio.formats.table import EXPORTERS
    from intaglio.packed.model import PackedModel
    from intaglio.runs.export import export as run_export

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
    model = PackedModel.open(located(packed))
    model = model.text_only() if text_only else model
    if to is not None:
        _release(model, out, to, replace, given)
    elif target is not None:
        result = run_export(model, out, target, replace=replace, options=given)
        if target == "gemma-mobile":
            print_towers_off(model)
        typer.echo(result.summary())
        if target == "gguf" and any(tensor.role == "centroids" for tensor in model.plan.model.tensors):
            typer.echo(f"{out} is without the clusters of the head: llama.cpp computes all of it")
        if target == "gguf" and model.plan.model.whole and not text_only:
            typer.echo(
                f"{out} is the text model alone: for images and sound export the hf folder too, and make an mmproj "
                "file of it with llama.cpp's convert_hf_to_gguf.py --mmproj"
            )


def _release(model: PackedModel, out: Path, to: str, replace: bool, options: dict[str, Any]) -> None:
    from intaglio.cli.terminal import Bars
    from intaglio.errors import MismatchError
    from intaglio.runs.release import make_release

    with Bars() as bars:
        release = make_release(model, out, to, replace=replace, options=options, progress=bars.progress)
    for result in release.verified.values():
        typer.echo(result.summary())
    for name, reason in release.left_out.items():
        typer.echo(f"{name}: left out: {reason}")
    if release.mismatched:
        raise MismatchError("; ".join(release.mismatched.values()))


@app.command()
def verify(
    packed: PackedDir,
    artifact: Annotated[
        Path, typer.Argument(help="What `export` wrote: a file, a folder or a release.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Compare an artifact with the packed model bit for bit. Exit code 3 if anything differs."""
    from intaglio.errors import MismatchError
    from intaglio.formats.verify import verify as run_verify
    from intaglio.packed.model import PackedModel
    from intaglio.plan.hub import ARTIFACT
    from intaglio.runs.release import is_release, verify_release

    model = PackedModel.open(located(packed))
    wrong: list[str] = []
    artifact = artifact if is_release(artifact) else located(artifact, *ARTIFACT)
    if is_release(artifact):
        results, wrong = verify_release(model, artifact)
        rows: Any = {"artifacts": [_row(r) for r in results], "files": wrong, "exact": _exact(results) and not wrong}
    else:
        results = [run_verify(model, artifact)]
        rows = _row(results[0])
    if as_json:
        print_json(rows)
    else:
        for result in results:
            if result.exact:
                typer.echo(result.summary())
    wrong = [result.summary() for result in results if not result.exact] + wrong
    if wrong:
        raise MismatchError(f"{'; '.join(wrong)}: export it again from the packed model")


@app.command("release")
def push_release(
    packed: PackedDir,
    folder: Annotated[Path, typer.Argument(help="Release that `export --to` wrote.", show_default=False)],
    push: Annotated[str, typer.Option(help="Repository of the Hub to upload it to: user/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    each: Annotated[bool, typer.Option("--each", help="A repository for each format: user/name-FORMAT.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files, sizes and card; upload nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Verify a release once more and upload it to the Hugging Face Hub. Exit code 3 if anything differs."""
    from intaglio.cli.terminal import Bars
    from intaglio.packed.model import PackedModel
    from intaglio.runs.push import push_release as run_push

    model = PackedModel.open(located(packed))
    with Bars() as bars:
        pushed = run_push(model, folder, push, private=private, each=each, dry_run=dry_run, progress=bars.progress)
    if as_json:
        return print_json([repo.to_dict() for repo in pushed])
    for repo in pushed:
        typer.echo(f"{repo.repo}: {len(repo.files)} files, {sum(repo.files.values()):,} bytes {repo.url}".rstrip())
        if dry_run:
            for path, size in repo.files.items():
                typer.echo(f"{size:15,}  {path}")
            typer.echo(f"\n{repo.card}")
        if repo.unknown:
            print_notes([f"{repo.repo}: the card does not say {' and '.join(repo.unknown)}: add it there by hand"])


def _row(result: Verification) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(result), "artifact": str(result.artifact), "exact": result.exact}


def _exact(results: list[Verification]) -> bool:
    return all(result.exact for result in results)
