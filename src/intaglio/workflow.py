"""The whole path in one call: teacher, references, training, pack, export, verify, measure, report.

Every stage is a public function of its own; this file only puts them in order and collects what the
report shows. A run folder holds

    run.json losses.jsonl checkpoints/    the training (see train.loop)
    packed/                               codes and scales: the result
    model.gguf  hf/                       the artifacts, verified against packed/
    stock/  fitted/  stock.gguf           references without training
    report.html report.md report.json     the proof
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intaglio.errors import CorpusError, MismatchError
from intaglio.export.gguf import check_exportable, check_grids, export_gguf
from intaglio.export.hf import export_hf
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
    write_report,
)
from intaglio.numerics.grid import BlockGrid
from intaglio.packed.checkpoint import TextModel, load_model, load_tokenizer, model_name, stream_tensors
from intaglio.packed.model import FILE_NAME as PACKED_FILE
from intaglio.packed.model import PackedModel, file_sha256
from intaglio.packed.store import new_path
from intaglio.packed.verify import Verification, verify
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.attach import pack_model
from intaglio.train.corpus import Corpus, held_out_windows, load_corpus, sample_corpus
from intaglio.train.loop import Options, StepInfo, check_run_dir, read_losses, train
from intaglio.train.quantize import quantize

SHARE_HELD_OUT = 0.02  # of the training sequences, when no held-out text is given
HELD_OUT_FILE = "heldout.npy"
STOCK_RECIPE = "q4_0-stock"
LABELS = {"stock": "Stock rounding", "fitted": "MSE fit", "trained": "QAT"}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Called as the work goes on; the command line draws bars with it.

    stage: name of the stage that begins. step: after each optimizer step. part: done and total of
    the stage's own unit, with a line of figures.
    """

    stage: Callable[[str], None] = lambda name: None
    step: Callable[[StepInfo], None] = lambda info: None
    part: Callable[[int, int, str], None] = lambda done, total, figures: None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured after training. tokens, window: of held-out text; prompts: for samples."""

    text: Path | None = None
    tokens: int = 16384
    window: int = 256
    prompts: tuple[str, ...] = ()
    sample_tokens: int = 40


@dataclass(frozen=True)
class Bench:
    """A finished run as the report sees it: the original, and what was made of it."""

    model_dir: Path
    out: Path
    tokenizer: Any
    teacher: TextModel
    packed: dict[str, PackedModel]

    @property
    def plan(self) -> Plan:
        return self.packed["trained"].plan

    @property
    def gguf(self) -> dict[str, Path]:
        return {"trained": self.out / "model.gguf", "stock": self.out / "stock.gguf"}


def run(
    model_dir: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    data: str | Path | None,
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
    plan = make_plan(model_dir, recipe)
    check_run_dir(out, {"plan": plan.digest}, resume)
    check_grids(plan)
    check_exportable(plan.model, model_dir)
    tokenizer, teacher = load_tokenizer(model_dir), load_model(model_dir)
    progress.stage("Reading text")
    corpus = _corpus(plan, data, tokenizer, teacher, progress)
    corpus, windows_NT = _held_out(corpus, evaluation, plan, tokenizer)
    progress.stage("Training")
    student = train(teacher, plan, corpus, out, options=options, resume=resume, on_step=progress.step)
    progress.stage("Packing and exporting")
    pack_model(student, plan, out / "packed", assets=model_dir, provenance=_provenance(model_dir, data), replace=resume)
    with new_path(out / HELD_OUT_FILE, replace=True) as temporary, open(temporary, "wb") as file:
        np.save(file, windows_NT)
    del student
    _references(Path(model_dir), plan, out, replace=resume)
    bench = _open_bench(model_dir, out, tokenizer, teacher.to("cpu"))
    _export(bench, replace=resume)
    return _measure(bench, windows_NT, evaluation, progress, began=began, replace=resume)


def report(
    model_dir: str | Path, out: str | Path, *, evaluation: Evaluation | None = None, progress: Progress | None = None
) -> Report:
    """Measure a finished run again and rewrite its report; on the run's own held-out text by default."""
    progress, evaluation, out = progress or Progress(), evaluation or Evaluation(), Path(out)
    progress.stage("Loading the original")
    bench = _open_bench(model_dir, out, load_tokenizer(model_dir), load_model(model_dir))
    if evaluation.text is not None:
        windows_NT = read_windows(evaluation, bench.teacher.config.vocab_size, bench.tokenizer)
    else:
        windows_NT = _saved_windows(out / HELD_OUT_FILE, bench.plan.model.config["vocab_size"])
    return _measure(bench, windows_NT, evaluation, progress, began=None, replace=True)


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


def _open_bench(model_dir: str | Path, out: Path, tokenizer: Any, teacher: TextModel) -> Bench:
    folders = {"stock": out / "stock", "fitted": out / "fitted", "trained": out / "packed"}
    return Bench(Path(model_dir), out, tokenizer, teacher, {k: PackedModel.open(p) for k, p in folders.items()})


def _corpus(plan: Plan, data: str | Path | None, tokenizer: Any, teacher: TextModel, progress: Progress) -> Corpus:
    schedule = plan.recipe.schedule
    length = schedule.sequence_length
    if data is not None:
        vocab_size = plan.model.config["vocab_size"]
        return load_corpus(data, tokenizer, sequence_length=length, vocab_size=vocab_size, max_tokens=schedule.tokens)
    return sample_corpus(
        teacher,
        tokenizer,
        tokens=schedule.tokens,
        sequence_length=length,
        seed=schedule.seed,
        on_progress=lambda done: progress.part(done, schedule.tokens, "tokens of its own"),
    )


def _held_out(corpus: Corpus, evaluation: Evaluation, plan: Plan, tokenizer: Any) -> tuple[Corpus, NDArray[np.int32]]:
    """Training sequences, and evaluation windows [N, T] that training never sees."""
    if evaluation.text is not None:
        return corpus, read_windows(evaluation, plan.model.config["vocab_size"], tokenizer)
    count = max(1, round(len(corpus.tokens) * SHARE_HELD_OUT))
    if count >= len(corpus.tokens):
        raise CorpusError(
            f"{corpus.source}: {len(corpus.tokens)} sequence: expected two or more, one of them to measure on: "
            "add text, or give held-out text of its own"
        )
    windows = corpus.tokens[-count:][: max(1, evaluation.tokens // corpus.tokens.shape[1])]
    rest = replace(corpus, tokens=corpus.tokens[:-count], positions=corpus.positions[:-count])
    return rest, windows


def read_windows(evaluation: Evaluation, vocab_size: int, tokenizer: Any) -> NDArray[np.int32]:
    """Held-out windows [N, T] of `evaluation.text`."""
    assert evaluation.text is not None
    return held_out_windows(
        evaluation.text, tokenizer, length=evaluation.window, max_tokens=evaluation.tokens, vocab_size=vocab_size
    )


def _references(model_dir: Path, plan: Plan, out: Path, *, replace: bool) -> None:
    """What can be had without training: llama.cpp's own rounding, and the recipe's fit."""
    quantize(model_dir, make_plan(model_dir, Recipe.load(STOCK_RECIPE)), out / "stock", replace=replace)
    quantize(model_dir, plan, out / "fitted", replace=replace)


def _export(bench: Bench, *, replace: bool) -> None:
    for kind, path in bench.gguf.items():
        export_gguf(bench.packed[kind], path, replace=replace)
    export_hf(bench.packed["trained"], bench.out / "hf", replace=replace)


def _verify(bench: Bench) -> dict[str, Verification]:
    """Read every artifact back; MismatchError for one that does not hold what was packed."""
    results = {}
    paths = [*bench.gguf.items(), ("trained", bench.out / "hf")]
    for kind, path in paths:
        result = results[path.name] = verify(bench.packed[kind], path)
        if not result.exact:
            raise MismatchError(f"{path}: {result.summary()}: the export is not what was trained; please report this")
    return results


def decoded_model(teacher: TextModel, packed: PackedModel) -> TextModel:
    """A copy of the teacher that computes with the packed model's decoded weights, float32."""
    model = copy.deepcopy(teacher)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for planned in packed.plan:
            tensors[planned.name].copy_(packed.decode(planned.name))
    return model


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
    verifications = _verify(bench)
    models = {kind: decoded_model(bench.teacher, packed) for kind, packed in bench.packed.items()}
    comparisons = _compare(bench, models, torch.from_numpy(windows_NT).long(), progress)
    notes = [
        "Rows named “simulated” compute with the decoded weights in transformers, in float32.",
        "Intervals are 95%, from the spread between windows.",
    ]
    if not _has_llama():
        notes.append("llama-cpp-python is not installed, so no artifact was run in llama.cpp.")
    losses = read_losses(bench.out)
    result = Report(
        title=f"{model_name(bench.model_dir)}, {bench.plan.recipe.name}",
        model=model_name(bench.model_dir),
        format="Q4_0",
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
        notes=notes,
    )
    write_report(result, bench.out, replace=replace)
    return result


def compare(
    artifact: str | Path, original: str | Path, evaluation: Evaluation, progress: Progress | None = None
) -> Comparison:
    """Measure one artifact against the original on `evaluation.text`.

    artifact: a .gguf, run in llama.cpp; a packed model, simulated in transformers; or a transformers
    folder, run there.
    """
    progress, artifact = progress or Progress(), Path(artifact)
    progress.stage("Loading")
    teacher, tokenizer = load_model(original), load_tokenizer(original)
    windows_NT = read_windows(evaluation, teacher.config.vocab_size, tokenizer)
    with ExitStack() as stack:
        if artifact.suffix == ".gguf":
            candidate = _llama_candidate(stack.enter_context(LlamaCpp(artifact)))
        else:
            is_packed = (artifact / PACKED_FILE).is_file()
            model = decoded_model(teacher, PackedModel.open(artifact)) if is_packed else load_model(artifact)
            source = transformers_source(model)
            candidate = Candidate(source=source, runtime=transformers_runtime(), simulated=is_packed)
        progress.stage("Measuring")
        results = evaluate_many(
            transformers_source(teacher),
            {"artifact": candidate},
            torch.from_numpy(windows_NT).long(),
            on_progress=lambda done, total, kl: progress.part(done, total, f"KL {kl['artifact']:.4f}"),
        )
    return results["artifact"]


def _llama_candidate(llama: LlamaCpp) -> Candidate:
    return Candidate(source=llama.logits, runtime=llama.version, simulated=False)


def _has_llama() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def _compare(bench: Bench, models: dict[str, TextModel], windows_NT: Tensor, progress: Progress) -> list[ComparisonRow]:
    runtime = transformers_runtime()
    candidates = {
        kind: Candidate(source=transformers_source(model), runtime=runtime, simulated=True)
        for kind, model in models.items()
    }

    def on_progress(done: int, total: int, kl: dict[str, float]) -> None:
        progress.part(done, total, f"KL {kl['trained']:.4f}, stock {kl['stock']:.4f}")

    with ExitStack() as stack:
        if _has_llama():
            for kind, path in bench.gguf.items():
                candidates[f"{kind} gguf"] = _llama_candidate(stack.enter_context(LlamaCpp(path)))
        teacher = transformers_source(bench.teacher)
        results = evaluate_many(teacher, candidates, windows_NT, on_progress=on_progress)
    sizes = {kind: path.stat().st_size for kind, path in bench.gguf.items()}
    original = sum(t.numel() * 2 for _, t in stream_tensors(bench.model_dir, bench.plan.model))
    rows = [ComparisonRow(label="Original", kind="original", comparison=None, size_bytes=original)]
    for name, comparison in results.items():
        kind = name.removesuffix(" gguf")
        label = LABELS[kind] if comparison.simulated else f"{LABELS[kind]}, in llama.cpp"
        rows.append(ComparisonRow(label=label, kind=kind, comparison=comparison, size_bytes=sizes.get(kind)))  # type: ignore[arg-type]
    return rows


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
    paths = {"model.gguf": bench.gguf["trained"], "hf": bench.out / "hf" / "model.safetensors"}
    return [
        Artifact(
            name=str(path.relative_to(bench.out)),
            size_bytes=path.stat().st_size,
            sha256=file_sha256(path),
            verification=verifications[name].summary(),
        )
        for name, path in paths.items()
    ]


def _samples(bench: Bench, models: dict[str, TextModel], evaluation: Evaluation) -> list[Sample]:
    prompts = evaluation.prompts
    if not prompts:
        return []
    texts = {"Original": greedy(bench.teacher, bench.tokenizer, prompts, evaluation.sample_tokens)}
    for kind, model in models.items():
        texts[LABELS[kind]] = greedy(model, bench.tokenizer, prompts, evaluation.sample_tokens)
    return [
        Sample(prompt=prompt, continuations={label: lines[i] for label, lines in texts.items()})
        for i, prompt in enumerate(prompts)
    ]


def _provenance(model_dir: str | Path, data: str | Path | None) -> dict[str, Any]:
    return {
        "name": model_name(model_dir),
        "method": "quantization-aware training",
        "data": "the model's own samples" if data is None else str(data),
    }
