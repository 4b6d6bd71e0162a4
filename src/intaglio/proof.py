"""What a run made, read back, measured, and put into a report.

A run folder holds the packed models of three kinds: "stock" and "fitted", which are not trained, and
"trained". Of each, the decoded weights are measured in transformers, and the files that were exported
in their own runtime.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from intaglio.errors import InputError, MismatchError
from intaglio.formats import Export, Format, format_of
from intaglio.measure.evaluate import Candidate, evaluate_many, greedy, transformers_runtime, transformers_source
from intaglio.measure.llamacpp import LlamaCpp
from intaglio.measure.metrics import Comparison
from intaglio.measure.report import (
    Artifact,
    ComparisonRow,
    CurvePoint,
    LayerRow,
    Provenance,
    Report,
    Sample,
    plan_rows,
)
from intaglio.measure.simulate import decoded_model, switched_source
from intaglio.numerics.grid import BlockGrid
from intaglio.packed.checkpoint import TextModel, load_model, load_quantized, model_name, stream_tensors
from intaglio.packed.model import PackedModel, file_sha256
from intaglio.packed.verify import Verification, verify
from intaglio.packed.verify_affine import is_mlx
from intaglio.plan.family import load_config
from intaglio.plan.plan import Plan
from intaglio.progress import Progress
from intaglio.train.data.sources import Data
from intaglio.train.run_folder import read_losses
from intaglio.train.static import switch_static

PACKED = {"stock": "stock", "fitted": "fitted", "trained": "packed"}  # kind -> folder of the run
FLOAT_ACTIVATIONS = "float activations"  # the variant without quantized activations and KV cache


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured after training. tokens, window: of held-out text; prompts: for samples."""

    text: Data | None = None
    tokens: int = 16384
    window: int = 256
    prompts: tuple[str, ...] = ()
    sample_tokens: int = 40


@dataclass(frozen=True)
class Bench:
    """A finished run: the original, and what was made of it, by kind."""

    model_dir: Path
    out: Path
    tokenizer: Any
    teacher: TextModel
    packed: dict[str, PackedModel]

    @classmethod
    def open(cls, model_dir: str | Path, out: Path, tokenizer: Any, teacher: TextModel) -> Bench:
        packed = {kind: PackedModel.open(out / folder) for kind, folder in PACKED.items()}
        return cls(Path(model_dir), out, tokenizer, teacher, packed)

    @property
    def plan(self) -> Plan:
        return self.packed["trained"].plan

    @property
    def format(self) -> Format:
        return format_of(self.plan)

    @property
    def labels(self) -> dict[str, str]:
        return {"stock": self.format.stock_label, "fitted": "MSE fit", "trained": "QAT"}

    def path(self, export: Export) -> Path:
        return self.out / export.name


def prove(bench: Bench, windows_NT: Tensor, evaluation: Evaluation, progress: Progress, began: float | None) -> Report:
    """Read every file back, measure everything on the windows, and return the report.

    began: when the run began, in seconds of `time.perf_counter`; None if it was another one.
    Raises MismatchError for a file that does not hold what was packed.
    """
    verifications = _verify(bench)
    models = {kind: decoded_model(bench.teacher, packed) for kind, packed in bench.packed.items()}
    comparisons = _compare(bench, models, windows_NT, progress)
    losses = read_losses(bench.out)
    return Report(
        title=f"{model_name(bench.model_dir)}, {bench.plan.recipe.name}",
        model=model_name(bench.model_dir),
        format=bench.format.label,
        recipe_name=bench.plan.recipe.name,
        recipe_toml=bench.plan.recipe.to_toml(),
        plan=plan_rows(bench.plan),
        comparisons=comparisons,
        loss_curve=[CurvePoint(step=int(r["step"]), tokens=int(r["tokens"]), value=r["loss"]) for r in losses],
        layers=_layers(bench),
        artifacts=_artifacts(bench, verifications),
        samples=_samples(bench, models, evaluation),
        provenance=Provenance(
            versions={name: version(name) for name in ("intaglio", "torch", "transformers", "gguf")},
            command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            seconds=None if began is None else time.perf_counter() - began,
            tokens=int(losses[-1]["tokens"]) if losses else None,
        ),
        notes=_notes(bench),
    )


def _notes(bench: Bench) -> list[str]:
    notes = [
        "Rows named “simulated” compute with the decoded weights in transformers, in float32.",
        "Intervals are 95%, from the spread between windows.",
    ]
    if bench.plan.recipe.kv_cache is not None:
        notes.append(
            "transformers' reader of the mobile format quantizes activations and leaves the KV cache in floats: "
            "rows of the exported folder are without KV quantization."
        )
    lossy = bench.packed["trained"].lossy_blocks
    if lossy:
        notes.append(f"Lossy: the model was converted, and {lossy:,} of its blocks were fitted anew, not recovered.")
    if _needs_llama(bench) and not _has_llama():
        notes.append("llama-cpp-python is not installed, so no artifact was run in llama.cpp.")
    return notes


def _needs_llama(bench: Bench) -> bool:
    return any(export.runs and export.name.endswith(".gguf") for export in bench.format.exports)


def _has_llama() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def _verify(bench: Bench) -> dict[str, Verification]:
    results = {}
    for export in bench.format.exports:
        path = bench.path(export)
        result = results[export.name] = verify(bench.packed[export.kind], path)
        if not result.exact:
            raise MismatchError(f"{path}: {result.summary()}: the export is not what was trained; please report this")
    return results


def artifact_candidate(path: Path, stack: ExitStack) -> Candidate:
    """An exported file or folder in its own runtime: llama.cpp for .gguf, transformers for folders."""
    if path.suffix == ".gguf":
        llama = stack.enter_context(LlamaCpp(path))
        return Candidate(source=llama.logits, runtime=llama.version, simulated=False)
    if is_mlx(path):
        raise InputError(f"{path}: a folder for mlx-lm, which measures nothing here: measure the packed model instead")
    model = load_quantized(path) if "quantization_config" in load_config(path) else load_model(path)
    return Candidate(source=transformers_source(model), runtime=transformers_runtime(), simulated=False)


def _candidates(
    bench: Bench, models: dict[str, TextModel], stack: ExitStack
) -> dict[str, tuple[ComparisonRow, Candidate]]:
    """Everything that is measured, with its row of the report but for the figures."""
    runtime, found = transformers_runtime(), []
    variants = {"": True} | ({FLOAT_ACTIVATIONS: False} if bench.plan.static_scales else {})
    for kind, model in models.items():
        size = next((_size(bench.path(e)) for e in bench.format.exports if e.kind == kind and e.runs), None)
        for variant, on in variants.items():
            source = switched_source(model, on=on) if bench.plan.static_scales else transformers_source(model)
            label = f"{bench.labels[kind]}, {variant}" if variant else bench.labels[kind]
            row = ComparisonRow(label=label, kind=kind, variant=variant, comparison=None, size_bytes=size)  # type: ignore[arg-type]
            found.append((row, Candidate(source=source, runtime=runtime, simulated=True)))
    for export in bench.format.exports:
        is_gguf = export.name.endswith(".gguf")
        if not export.runs or (is_gguf and not _has_llama()):
            continue
        label = f"{bench.labels[export.kind]}, in {'llama.cpp' if is_gguf else 'transformers'}"
        path = bench.path(export)
        row = ComparisonRow(label=label, kind=export.kind, comparison=None, size_bytes=_size(path))  # type: ignore[arg-type]
        found.append((row, artifact_candidate(path, stack)))
    return {row.label: (row, candidate) for row, candidate in found}


def _compare(bench: Bench, models: dict[str, TextModel], windows_NT: Tensor, progress: Progress) -> list[ComparisonRow]:
    def on_progress(done: int, total: int, kl: dict[str, float]) -> None:
        qat, stock = kl[bench.labels["trained"]], kl[bench.labels["stock"]]
        progress.part(done, total, f"KL {qat:.4f}, {bench.labels['stock'].lower()} {stock:.4f}")

    with ExitStack() as stack:
        named = _candidates(bench, models, stack)
        candidates = {label: candidate for label, (_, candidate) in named.items()}
        results = evaluate_many(transformers_source(bench.teacher), candidates, windows_NT, on_progress=on_progress)
    original = sum(t.numel() * 2 for _, t in stream_tensors(bench.model_dir, bench.plan.model))
    rows = [ComparisonRow(label="Original", kind="original", comparison=None, size_bytes=original)]
    return rows + [_with(named[label][0], comparison) for label, comparison in results.items()]


def _with(row: ComparisonRow, comparison: Comparison) -> ComparisonRow:
    return ComparisonRow(**(vars(row) | {"comparison": comparison}))


def _size(path: Path) -> int:
    """Bytes of a file; of a folder's weights."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.glob("*.safetensors"))


def _layers(bench: Bench) -> list[LayerRow]:
    """Relative RMS error of every tensor on a BlockGrid against the original."""
    rows = {}
    for name, original in stream_tensors(bench.model_dir, bench.plan.model):
        tensor = bench.plan[name]
        if not isinstance(tensor.grid, BlockGrid):
            continue
        norm = original.float().norm()
        errors = {
            label: float((bench.packed[kind].decode(name) - original.float()).norm() / norm)
            for kind, label in (("stock", "stock"), ("fitted", "MSE"), ("trained", "QAT"))
        }
        rows[name] = LayerRow(tensor=name, role=tensor.spec.role, relative_rms=errors)
    return [rows[t.name] for t in bench.plan if t.name in rows]


def _artifacts(bench: Bench, verifications: dict[str, Verification]) -> list[Artifact]:
    made = []
    for export in bench.format.exports:
        path = bench.path(export)
        file = path if path.is_file() else path / "model.safetensors"
        if export.kind == "trained":
            name, said = str(file.relative_to(bench.out)), verifications[export.name].summary()
            made.append(
                Artifact(name=name, size_bytes=file.stat().st_size, sha256=file_sha256(file), verification=said)
            )
    return made


def _samples(bench: Bench, models: dict[str, TextModel], evaluation: Evaluation) -> list[Sample]:
    prompts = evaluation.prompts
    if not prompts:
        return []
    texts = {"Original": greedy(bench.teacher, bench.tokenizer, prompts, evaluation.sample_tokens)}
    for kind, model in models.items():
        switch_static(model, activations=True, kv_cache=True)
        texts[bench.labels[kind]] = greedy(model, bench.tokenizer, prompts, evaluation.sample_tokens)
    return [
        Sample(prompt=prompt, continuations={label: lines[i] for label, lines in texts.items()})
        for i, prompt in enumerate(prompts)
    ]
