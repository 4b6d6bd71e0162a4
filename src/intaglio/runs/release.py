"""A release: one folder with the model in the format of every runtime, ready to be copied or published.

    README.md      the model card: what it is, what it measured, and the command for each runtime
    SHA256SUMS     of every file, as `sha256sum --check` reads it
    NAME/          an artifact for one runtime, with a README.md of its own

A runtime is a row of RUNTIMES in `formats.table`. Every artifact is read back before the release appears.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intaglio.errors import ConfigError, InputError, IntaglioError, MismatchError, OutputError
from intaglio.formats.gguf.write_bundles import library_name, model_title
from intaglio.formats.table import EXPORTERS, RUNTIMES
from intaglio.formats.verify import Verification, verify
from intaglio.packed.model import PackedModel, file_sha256
from intaglio.packed.outputs import MARKER
from intaglio.packed.store import new_path
from intaglio.plan.files import one_line, read_json, read_text, without_folders
from intaglio.plan.plan import Plan
from intaglio.progress import Progress
from intaglio.runs.export import check_places, write_exact

MANIFEST = "SHA256SUMS"
CARD = "README.md"
ALL = "all"
LINKED = ("ollama", "lmstudio")  # the GGUF once more


def parse_targets(text: str) -> list[str]:
    """Names of a list with commas; `all` is every one. InputError for a name that is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in RUNTIMES and name != ALL]
    if unknown or not names:
        raise InputError(f"--to {text!r}: expected {ALL}, or some of {', '.join(RUNTIMES)} with commas between")
    return list(RUNTIMES) if ALL in names else list(dict.fromkeys(names))


@dataclass(frozen=True)
class Release:
    """Result of a release: the verification of each runtime's files, and why others were left out.

    mismatched: of those left out, the ones that did not hold what was packed.
    """

    verified: dict[str, Verification]
    left_out: dict[str, str]
    mismatched: dict[str, str] = field(default_factory=dict)


def make_release(
    packed: PackedModel,
    out: str | Path,
    to: str = ALL,
    *,
    replace: bool = False,
    options: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Release:
    """Write the release `out`.

    to: names of RUNTIMES with commas between, or "all", which leaves out those whose format cannot say the
    model exactly, and any that fails: one target's failure never takes the others. Of targets that are named, that is
    the exporter's error. options: of exporters, by the names that rows of RUNTIMES give them. Raises MismatchError if
    an artifact that was named is not what was packed, and InputError if nothing was written.
    """
    progress, names, every = progress or Progress(), parse_targets(to), ALL in to.split(",")
    if packed.plan.model.family.drafter:
        raise InputError(f"{packed.path}: a drafter does not run by itself: export it to gguf, hf or vllm, one by one")
    options = options or {}
    check_places(out, packed, options)
    release = Release({}, {})
    with new_path(Path(out), replace=replace) as temporary:
        temporary.mkdir()
        for name in names:
            option = RUNTIMES[name].option
            given = {option: options[option]} if option in options else {}
            reason = RUNTIMES[name].unwanted(packed.plan)
            if option and not given:
                reason = reason or f"it needs --{option.replace('_', '-')}"
            if every and reason:
                release.left_out[name] = reason
                continue
            progress.stage(f"Exporting {name}")
            try:
                release.verified[name] = _export(packed, temporary, name, given)
            except (KeyboardInterrupt, OutputError):  # a full disk is full for all
                raise
            except Exception as error:
                if not every:
                    raise
                shutil.rmtree(temporary / name, ignore_errors=True)
                if isinstance(error, MismatchError):
                    release.mismatched[name] = str(error)
                known = isinstance(error, IntaglioError)
                release.left_out[name] = str(error) if known else f"{one_line(error)}: this is a bug, please report it"
        if not release.verified:
            raise InputError(f"no format holds this model: {'; '.join(release.left_out.values())}")
        (temporary / CARD).write_text(_card(packed, temporary, release), "utf-8")
        sums = "".join(f"{digest}  {name}\n" for name, digest in _hashes(temporary).items())
        (temporary / MANIFEST).write_text(sums, "utf-8")
    return release


def _export(packed: PackedModel, out: Path, name: str, options: dict[str, Any]) -> Verification:
    """Write one artifact and its README, and read it back."""
    runtime, folder = RUNTIMES[name], out / name
    gguf = out / "gguf" / RUNTIMES["gguf"].file
    options = options | ({"gguf": gguf} if name in LINKED and gguf.is_file() else {})
    result = write_exact(EXPORTERS[name], packed, folder / runtime.file, artifact=folder, **options)
    lines = [
        _head(packed),
        f"# {_plain(model_title(packed))} for {runtime.title}",
        f"Recipe {packed.plan.recipe.name}. In this folder:",
        f"```bash\n{_command(packed, name, runtime.file or '.')}\n```",
        f"Read back: {result.summary().partition(': ')[2]}.",
        runtime.note(packed.plan),
        *_made(packed),
    ]
    (folder / CARD).write_text("\n\n".join(filter(None, lines)) + "\n", "utf-8")
    return result


def _command(packed: PackedModel, name: str, path: str) -> str:
    return RUNTIMES[name].command.format(path=path, name=library_name(packed).lower())


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a release, by its path there."""
    own = (folder / MANIFEST, folder / MARKER)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in own)
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def _card(packed: PackedModel, out: Path, release: Release) -> str:
    plan, title = packed.plan, _plain(f"{model_title(packed)}, {packed.plan.recipe.name}")
    rows = [
        f"| {RUNTIMES[name].title} | [`{name}/`]({name}) | {_size(out / name)} | "
        f"`{_command(packed, name, '/'.join(filter(None, (name, RUNTIMES[name].file))))}` |"
        for name in release.verified
    ]
    notes = [f"- {name}: {note}" for name in release.verified if (note := RUNTIMES[name].note(plan))]
    notes += [f"- {name} is left out: {_plain(without_folders(reason))}" for name, reason in release.left_out.items()]
    parts = [
        _head(packed),
        f"# {title}",
        f"Every folder holds the same codes and scales. `{MANIFEST}` has the sums of all files.",
        "| runtime | folder | size | command |\n|---|---|---:|---|\n" + "\n".join(rows),
        "\n".join(notes),
        *_made(packed),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _head(packed: PackedModel) -> str:
    """The metadata that the Hub reads on top of a card, as far as the provenance knows them."""
    from huggingface_hub import ModelCardData

    said = packed.provenance
    base, of_hub, _ = str(said.get("base_model", "")).partition("@")
    data = ModelCardData(
        base_model=base or None,
        base_model_relation="quantized" if of_hub else None,  # the base that a card names may be that of a fine-tune
        license=said.get("license"),
        datasets=said.get("datasets"),
        tags=[packed.plan.model.family.gguf_architecture, "quantized", "intaglio"],
        pipeline_tag="text-generation",
    )
    return f"---\n{data.to_yaml()}\n---"


def _made(packed: PackedModel) -> list[str]:
    """Paragraphs of a card: the grids, where codes and scales come from, and what the run measured."""
    said = {key: _plain(str(value)) for key, value in packed.provenance.items()}
    parts = [said.get("method", "quantized without training")]
    parts += [f"{word} {said[key]}" for word, key in (("from", "base_model"), ("on", "data")) if key in said]
    report = _report(packed)
    command = " ".join(str(report.get("provenance", {}).get("command", "")).replace("`", "'").split())
    return [
        _grids(packed.plan),
        f"Made by intaglio: {', '.join(parts)}. The packed model has SHA-256 `{packed.sha256()}`.",
        f"```bash\n{command}\n```" if command else "",
        _measured(packed) if report else "Quality was not measured: `intaglio eval` does.",
    ]


def _plain(text: str) -> str:
    """Text of a stranger as Markdown shows it word for word: on one line, without markup, links or pages of HTML."""
    line = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", line)


def _grids(plan: Plan) -> str:
    """The grids that the plan puts weights on: "Weights: mlp on q4_0; norm on f32"."""
    names: dict[str, list[str]] = {}
    for tensor in plan:
        grids = names.setdefault(tensor.spec.role.replace("_", " "), [])
        grids += [tensor.grid.name] * (tensor.grid.name not in grids)
    return "Weights: " + "; ".join(f"{role} on {' and '.join(grids)}" for role, grids in names.items()) + "."


def _size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()):,} bytes"


def _report(packed: PackedModel) -> dict[str, Any]:
    """The report of the run that the packed model lies in, if it was measured with this recipe; else empty."""
    run = packed.path.resolve().parent
    if not (run / "report.json").is_file() or not (run / "report.md").is_file():
        return {}
    report = read_json(run / "report.json")
    return report if report.get("recipe_toml") == packed.plan.recipe.to_toml() else {}


def _measured(packed: PackedModel) -> str:
    """The table of the run's report."""
    section = "## Against the original"
    text = read_text(packed.path.resolve().parent / "report.md")
    return section + text.partition(section)[2].partition("\n## ")[0].rstrip() if section in text else ""


def is_release(path: Path) -> bool:
    """Whether a path is a folder with a manifest."""
    return (path / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a release, by its path there, as the manifest says it. ConfigError for a damaged one."""
    manifest, listed = folder / MANIFEST, {}
    for line in manifest.read_text("utf-8", errors="replace").splitlines():
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64:
            raise ConfigError(f"{manifest}: {line!r}: expected a SHA-256 and the path of a file")
        listed[name] = digest
    return listed


def verify_release(packed: PackedModel, folder: str | Path) -> tuple[list[Verification], list[str]]:
    """Read every artifact of a release back; and say which files the manifest knows otherwise, or not at all.

    Raises ConfigError for a manifest or an artifact that cannot be read.
    """
    folder = Path(folder)
    listed, found = read_manifest(folder), _hashes(folder)
    wrong = [f"{name} has other bytes" for name in sorted(listed.keys() & found) if listed[name] != found[name]]
    wrong += [f"{name} is missing" for name in sorted(listed.keys() - found)]
    wrong += [f"{name} is not in {MANIFEST}" for name in sorted(found.keys() - listed)]
    artifacts = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    return [verify(packed, path) for path in artifacts], wrong
