"""Fine-tuning of a model that is quantized already: from a packed model to a packed model, on its grids all along.

A run folder holds what `runs.train.run` leaves of the trained model, without references: run.json,
losses.jsonl, checkpoints, packed/, the files of its format, and finetune.json with what was measured
before and after.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from intaglio.errors import InputError
from intaglio.formats.table import format_of
from intaglio.measure.evaluate import Candidate, evaluate_many, transformers_runtime, transformers_source
from intaglio.measure.metrics import Comparison
from intaglio.measure.simulate import load_simulated
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import TextModel, load_model
from intaglio.packed.decoded import load_packed
from intaglio.packed.model import PackedModel
from intaglio.packed.outputs import check_output
from intaglio.packed.store import new_path, scratch_folder
from intaglio.packed.write import join_packed
from intaglio.plan.family import check_runs_alone
from intaglio.plan.hub import find_model
from intaglio.progress import Progress
from intaglio.runs.export import make_files
from intaglio.runs.proof import Evaluation
from intaglio.runs.texts import held_out, training_text
from intaglio.train.data.sources import Data, path_of, record_of
from intaglio.train.loop import run_identity, train
from intaglio.train.options import Options
from intaglio.train.pack import pack_model
from intaglio.train.run_folder import check_run_dir, hold
from intaglio.train.start import plan_to_go_on

RESULT = "finetune.json"


@dataclass(frozen=True)
class Finetuned:
    """Both against the teacher where there is one, else against the model that training began with."""

    before: Comparison
    after: Comparison
    files: tuple[Path, ...]


def finetune(
    packed_dir: str | Path,
    out: str | Path,
    *,
    data: Data | None,
    teacher_dir: str | Path | None = None,
    overrides: tuple[str, ...] | list[str] = (),
    evaluation: Evaluation | None = None,
    options: Options | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Finetuned:
    """Go on training the packed model on `data`, and leave a packed model and its files in `out`.

    overrides: of the recipe that the model was packed by. teacher_dir: a checkpoint to learn from, for
    schedule.loss = "kl"; with "cross_entropy" the text itself is learned. Towers beside the text model go along
    as they are. Raises InputError for a loss without what it needs, MismatchError for a file that does not
    hold what was trained.
    """
    progress, evaluation, out = progress or Progress(), evaluation or Evaluation(), Path(out)
    check_output(out, [packed_dir, path_of(data), teacher_dir, path_of(evaluation.text)])
    teacher_dir = None if teacher_dir is None else find_model(teacher_dir, progress)
    with hold(out), progress.logged(out):
        return _finetune(
            find_model(packed_dir, progress), out, data, teacher_dir, overrides, evaluation, options, resume, progress
        )


def _finetune(
    packed_dir: str | Path,
    out: Path,
    data: Data | None,
    teacher_dir: str | Path | None,
    overrides: tuple[str, ...] | list[str],
    evaluation: Evaluation,
    options: Options | None,
    resume: bool,
    progress: Progress,
) -> Finetuned:
    progress.stage("Loading the packed model")
    start = PackedModel.open(packed_dir)
    start.check()  # now, and not when towers are copied after all training
    check_runs_alone(start.plan.model, packed_dir)
    plan = plan_to_go_on(start, overrides)
    _check_loss(plan.recipe.schedule.loss, teacher_dir, data)
    check_run_dir(out, run_identity(plan, start, options), resume)
    format_of(plan).check(plan, start.path)
    tokenizer, model = load_tokenizer(start.path), load_packed(start)
    teacher = None if teacher_dir is None else load_model(teacher_dir)
    vocabulary = plan.model.config["vocab_size"]
    if teacher is not None and teacher.config.vocab_size != vocabulary:
        raise InputError(
            f"{teacher_dir}: has a vocabulary of {teacher.config.vocab_size}, {start.path} one of {vocabulary}: "
            "expected a teacher with the same tokens"
        )
    progress.stage("Reading text")
    corpus = training_text(plan, data, tokenizer, teacher if teacher is not None else model, progress)
    corpus, windows_NT = held_out(corpus, evaluation, plan, tokenizer)
    progress.stage("Training")
    latents = train(
        model,
        plan,
        corpus,
        out,
        teacher=teacher,
        start=start,
        options=options,
        resume=resume,
        progress=progress,
        held_out=windows_NT,
    )
    progress.stage("Packing and exporting")
    record = {**start.provenance, "method": "fine-tuned on the grid", **record_of(data), "from": start.sha256()}
    with scratch_folder(out / "text") as folder:
        pack_model(latents, folder / "packed", assets=start.path, provenance=record)
        join_packed(PackedModel.open(folder / "packed"), start, out / "packed", replace=resume)
    del latents
    packed = PackedModel.open(out / "packed")
    verified = make_files(packed, out, "trained", replace=resume)
    progress.stage("Measuring")
    results = _measure(start, packed, None if teacher is None else teacher.to("cpu"), windows_NT, progress)
    with new_path(out / RESULT, replace=True, internal=True) as temporary:
        temporary.write_text(json.dumps({k: v.to_dict() for k, v in results.items()}, indent=2) + "\n", "utf-8")
    return Finetuned(results["before"], results["after"], tuple(found.artifact for found in verified.values()))


def _measure(
    start: PackedModel,
    packed: PackedModel,
    teacher: TextModel | None,
    windows_NT: NDArray[np.int32],
    progress: Progress,
) -> dict[str, Comparison]:
    """Both against the teacher, or without one against the model that training began with."""
    before, after = (load_simulated(of) for of in (start, packed))
    candidates = {
        name: Candidate(source=transformers_source(model), runtime=transformers_runtime(), simulated=True)
        for name, model in (("before", before), ("after", after))
    }
    return evaluate_many(
        transformers_source(before if teacher is None else teacher),
        candidates,
        torch.from_numpy(windows_NT).long(),
        progress,
    )


def _check_loss(loss: str, teacher_dir: str | Path | None, data: Data | None) -> None:
    if loss == "kl" and teacher_dir is None:
        raise InputError(
            "schedule.loss = 'kl' needs a teacher, and a packed model has no original: give one with --teacher DIR, or "
            "learn the text itself with --set schedule.loss=cross_entropy"
        )
    if loss == "cross_entropy" and teacher_dir is not None:
        raise InputError("schedule.loss = 'cross_entropy' has no use for a teacher: leave out --teacher")
    if loss == "cross_entropy" and data is None:
        raise InputError("schedule.loss = 'cross_entropy' learns a text: give one with --data")
