"""Measurement without training: one artifact against the original, and a finished run once more."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from intaglio.errors import InputError
from intaglio.formats.verify import verify_exact
from intaglio.measure.candidates import artifact_candidate, packed_candidate
from intaglio.measure.metrics import Comparison
from intaglio.measure.original import open_original
from intaglio.measure.report import Report
from intaglio.measure.tasks import Asking, evaluate_tasks
from intaglio.numerics.device import Device, device_for
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.identity import CHECKPOINT, COMPRESSED, GGUF, MOBILE, PACKED, QUANTIZED, expect
from intaglio.packed.model import PackedModel
from intaglio.plan.family import check_runs_alone, read_spec
from intaglio.plan.hub import ARTIFACT, find_model
from intaglio.progress import Progress
from intaglio.runs.bench import Bench
from intaglio.runs.proof import Evaluation, prove
from intaglio.runs.texts import HELD_OUT_FILE, read_windows, saved_windows


def compare(
    artifact: str | Path,
    original: str | Path,
    evaluation: Evaluation,
    progress: Progress | None = None,
    *,
    int8_cache: bool = False,
    device: Device = None,
) -> Comparison:
    """Measure one artifact against the original on `evaluation.text`.

    artifact: a .gguf, run in llama.cpp; a packed model, simulated in transformers; or a transformers
    folder, run there. int8_cache: for a packed model with KV scales, read the text token by token
    through a cache that holds int8. device: for what transformers runs; None picks a GPU if there is one.
    """
    progress, device = progress or Progress(), device_for(device)
    artifact, original = find_model(artifact, progress, ARTIFACT), find_model(original, progress)
    progress.stage("Loading")
    kind = expect(artifact, PACKED, GGUF, CHECKPOINT, MOBILE, COMPRESSED, QUANTIZED).kind
    packed = PackedModel.open(artifact) if kind == PACKED else None
    if packed is not None:
        packed.check()
    expect(original, CHECKPOINT)
    spec = read_spec(original)
    check_runs_alone(spec, original)
    if packed is not None:
        check_runs_alone(packed.plan.model, artifact)
    windows_NT = read_windows(evaluation, spec.layer_config.vocab_size, load_tokenizer(original))
    measured = open_original(original, spec, torch.from_numpy(windows_NT).long(), device)
    with ExitStack() as stack:
        if packed is not None:
            candidate = packed_candidate(measured, packed, int8_cache)
        elif int8_cache:
            raise InputError(f"{artifact}: only a packed model knows the scales that an int8 cache needs")
        else:
            candidate = artifact_candidate(artifact, stack, measured)
        progress.stage("Measuring")
        return measured.compare(candidate, progress)


def report(
    original: str | Path,
    run_dir: str | Path,
    *,
    evaluation: Evaluation | None = None,
    tasks: str | Sequence[str] | None = None,
    asking: Asking | None = None,
    progress: Progress | None = None,
    device: Device = None,
) -> Report:
    """Measure a finished run again and rewrite its report; on the run's own held-out text by default.

    References that the evaluation asks for are measured if the run has them. tasks, asking: as of `evaluate_tasks`,
    for the trained model's artifact; they are asked before anything else is measured.
    """
    progress, evaluation, out = progress or Progress(), evaluation or Evaluation(), Path(run_dir)
    original = find_model(original, progress)
    progress.stage("Reading the files back")
    bench = Bench.open(original, out, load_tokenizer(original), ["trained"], device=device_for(device))
    bench = bench.with_those_there(evaluation.references)
    vocab_size = bench.plan.model.layer_config.vocab_size
    if evaluation.text is not None:
        windows_NT = read_windows(evaluation, vocab_size, bench.tokenizer)
    else:
        windows_NT = saved_windows(out / HELD_OUT_FILE, vocab_size)
    verified = {
        export.name: verify_exact(bench.packed["trained"], bench.path(export), device=bench.device)
        for export in bench.format.exports
        if export.kind == "trained"
    }
    scores = []
    if tasks is not None:
        trained = [export for export in bench.format.exports if export.kind == "trained"]
        artifact = bench.path(next((export for export in trained if export.runs), trained[0]))
        scores = evaluate_tasks(artifact, original, tasks, asking, progress=progress, device=bench.device)
    return prove(bench, windows_NT, evaluation, verified, progress, tasks=scores, replace=True)
