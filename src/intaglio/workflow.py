"""The whole path in one call: teacher, training, references, pack, export, verify, measure, report.

Every stage is a public function of its own; this file only puts them in order. A run folder holds

    run.json losses.jsonl checkpoints/    the training (see train.loop)
    packed/                               codes and scales: the result
    model.gguf  hf/                       a GGUF recipe's files, or
    mobile/                               the mobile format's folder, verified against packed/
    stock/  fitted/                       references without training, and stock's own files
    report.html report.md report.json     the proof
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from intaglio.errors import CorpusError, InputError
from intaglio.formats import format_of
from intaglio.measure.evaluate import Candidate, evaluate_many, transformers_runtime, transformers_source
from intaglio.measure.int8_cache import int8_source
from intaglio.measure.metrics import Comparison
from intaglio.measure.report import Report, write_report
from intaglio.measure.simulate import decoded_model
from intaglio.packed.checkpoint import TextModel, load_model, load_tokenizer, model_name
from intaglio.packed.model import FILE_NAME as PACKED_FILE
from intaglio.packed.model import PackedModel
from intaglio.packed.store import new_path
from intaglio.plan.family import check_runs_alone, read_spec
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.progress import Progress
from intaglio.proof import PACKED, Bench, Evaluation, artifact_candidate, prove
from intaglio.train.corpus import Corpus, held_out_windows, load_corpus, sample_corpus
from intaglio.train.data.sources import Data
from intaglio.train.loop import Options, train
from intaglio.train.pack import pack_model
from intaglio.train.ptq import quantize_on_text
from intaglio.train.quantize import quantize
from intaglio.train.run_folder import check_run_dir
from intaglio.train.static import switch_static

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
) -> Report:
    """Train `model_dir` by `recipe` on `data`, and leave model, artifacts and report in `out`.

    data: see `train.corpus.load_corpus`; None lets the model write its own text.
    Raises MismatchError if an artifact does not hold the trained codes; see the stages for the rest.
    """
    progress, evaluation, out = progress or Progress(), evaluation or Evaluation(), Path(out)
    began = time.perf_counter()
    progress.stage("Loading the original")
    spec = read_spec(model_dir)
    check_runs_alone(spec, model_dir)
    plan = make_plan(spec, recipe)
    check_run_dir(out, {"plan": plan.digest}, resume)
    format_of(plan).check(plan, Path(model_dir))
    tokenizer, teacher = load_tokenizer(model_dir), load_model(model_dir)
    progress.stage("Reading text")
    corpus = training_text(plan, data, tokenizer, teacher, progress)
    corpus, windows_NT = held_out(corpus, evaluation, plan, tokenizer)
    progress.stage("Training")
    student = train(
        teacher,
        plan,
        corpus,
        out,
        options=options,
        resume=resume,
        on_step=progress.step,
        on_calibration=lambda done, total: progress.part(done, total, "tokens calibrated"),
    )
    progress.stage("Packing and exporting")
    pack_model(student, plan, out / "packed", assets=model_dir, provenance=_provenance(model_dir, data), replace=resume)
    with new_path(out / HELD_OUT_FILE, replace=True) as temporary, open(temporary, "wb") as file:
        np.save(file, windows_NT)
    del student
    _references(Path(model_dir), plan, corpus, teacher, out, options, replace=resume)
    bench = Bench.open(model_dir, out, tokenizer, teacher.to("cpu"))
    for export in bench.format.exports:
        export.write(bench.packed[export.kind], bench.path(export), replace=resume)
    return _measure(bench, windows_NT, evaluation, progress, began=began, replace=resume)


def report(
    model_dir: str | Path, out: str | Path, *, evaluation: Evaluation | None = None, progress: Progress | None = None
) -> Report:
    """Measure a finished run again and rewrite its report; on the run's own held-out text by default."""
    progress, evaluation, out = progress or Progress(), evaluation or Evaluation(), Path(out)
    progress.stage("Loading the original")
    bench = Bench.open(model_dir, out, load_tokenizer(model_dir), load_model(model_dir))
    if evaluation.text is not None:
        windows_NT = read_windows(evaluation, bench.teacher.config.vocab_size, bench.tokenizer)
    else:
        windows_NT = _saved_windows(out / HELD_OUT_FILE, bench.plan.model.layer_config.vocab_size)
    return _measure(bench, windows_NT, evaluation, progress, began=None, replace=True)


def _measure(
    bench: Bench,
    windows_NT: NDArray[np.int32],
    evaluation: Evaluation,
    progress: Progress,
    *,
    began: float | None,
    replace: bool,
) -> Report:
    progress.stage("Measuring")
    result = prove(bench, torch.from_numpy(windows_NT).long(), evaluation, progress, began)
    write_report(result, bench.out, replace=replace)
    return result


def _saved_windows(path: Path, vocab_size: int) -> NDArray[np.int32]:
    advice = "give held-out text with --text"
    try:
        windows_NT = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CorpusError(f"{path}: cannot be read: {error}: {advice}") from None
    if windows_NT.ndim != 2 or windows_NT.dtype.kind != "i" or not windows_NT.size:
        raise CorpusError(f"{path}: {windows_NT.dtype} of shape {windows_NT.shape}: expected int32 [N, T]: {advice}")
    if windows_NT.min() < 0 or windows_NT.max() >= vocab_size:
        raise CorpusError(f"{path}: has tokens that the vocabulary of {vocab_size} has not: {advice}")
    return windows_NT


def training_text(plan: Plan, data: Data | None, tokenizer: Any, teacher: TextModel, progress: Progress) -> Corpus:
    """What a run trains on: a user's text, or without any the teacher's own. `progress` hears what was read."""
    schedule = plan.recipe.schedule
    length = schedule.sequence_length
    if data is not None:
        corpus = load_corpus(
            data,
            tokenizer,
            sequence_length=length,
            vocab_size=plan.model.layer_config.vocab_size,
            max_tokens=schedule.tokens,
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


def _references(
    model_dir: Path,
    plan: Plan,
    corpus: Corpus,
    teacher: TextModel,
    out: Path,
    options: Options | None,
    *,
    replace: bool,
) -> None:
    """What can be had without training: anyone's rounding, and the recipe's fit."""
    stock = make_plan(model_dir, format_of(plan).stock_recipe(plan.recipe))
    for kind, reference in (("stock", stock), ("fitted", plan)):
        path = out / PACKED[kind]
        if reference.static_scales:
            quantize_on_text(teacher, reference, corpus, path, assets=model_dir, options=options, replace=replace)
        else:
            quantize(model_dir, reference, path, replace=replace)


def compare(
    artifact: str | Path,
    original: str | Path,
    evaluation: Evaluation,
    progress: Progress | None = None,
    *,
    int8_cache: bool = False,
) -> Comparison:
    """Measure one artifact against the original on `evaluation.text`.

    artifact: a .gguf, run in llama.cpp; a packed model, simulated in transformers; or a transformers
    folder, run there. int8_cache: for a packed model with KV scales, read the text token by token
    through a cache that holds int8.
    """
    progress, artifact = progress or Progress(), Path(artifact)
    progress.stage("Loading")
    packed = PackedModel.open(artifact) if (artifact / PACKED_FILE).is_file() else None
    check_runs_alone(read_spec(original), original)
    if packed is not None:
        check_runs_alone(packed.plan.model, artifact)
    teacher, tokenizer = load_model(original), load_tokenizer(original)
    windows_NT = read_windows(evaluation, teacher.config.vocab_size, tokenizer)
    with ExitStack() as stack:
        if packed is not None:
            candidate = _packed_candidate(teacher, packed, windows_NT, int8_cache)
        elif int8_cache:
            raise InputError(f"{artifact}: only a packed model knows the scales that an int8 cache needs")
        else:
            candidate = artifact_candidate(artifact, stack)
        progress.stage("Measuring")
        results = evaluate_many(
            transformers_source(teacher),
            {"artifact": candidate},
            torch.from_numpy(windows_NT).long(),
            on_progress=lambda done, total, kl: progress.part(done, total, f"KL {kl['artifact']:.4f}"),
        )
    return results["artifact"]


def _packed_candidate(
    teacher: TextModel, packed: PackedModel, windows_NT: NDArray[np.int32], int8_cache: bool
) -> Candidate:
    model = decoded_model(teacher, packed)
    source: Any = transformers_source(model)
    if int8_cache:
        if packed.plan.recipe.kv_cache is None:
            raise InputError(f"{packed.path}: recipe {packed.plan.recipe.name} leaves the KV cache in floats")
        switch_static(model, activations=True, kv_cache=False)  # the cache itself rounds them
        source = int8_source(model, torch.from_numpy(windows_NT).long(), packed.read_static())
    return Candidate(source=source, runtime=transformers_runtime(), simulated=True)


def _provenance(model_dir: str | Path, data: Data | None) -> dict[str, Any]:
    return {
        "name": model_name(model_dir),
        "method": "quantization-aware training",
        "data": "the model's own samples" if data is None else str(data),
    }
