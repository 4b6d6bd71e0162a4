"""The whole path in one call: teacher, training, references, pack, export, verify, measure, report.

Every stage is a public function of its own; this file only puts them in order. A run folder holds

    run.json losses.jsonl checkpoints/    the training (see train.loop)
    packed/                               codes and scales: the result
    model.gguf  hf/                       a GGUF recipe's files, or
    mobile/                               the mobile format's folder, verified against packed/
    stock/  fitted/  start/               references without training, and stock's own files
    report.html report.md report.json     the proof

in this order, so that a user has the files before anything is measured. start/ is there where GPTQ chose the
first codes, or where layers were trained before the whole model.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from intaglio.errors import CorpusError, InputError, OutputError
from intaglio.formats.table import format_of
from intaglio.formats.verify import Verification
from intaglio.measure.candidates import artifact_candidate, packed_candidate
from intaglio.measure.evaluate import evaluate_pair
from intaglio.measure.metrics import Comparison
from intaglio.measure.original import open_original
from intaglio.measure.report import Report, write_report
from intaglio.numerics.device import Device, device_for
from intaglio.packed import identity
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import TextModel, model_name, stored_dtype
from intaglio.packed.identity import CHECKPOINT, COMPRESSED, GGUF, MOBILE, QUANTIZED, expect
from intaglio.packed.model import PackedModel
from intaglio.packed.outputs import check_output
from intaglio.packed.store import new_path
from intaglio.plan.family import ModelSpec, check_runs_alone, read_spec
from intaglio.plan.files import reading
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.progress import Progress
from intaglio.runs.bench import (
    FAILURES,
    PACKED,
    REFERENCES,
    Bench,
    failure_of,
    make_files,
    verify_files,
    with_references,
)
from intaglio.runs.proof import Evaluation, missing_runtime, prove
from intaglio.train.corpus import Corpus, held_out_windows, load_corpus, sample_corpus
from intaglio.train.data.sources import Data, path_of
from intaglio.train.latents import Latents
from intaglio.train.layerwise import quantize_on_text
from intaglio.train.loop import Options, check_stages, run_identity, train
from intaglio.train.pack import pack_model
from intaglio.train.run_folder import check_run_dir, hold
from intaglio.train.sharding import dismiss_processes, is_main, load_own_rows, start_processes, world_size

SHARE_HELD_OUT = 0.02  # of the training sequences, when no held-out text is given
HELD_OUT_FILE = "heldout.npy"


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
        return _run(Path(model_dir), recipe, out, data, evaluation, options, resume, progress, device)


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
    check_run_dir(out, run_identity(plan, None, options), resume)
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
        teacher if start is None else _teacher(model_dir, spec, device),  # the student is then what is given
        plan,
        corpus,
        out,
        teacher=teacher,
        start=start,
        options=options,
        resume=resume,
        on_step=progress.step,
        on_calibration=lambda done, total: progress.part(done, total, "tokens calibrated"),
        on_start=_keep_start(model_dir, plan, out, evaluation, failures) if keeps else lambda latents: None,
    )
    progress.stage("Packing")
    pack_model(latents, out / "packed", assets=model_dir, provenance=_provenance(model_dir, data), replace=resume)
    main, alone = is_main(), world_size() == 1
    dismiss_processes()
    if not main:
        return None
    with new_path(out / HELD_OUT_FILE, replace=True, internal=True) as temporary, open(temporary, "wb") as file:
        np.save(file, windows_NT)
    del latents
    gc.collect()  # a session and its model hold each other, and a GPU's memory with them
    # on a GPU it is loaded again, without what training left in it; of several processes none has all of it
    given = teacher if device.type == "cpu" and alone else None
    del teacher
    bench = Bench.open(model_dir, out, tokenizer, ["trained"], device=device, given=given, failures=failures)
    verified = _files(bench, replace=resume, progress=progress)
    bench = with_references(bench, evaluation.references, corpus, options, progress, replace=resume)
    return _measure(bench, windows_NT, evaluation, verified, progress, began=began, replace=resume)


def _plan(model_dir: Path, recipe: Recipe) -> Plan:
    """The run's plan. Raises what is wrong with model, recipe or stages before anything is loaded."""
    expect(model_dir, CHECKPOINT)
    spec = read_spec(model_dir)
    check_runs_alone(spec, model_dir)
    plan = make_plan(spec, recipe)
    make_plan(spec, format_of(plan).stock_recipe(recipe))  # a reference that cannot be made is known now
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
    path = out / PACKED["start"]
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
            provenance={"name": model_name(model_dir), "corpus": corpus.digest},
            on_window=lambda info: progress.part(info.last + 1, info.layers, info.figures),
        )
    start = PackedModel.open(path)
    if start.plan.digest != plan.digest or start.provenance.get("corpus") != corpus.digest:
        raise OutputError(f"{path}: was made by another recipe or from other text: remove it, or choose another folder")
    return start


def _keep_start(
    model_dir: str | Path, plan: Plan, out: Path, evaluation: Evaluation, failures: dict[str, str]
) -> Callable[[Latents], None]:
    """Packs what training begins with, if GPTQ chose it and it is to be measured; a failure is noted and no more."""

    def keep(latents: Latents) -> None:
        if not (plan.recipe.schedule.gptq_tokens and "start" in REFERENCES[evaluation.references]):
            return
        record = {"name": model_name(model_dir), "method": f"fit {plan.recipe.fit}, GPTQ"}
        try:
            pack_model(latents, out / PACKED["start"], assets=model_dir, provenance=record, replace=True)
        except FAILURES as error:
            failures["start"] = failure_of(error)

    return keep


def report(
    original: str | Path,
    run_dir: str | Path,
    *,
    evaluation: Evaluation | None = None,
    progress: Progress | None = None,
    device: Device = None,
) -> Report:
    """Measure a finished run again and rewrite its report; on the run's own held-out text by default.

    References that the evaluation asks for are measured if the run has them.
    """
    progress, evaluation, out = progress or Progress(), evaluation or Evaluation(), Path(run_dir)
    progress.stage("Reading the files back")
    bench = Bench.open(original, out, load_tokenizer(original), ["trained"], device=device_for(device))
    bench = bench.with_those_there(evaluation.references)
    vocab_size = bench.plan.model.layer_config.vocab_size
    if evaluation.text is not None:
        windows_NT = read_windows(evaluation, vocab_size, bench.tokenizer)
    else:
        windows_NT = _saved_windows(out / HELD_OUT_FILE, vocab_size)
    verified = verify_files(bench, [export for export in bench.format.exports if export.kind == "trained"])
    return _measure(bench, windows_NT, evaluation, verified, progress, began=None, replace=True)


def _teacher(model_dir: str | Path, spec: ModelSpec, device: torch.device) -> TextModel:
    """The original to train from: float32 on a CPU; in its own dtype on a GPU, whose memory the student needs."""
    dtype = torch.float32 if device.type == "cpu" else stored_dtype(model_dir, spec)
    return load_own_rows(model_dir, spec, dtype, device)


def _files(bench: Bench, *, replace: bool, progress: Progress) -> dict[str, Verification]:
    """Write the trained model's files and read them back, then say where they are."""
    progress.stage("Writing files")
    verified = make_files(bench, "trained", replace=replace)
    for path in [bench.out / PACKED["trained"], *(found.artifact for found in verified.values())]:
        progress.note(f"{path}: holds what was trained, 0 bits differ")
    return verified


def _measure(
    bench: Bench,
    windows_NT: NDArray[np.int32],
    evaluation: Evaluation,
    verified: dict[str, Verification],
    progress: Progress,
    *,
    began: float | None,
    replace: bool,
) -> Report:
    result = prove(bench, torch.from_numpy(windows_NT).long(), evaluation, verified, progress, began)
    write_report(result, bench.out, replace=replace)
    return result


def _saved_windows(path: Path, vocab_size: int) -> NDArray[np.int32]:
    advice = "give held-out text with --text"
    with reading(path, "cannot be read", advice, CorpusError):
        if not path.is_file():
            raise ValueError("no regular file")
        # mapped: a header that announces more than the file has is an error, and no allocation
        windows_NT = np.load(path, allow_pickle=False, mmap_mode="r")
        if not isinstance(windows_NT, np.ndarray):
            raise ValueError("an archive of arrays")
    if windows_NT.ndim != 2 or windows_NT.dtype != np.int32 or not windows_NT.size:
        raise CorpusError(f"{path}: {windows_NT.dtype} of shape {windows_NT.shape}: expected int32 [N, T]: {advice}")
    if windows_NT.min() < 0 or windows_NT.max() >= vocab_size:
        raise CorpusError(f"{path}: has tokens that the vocabulary of {vocab_size} has not: {advice}")
    return np.array(windows_NT)


def training_text(plan: Plan, data: Data | None, tokenizer: Any, teacher: TextModel, progress: Progress) -> Corpus:
    """Training text of a run: a user's text, or without any the teacher's own. `progress` hears what was read."""
    schedule = plan.recipe.schedule
    length = schedule.sequence_length
    if data is not None:
        corpus = load_corpus(
            data,
            tokenizer,
            sequence_length=length,
            vocab_size=plan.model.layer_config.vocab_size,
            max_tokens=max(schedule.tokens, schedule.layer_tokens if "layers" in schedule.stages else 0),
            assistant_only=schedule.assistant_only,
        )
        for line in corpus.reading.lines() if corpus.reading is not None else []:
            progress.note(line)
        return corpus
    if schedule.assistant_only:
        raise InputError(
            "schedule.assistant_only needs chats, and the model's own samples are none: give chats with --data, or "
            "leave it out with --set schedule.assistant_only=false"
        )
    return sample_corpus(
        teacher,
        tokenizer,
        tokens=schedule.tokens,
        sequence_length=length,
        seed=schedule.seed,
        on_progress=lambda done: progress.part(done, schedule.tokens, "tokens of its own"),
    )


def held_out(corpus: Corpus, evaluation: Evaluation, plan: Plan, tokenizer: Any) -> tuple[Corpus, NDArray[np.int32]]:
    """Training sequences, and evaluation windows [N, T] that training never sees."""
    if evaluation.text is not None:
        return corpus, read_windows(evaluation, plan.model.layer_config.vocab_size, tokenizer)
    count = max(1, round(len(corpus.tokens) * SHARE_HELD_OUT))
    if count >= len(corpus.tokens):
        raise CorpusError(
            f"{corpus.source}: {len(corpus.tokens)} sequence: expected two or more, one of them to measure on: "
            "add text, or give held-out text of its own"
        )
    windows = corpus.tokens[-count:][: max(1, evaluation.tokens // corpus.tokens.shape[1])]
    return corpus.rows(slice(-count)), windows


def read_windows(evaluation: Evaluation, vocab_size: int, tokenizer: Any) -> NDArray[np.int32]:
    """Held-out windows [N, T] of `evaluation.text`."""
    assert evaluation.text is not None
    return held_out_windows(
        evaluation.text, tokenizer, length=evaluation.window, max_tokens=evaluation.tokens, vocab_size=vocab_size
    )


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
    progress, artifact, device = progress or Progress(), Path(artifact), device_for(device)
    progress.stage("Loading")
    kind = expect(artifact, identity.PACKED, GGUF, CHECKPOINT, MOBILE, COMPRESSED, QUANTIZED).kind
    packed = PackedModel.open(artifact) if kind == identity.PACKED else None
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
        return evaluate_pair(
            measured.logits,
            candidate.source,
            measured.windows_NT,
            runtime=candidate.runtime,
            simulated=candidate.simulated,
            on_progress=lambda done, total, kl: progress.part(done, total, f"KL {kl['candidate']:.4f}"),
        )


def _provenance(model_dir: str | Path, data: Data | None) -> dict[str, Any]:
    return {
        "name": model_name(model_dir),
        "method": "quantization-aware training",
        "data": "the model's own samples" if data is None else str(data),
    }
