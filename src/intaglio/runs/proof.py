"""Read a run's files back, measure them, and make the report.

A run folder holds packed models of up to four kinds: "trained", and the references "stock", "fitted" and "start", which
are not trained. The decoded weights of each are measured in transformers, and the files that were exported in their own
runtime. One of them at a time is in memory beside the original.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intaglio.errors import InputError
from intaglio.formats.table import Format
from intaglio.formats.verify import Verification
from intaglio.measure.candidates import artifact_candidate
from intaglio.measure.charts import curve_of
from intaglio.measure.distances import weight_distances
from intaglio.measure.evaluate import Candidate, greedy, logits_of, transformers_runtime
from intaglio.measure.llamacpp import installed, why_unusable
from intaglio.measure.original import Original, open_original
from intaglio.measure.report import (
    LOSSES,
    Artifact,
    ComparisonRow,
    Provenance,
    Report,
    Sample,
    plan_rows,
    write_report,
)
from intaglio.measure.simulate import Simulation
from intaglio.measure.tasks import TaskScore
from intaglio.packed.checkpoint import TextModel
from intaglio.packed.model import PackedModel, file_sha256
from intaglio.packed.origin import model_name
from intaglio.plan.files import without_folders
from intaglio.progress import Progress
from intaglio.runs.bench import FAILURES, REFERENCES, Bench, failure_of
from intaglio.train.data.sources import Data
from intaglio.train.run_folder import read_losses
from intaglio.train.static import switch_static

IN_WEIGHTS = {"stock": "stock", "fitted": "fit", "start": "GPTQ", "trained": "QAT"}  # columns of weights' distances
FLOAT_ACTIVATIONS = "float activations"  # the variant without quantized activations and KV cache


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Settings of the measurement after training. tokens, window: of held-out text; prompts: for samples.

    references: the models without training that are made and measured too: "none"; "stock", which is anyone's rounding;
    or "all", which adds the recipe's fit and the start that GPTQ gave. InputError for another word.
    """

    text: Data | None = None
    tokens: int = 16384
    window: int = 256
    prompts: tuple[str, ...] = ()
    sample_tokens: int = 40
    references: str = "all"

    def __post_init__(self) -> None:
        if self.references not in REFERENCES:
            raise InputError(f"references {self.references!r}: expected one of {', '.join(REFERENCES)}")


def prove(
    bench: Bench,
    windows_NT: NDArray[np.int32],
    evaluation: Evaluation,
    verifications: dict[str, Verification],
    progress: Progress,
    *,
    tasks: Sequence[TaskScore] = (),
    began: float | None = None,
    replace: bool = False,
) -> Report:
    """Measure everything on the windows [N, T], and write and return the report. A row that fails says why.

    verifications: what reading the trained model's files back said. tasks: its scores, if it was asked any. began:
    when the run began, in seconds of `time.perf_counter`; None when a finished run is measured again.
    """
    rows, samples, notes = _measure(bench, torch.from_numpy(windows_NT).long(), evaluation, progress)
    size = sum(2 * tensor.numel for tensor in bench.plan.model.tensors)
    losses = read_losses(bench.out)
    progress.stage("Comparing weights")
    report = Report(
        title=f"{model_name(bench.model_dir)}, {bench.plan.recipe.name}",
        model=model_name(bench.model_dir),
        format=bench.format.label(bench.plan),
        recipe_name=bench.plan.recipe.name,
        recipe_toml=bench.plan.recipe.to_toml(),
        plan=plan_rows(bench.plan),
        comparisons=[
            ComparisonRow(label="Original", kind="original", comparison=None, size_bytes=size),
            *rows,
            *_failed(bench, bench.failures),
        ],
        tasks=list(tasks),
        loss_name=LOSSES[bench.plan.recipe.schedule.loss],
        loss_curve=curve_of(losses, "loss"),
        held_out_curve=curve_of(losses, "held_out_loss"),
        codes_curve=curve_of(losses, "codes_changed"),
        layers=weight_distances(
            bench.model_dir, bench.plan, {IN_WEIGHTS[kind]: p for kind, p in bench.packed.items()}, bench.device
        ),
        artifacts=_artifacts(bench, verifications),
        samples=samples,
        provenance=Provenance(
            versions={name: _version(name) for name in ("intaglio", "torch", "transformers", "gguf")},
            command=without_folders(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
            seconds=None if began is None else time.perf_counter() - began,
            tokens=int(losses[-1]["tokens"]) if losses else None,
        ),
        notes=notes + _notes(bench),
    )
    write_report(report, bench.out, replace=replace)
    return report


def _measure(
    bench: Bench, windows_NT: Tensor, evaluation: Evaluation, progress: Progress
) -> tuple[list[ComparisonRow], list[Sample], list[str]]:
    """Rows, samples, and a note on how exact they are; without the original, rows that say why there is none."""
    progress.stage("Loading the original")
    try:
        original = open_original(bench.model_dir, bench.plan.model, windows_NT, bench.device, bench.given)
    except FAILURES as error:
        return _failed(bench, dict.fromkeys(bench.packed, failure_of(error))), [], []
    measuring = _Measuring(bench, original, evaluation, progress)
    rows = measuring.simulations() + measuring.artifacts()
    return rows, measuring.samples(), [original.note]


def _failed(bench: Bench, reasons: dict[str, str]) -> list[ComparisonRow]:
    """Rows of kinds that could not be made or measured."""
    return [
        ComparisonRow(label=bench.labels[kind], kind=kind, comparison=None, failure=reason)  # type: ignore[arg-type]
        for kind, reason in reasons.items()
    ]


def _notes(bench: Bench) -> list[str]:
    notes = [
        "Rows named “simulated” compute with the decoded weights in transformers.",
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
    if _runs_in_llama(bench.format) and not installed():
        notes.append("llama-cpp-python is not installed, so no artifact was run in llama.cpp.")
    return notes


def _version(name: str) -> str:
    """The installed version of a package; of one that is only on the path, that it is not known."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _runs_in_llama(format_: Format) -> bool:
    return any(export.runs and export.name.endswith(".gguf") for export in format_.exports)


def missing_runtime(format_: Format) -> str | None:
    """A line on a runtime that this format is measured in and that cannot run here; None if there is none."""
    reason = why_unusable() if _runs_in_llama(format_) else None
    return reason and f"No artifact will be run in llama.cpp: {reason}"


class _Measuring:
    """Measures one model after the other against the original; continues prompts with each on the way."""

    def __init__(self, bench: Bench, original: Original, evaluation: Evaluation, progress: Progress):
        self.bench, self.original, self.progress = bench, original, progress
        self.prompts, self.sample_tokens = evaluation.prompts, evaluation.sample_tokens
        self.texts: dict[str, list[str]] = {}
        self.continue_prompts("Original", original.model)

    def simulations(self) -> list[ComparisonRow]:
        """The decoded weights of every kind, in transformers."""
        bench, rows, simulation = self.bench, [], Simulation(self.original.model)
        variants = {"": True} | ({FLOAT_ACTIVATIONS: False} if bench.plan.static_scales else {})
        for kind, packed in bench.packed.items():
            size = next((_size(bench.path(e)) for e in bench.format.exports if e.kind == kind and e.runs), None)
            for variant, on in variants.items():

                def candidate(stack: ExitStack, packed: PackedModel = packed, on: bool = on) -> Candidate:
                    model = simulation.load(packed)
                    switch_static(model, activations=on, kv_cache=on)
                    source = logits_of(model, self.original.windows_NT, self.original.batch)
                    return Candidate(source=source, runtime=transformers_runtime(), simulated=True)

                label = f"{bench.labels[kind]}, {variant}" if variant else bench.labels[kind]
                row = ComparisonRow(label=label, kind=kind, variant=variant, comparison=None, size_bytes=size)  # type: ignore[arg-type]
                rows.append(self.measured(row, candidate))
            if not rows[-1].failure:
                self.continue_prompts(bench.labels[kind], simulation.load(packed))
        return rows

    def artifacts(self) -> list[ComparisonRow]:
        """Exported files in their own runtimes."""
        bench, rows = self.bench, []
        for export in bench.format.exports:
            is_gguf = export.name.endswith(".gguf")
            if not export.runs or export.kind not in bench.packed or (is_gguf and not installed()):
                continue
            path, runtime = bench.path(export), "llama.cpp" if is_gguf else "transformers"
            label = f"{bench.labels[export.kind]}, in {runtime}"
            row = ComparisonRow(label=label, kind=export.kind, comparison=None, size_bytes=_size(path))  # type: ignore[arg-type]
            rows.append(self.measured(row, partial(artifact_candidate, path, original=self.original)))
        return rows

    def measured(self, row: ComparisonRow, candidate: Callable[[ExitStack], Candidate]) -> ComparisonRow:
        """The row with its figures, or with the reason why it has none."""
        self.progress.stage(f"Measuring {row.label}")
        try:
            with ExitStack() as stack:
                return replace(row, comparison=self.original.compare(candidate(stack), self.progress))
        except FAILURES as error:
            failed = replace(row, failure=failure_of(error))
            self.progress.note(f"{row.label}: not measured: {failed.failure}")
            return failed

    def continue_prompts(self, label: str, model: TextModel) -> None:
        """Keep what the model continues each prompt with, or why it continues none."""
        if not self.prompts:
            return
        try:
            self.texts[label] = greedy(model, self.bench.tokenizer, self.prompts, self.sample_tokens)
        except FAILURES as error:
            self.texts[label] = [f"(none: {failure_of(error)})"] * len(self.prompts)

    def samples(self) -> list[Sample]:
        """Continuation of each prompt by every model."""
        return [
            Sample(prompt=prompt, continuations={label: lines[i] for label, lines in self.texts.items()})
            for i, prompt in enumerate(self.prompts)
        ]


def _size(path: Path) -> int | None:
    """Bytes of a file; of a folder's weights. None if it is not there."""
    if not path.exists():
        return None
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.glob("*.safetensors"))


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
