"""The whole path in one call: teacher, training, references, pack, export, verify, measure, report.

Every stage is a public function of its own; this file only puts them in order. A run folder holds

    run.json losses.jsonl speed.jsonl     the training (see train.loop and train.record)
    checkpoints/ codes.safetensors
    packed/                               codes and scales: the result
    model.gguf  hf/                       a GGUF recipe's files, or
    mobile/                               the mobile format's folder, verified against packed/
    layers/                               what the stage "layers" left, if it is one of the recipe's
    stock/  fitted/  start/               references without training, and stock's own files
    report.html report.md report.json     the proof

in this order, so that a user has the files before anything is measured. start/ is there where GPTQ chose the
first codes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from intaglio.errors import InputError, OutputError
from intaglio.formats.table import format_of
from intaglio.measure.report import Report
from intaglio.numerics.device import Device, device_for
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import TextModel, stored_dtype
from intaglio.packed.identity import CHECKPOINT, expect
from intaglio.packed.model import PackedModel
from intaglio.packed.origin import provenance_of
from intaglio.packed.outputs import check_output
from intaglio.plan.family import ModelSpec, check_runs_alone, read_spec
from intaglio.plan.hub import find_model, origin
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.progress import Progress
from intaglio.runs.bench import (
    FAILURES,
    PACKED,
    REFERENCES,
    Bench,
    failure_of,
    with_references,
)
from intaglio.runs.export import make_files
from intaglio.runs.proof import Evaluation, missing_runtime, prove
from intaglio.runs.texts import held_out, save_windows, training_text
from intaglio.train.corpus import Corpus
from intaglio.train.data.sources import Data, path_of, record_of
from intaglio.train.latents import Latents
from intaglio.train.layerwise import quantize_on_text
from intaglio.train.loop import check_stages, run_identity, train
from intaglio.train.options import Options
from intaglio.train.pack import pack_model
from intaglio.train.run_folder import LAYERS, check_run_dir, hold
from intaglio.train.sharding import dismiss_processes, is_main, load_own_rows, start_processes, world_size


def run(
    model_dir: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    data: Data | None,
    evaluation: Evaluation | None = None,
    options: Options | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    device: Device = None,
) -> Report | None:
    """Train `model_dir` by `recipe` on `data`, and leave model, artifacts and report in `out`.

    The files are written and read back as soon as training ends. What follows, references, measurement and report,
    takes nothing away from them: a reference or a row that fails says why in the report.

    data: see `train.corpus.load_corpus`; None lets the model write its own text. device: where the original is, and
    where references are fitted and everything is measured; None picks a GPU if there is one.
    Of several processes, as torchrun starts them, each trains its share; the main one measures and has the report,
    the others return None. Raises MismatchError if an artifact does not hold the trained codes; see the stages for the
    rest.
    """
    progress, evaluation, out = progress or Progress(), evaluation or Evaluation(), Path(out)
    check_output(out, [model_dir, path_of(data), path_of(evaluation.text)])
    device = device_for(start_processes() if device is None else device)
    progress = progress if is_main() else Progress()
    with hold(out), progress.logged(out) if is_main() else nullcontext():
        return _run(find_model(model_dir, progress), recipe, out, data, evaluation, options, resume, progress, device)


def _run(
    model_dir: Path,
    recipe: Recipe,
    out: Path,
    data: Data | None,
    evaluation: Evaluation,
    options: Options | None,
    resume: bool,
    progress: Progress,
    device: torch.device,
) -> Report | None:
    began = time.perf_counter()
    progress.stage("Loading the original")
    plan = _plan(model_dir, recipe)
    spec, by_layers = plan.model, "layers" in plan.recipe.schedule.stages
    check_run_dir(out, run_identity(plan, None, options, origin(model_dir)), resume)
    format_of(plan).check(plan, model_dir)
    if missing := missing_runtime(format_of(plan)):
        progress.note(missing)
    tokenizer, teacher = load_tokenizer(model_dir), _teacher(model_dir, spec, device)
    progress.stage("Reading text")
    corpus = training_text(plan, data, tokenizer, teacher, progress)
    corpus, windows_NT = held_out(corpus, evaluation, plan, tokenizer)
    start = _layers(model_dir, plan, corpus, out, options, device, progress) if by_layers else None
    progress.stage("Training")
    failures: dict[str, str] = {}
    keeps = world_size() == 1 and start is None
    latents = train(
        teacher if start is None else _teacher(model_dir, spec, device),  # training would change the teacher itself
        plan,
        corpus,
        out,
        teacher=teacher,
        start=start,
        source=origin(model_dir),
        options=options,
        resume=resume,
        progress=progress,
        held_out=windows_NT,
        on_start=_keep_start(model_dir, plan, out, evaluation, failures) if keeps else lambda latents: None,
    )
    progress.stage("Packing")
    record = {**provenance_of(model_dir), "method": "quantization-aware training", **record_of(data)}
    pack_model(latents, out / "packed", assets=model_dir, provenance=record, replace=resume)
    main, alone = is_main(), world_size() == 1
    dismiss_processes()
    if not main:
        return None
    save_windows(windows_NT, out)
    # on a GPU it is loaded again, without what training left in it; of several processes none has all of it
    given = teacher if device.type == "cpu" and alone else None
    del latents, teacher
    gc.collect()  # a session and its model hold each other, and a GPU's memory with them
    bench = Bench.open(model_dir, out, tokenizer, ["trained"], device=device, given=given, failures=failures)
    progress.stage("Writing files")
    verified = make_files(bench.packed["trained"], out, "trained", replace=resume, device=device)
    for path in [out / PACKED["trained"], *(found.artifact for found in verified.values())]:
        progress.note(f"{path}: holds what was trained, 0 bits differ")
    bench = with_references(bench, evaluation.references, corpus, options, progress, replace=resume)
    return prove(bench, windows_NT, evaluation, verified, progress, began=began, replace=resume)


def _plan(model_dir: Path, recipe: Recipe) -> Plan:
    """The run's plan. A wrong model, recipe or stage raises here, before anything is loaded."""
    expect(model_dir, CHECKPOINT)
    spec = read_spec(model_dir)
    check_runs_alone(spec, model_dir)
    plan = make_plan(spec, recipe)
    make_plan(spec, format_of(plan).stock_recipe(recipe))  # raises now if the reference cannot be made
    by_layers = "layers" in plan.recipe.schedule.stages
    check_stages(plan.recipe.schedule, by_layers)
    if by_layers and world_size() > 1:
        raise InputError("the stage 'layers' runs in one process: start one, or take it out of schedule.stages")
    return plan


def _layers(
    model_dir: Path,
    plan: Plan,
    corpus: Corpus,
    out: Path,
    options: Options | None,
    device: torch.device,
    progress: Progress,
) -> PackedModel:
    """The packed model of the stage "layers", in the run's folder; a run that was cut after it has it already."""
    path = out / LAYERS
    if not path.is_dir():
        progress.stage("Training layers")
        quantize_on_text(
            model_dir,
            plan,
            corpus,
            path,
            gptq=bool(plan.recipe.schedule.gptq_tokens),
            layers=True,
            options=options,
            device=device,
            provenance={**provenance_of(model_dir), "corpus": corpus.digest},
            progress=progress,
        )
    start = PackedModel.open(path)
    if start.plan.digest != plan.digest or start.provenance.get("corpus") != corpus.digest:
        raise OutputError(f"{path}: was made by another recipe or from other text: remove it, or choose another folder")
    return start


def _keep_start(
    model_dir: str | Path, plan: Plan, out: Path, evaluation: Evaluation, failures: dict[str, str]
) -> Callable[[Latents], None]:
    """A function that packs the first latents, if GPTQ chose them and they are to be measured; it notes a failure."""

    def keep(latents: Latents) -> None:
        if not (plan.recipe.schedule.gptq_tokens and "start" in REFERENCES[evaluation.references]):
            return
        record = {**provenance_of(model_dir), "method": f"fit {plan.recipe.fit}, GPTQ"}
        try:
            pack_model(latents, out / PACKED["start"], assets=model_dir, provenance=record, replace=True)
        except FAILURES as error:
            failures["start"] = failure_of(error)

    return keep


def _teacher(model_dir: str | Path, spec: ModelSpec, device: torch.device) -> TextModel:
    """The original to train from: float32 on a CPU; in its own dtype on a GPU, whose memory the student needs."""
    dtype = torch.float32 if device.type == "cpu" else stored_dtype(model_dir, spec)
    return load_own_rows(model_dir, spec, dtype, device)
