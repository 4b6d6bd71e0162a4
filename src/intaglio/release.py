"""A release: one folder with the model in the format of every runtime, ready to be copied or published.

    README.md      the model card: what it is, what it measured, and the command for each runtime
    SHA256SUMS     of every file, as `sha256sum --check` reads it
    NAME/          an artifact for one runtime, with a README.md of its own

A runtime is a row of RUNTIMES. Every artifact is read back before the release appears.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.errors import ConfigError, InputError, MismatchError, RecipeError, WeightError
from intaglio.export import EXPORTERS
from intaglio.export.bundles import library_name, model_title
from intaglio.numerics.grid import BlockGrid
from intaglio.packed.model import PackedModel, file_sha256
from intaglio.packed.outputs import MARKER
from intaglio.packed.store import new_path
from intaglio.packed.verify import Verification, verify
from intaglio.plan.affine import schemes
from intaglio.plan.files import read_json, read_text
from intaglio.plan.plan import Plan
from intaglio.progress import Progress

MANIFEST = "SHA256SUMS"
CARD = "README.md"
ALL = "all"
PIPELINE = (
    "python -c \"from transformers import pipeline; print(pipeline('text-generation', model='{path}')"
    "('Hello', max_new_tokens=40)[0]['generated_text'])\""
)
NODE = (
    'npm install --ignore-scripts @huggingface/transformers@4.3.1 && node --input-type=module -e "'
    "import {{ env, pipeline }} from '@huggingface/transformers'; "
    "env.allowRemoteModels = false; env.localModelPath = './'; "
    "const generate = await pipeline('text-generation', '{path}', {{ dtype: 'q4' }}); "
    "console.log((await generate('Hello', {{ max_new_tokens: 40 }}))[0].generated_text)\""
)
LINKED = ("ollama", "lmstudio")  # the GGUF once more


def _nothing(plan: Plan) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A folder of a release, named as its exporter in EXPORTERS.

    title: of the runtime. command: runs the artifact from the release's folder; {path} stands for the
    artifact's, {name} for the model's. file: of the artifact in the folder; empty where it is the folder.
    option: of the exporter, without which a release for all is left without it. note: what a plan's artifact is
    without, or has otherwise, for its README. wanted: whether a plan's release has it if all are asked for.
    """

    title: str
    command: str
    file: str = ""
    option: str = ""
    note: Callable[[Plan], str] = _nothing
    wanted: Callable[[Plan], bool] = lambda plan: True


def _vllm_note(plan: Plan) -> str:
    notes = []
    if any("embedding" in t.spec.role and isinstance(t.grid, BlockGrid) and t.grid.portable for t in plan):
        notes.append("Embeddings are bfloat16, exactly what their codes and scales decode to.")
    if any(scheme.static for scheme in schemes(plan).values()):
        notes.append(
            "vLLM 0.32 computes q, k and v, and gate and up, as one linear, and gives all of it the output scale of "
            "the last (v, up), although the file has one for each."
        )
    if any(t.spec.role == "expert" and isinstance(t.grid, BlockGrid) for t in plan):
        notes.append("Each expert is three linears; transformers does not read them, and would make random ones.")
    if plan.recipe.kv_cache is not None:
        notes.append("The format has no place for scales of an int8 KV cache: it stays in floats.")
    return " ".join(notes)


def _mlx_note(plan: Plan) -> str:
    return "MLX has no static scales: activations and KV cache stay in floats." if plan.static_scales else ""


def _litert_note(plan: Plan) -> str:
    return "" if plan.static_scales else "LiteRT rounds activations to 8 bits as they come where weights are Q4_0."


def _mobile_note(plan: Plan) -> str:
    return "transformers quantizes activations and leaves the KV cache in floats." if plan.recipe.kv_cache else ""


def _not_run(plan: Plan) -> str:
    return "Written by the program's documentation and checked by parsing; the program itself was not run."


RUNTIMES: dict[str, Runtime] = {
    "gguf": Runtime(title="llama.cpp", command="llama-cli -m {path}", file="model.gguf"),
    "ollama": Runtime(
        title="Ollama", command="ollama create {name} -f {path}/Modelfile && ollama run {name}", note=_not_run
    ),
    "lmstudio": Runtime(title="LM Studio", command="cp -r {path}/*/ ~/.lmstudio/models/", note=_not_run),
    "hf": Runtime(title="transformers", command=PIPELINE, wanted=lambda plan: plan.portable),
    "gemma-mobile": Runtime(title="transformers", command=PIPELINE, note=_mobile_note),
    "vllm": Runtime(title="vLLM", command="vllm serve {path}", note=_vllm_note),
    "litert": Runtime(
        title="LiteRT-LM", command="litert-lm run {path} --prompt Hello", file="model.litertlm", note=_litert_note
    ),
    "onnx": Runtime(title="ONNX Runtime and Transformers.js", command=NODE),
    "web": Runtime(title="a web page", command="python {path}/serve.py", option="transformers_js"),
    "mlx": Runtime(title="MLX", command='mlx_lm.generate --model {path} --prompt "Hello"', note=_mlx_note),
}


def parse_targets(text: str) -> list[str]:
    """Names of a list with commas; `all` is every one. InputError for a name that is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in RUNTIMES and name != ALL]
    if unknown or not names:
        raise InputError(f"--to {text!r}: expected {ALL}, or some of {', '.join(RUNTIMES)} with commas between")
    return list(RUNTIMES) if ALL in names else list(dict.fromkeys(names))


@dataclass(frozen=True)
class Release:
    """What was written: of each runtime what reading back said, and why others were left out."""

    verified: dict[str, Verification]
    left_out: dict[str, str]


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
    model exactly; of ones that are named, that is the exporter's RecipeError, ConfigError or WeightError.
    options: of exporters, by the names that rows of RUNTIMES give them. Raises MismatchError if an artifact is not
    what was packed.
    """
    progress, names, every = progress or Progress(), parse_targets(to), ALL in to.split(",")
    if packed.plan.model.family.drafter:
        raise InputError(f"{packed.path}: a drafter does not run by itself: export it to gguf, hf or vllm, one by one")
    options = options or {}
    release = Release({}, {})
    with new_path(Path(out), replace=replace) as temporary:
        temporary.mkdir()
        for name in names:
            if every and not RUNTIMES[name].wanted(packed.plan):
                continue
            option = RUNTIMES[name].option
            given = {option: options[option]} if option in options else {}
            if every and option and not given:
                release.left_out[name] = f"it needs --{option.replace('_', '-')}"
                continue
            progress.stage(f"Exporting {name}")
            try:
                release.verified[name] = _export(packed, temporary, name, given)
            except (ConfigError, RecipeError, WeightError) as error:
                if not every:
                    raise
                release.left_out[name] = str(error)
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
    linked = {"gguf": gguf} if name in LINKED and gguf.is_file() else {}
    EXPORTERS[name](packed, folder / runtime.file, **linked, **options)
    result = verify(packed, folder)
    if not result.exact:
        raise MismatchError(f"{name}: {result.summary()}: the export is not what was packed; please report this")
    lines = [
        f"# {model_title(packed)} for {runtime.title}",
        f"Recipe {packed.plan.recipe.name}. In this folder:",
        f"```bash\n{_command(packed, name, runtime.file or '.')}\n```",
        f"Read back: {result.summary().partition(': ')[2]}.",
        runtime.note(packed.plan),
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
    plan, title = packed.plan, f"{model_title(packed)}, {packed.plan.recipe.name}"
    rows = [
        f"| {RUNTIMES[name].title} | [`{name}/`]({name}) | {_size(out / name)} | "
        f"`{_command(packed, name, '/'.join(filter(None, (name, RUNTIMES[name].file))))}` |"
        for name in release.verified
    ]
    notes = [f"- {name}: {note}" for name in release.verified if (note := RUNTIMES[name].note(plan))]
    notes += [f"- {name} is left out: {reason}" for name, reason in release.left_out.items()]
    parts = [
        f"---\ntags: [{plan.model.family.gguf_architecture}, quantized, intaglio]\n---",
        f"# {title}",
        plan.recipe.summary,
        f"Made by intaglio: {packed.provenance.get('method', 'quantized without training')}. Every folder holds the "
        f"same codes and scales, those of the packed model with SHA-256 `{packed.sha256()}`. `{MANIFEST}` has the sums "
        "of all files.",
        "| runtime | folder | size | command |\n|---|---|---:|---|\n" + "\n".join(rows),
        "\n".join(notes),
        _measured(packed) or "Quality was not measured: `intaglio eval` does.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()):,} bytes"


def _measured(packed: PackedModel) -> str:
    """The table of the run's report, if the packed model lies in a run that was measured with this recipe."""
    run = packed.path.resolve().parent
    if not (run / "report.json").is_file() or not (run / "report.md").is_file():
        return ""
    recipe = read_json(run / "report.json").get("recipe_toml")
    if recipe != packed.plan.recipe.to_toml():
        return ""
    section = "## Against the original"
    text = read_text(run / "report.md")
    return section + text.partition(section)[2].partition("\n## ")[0].rstrip() if section in text else ""


def is_release(path: Path) -> bool:
    """Whether a path is a folder with a manifest."""
    return (path / MANIFEST).is_file()


def verify_release(packed: PackedModel, folder: Path) -> tuple[list[Verification], list[str]]:
    """Read every artifact of a release back; and say which files the manifest knows otherwise, or not at all.

    Raises ConfigError for a manifest or an artifact that cannot be read.
    """
    manifest = folder / MANIFEST
    listed: dict[str, str] = {}
    for line in manifest.read_text("utf-8", errors="replace").splitlines():
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64:
            raise ConfigError(f"{manifest}: {line!r}: expected a SHA-256 and the path of a file")
        listed[name] = digest
    found = _hashes(folder)
    wrong = [f"{name} has other bytes" for name in sorted(listed.keys() & found) if listed[name] != found[name]]
    wrong += [f"{name} is missing" for name in sorted(listed.keys() - found)]
    wrong += [f"{name} is not in {MANIFEST}" for name in sorted(found.keys() - listed)]
    artifacts = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    return [verify(packed, path) for path in artifacts], wrong
