"""A drafter for a quantized target, in one call: train it in floats, train it on its grids, export, measure, report.

A run folder holds

    float/       the drafter retrained for this target and kept in floats: run.json losses.jsonl packed/
    quantized/   the same, gone on with on the recipe's grids; absent where the recipe keeps floats
    packed/ hf/ model.gguf    the result and its files, each read back
    drafter.html drafter.json what was accepted: see `measure.drafter_report`
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.drafter.model import Shape, check_fits, load_drafter, new_drafter, target_config
from intaglio.drafter.train import place_target, train_drafter
from intaglio.errors import InputError, OutputError
from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.gguf.write import export_gguf
from intaglio.formats.table import format_of
from intaglio.measure.drafter_report import DrafterReport, Pair, measure_pair, write_report
from intaglio.measure.simulate import load_simulated
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import TextModel, load_model
from intaglio.packed.decoded import load_packed
from intaglio.packed.model import FILE_NAME as PACKED_FILE
from intaglio.packed.model import PackedModel
from intaglio.packed.origin import model_name
from intaglio.packed.outputs import check_output
from intaglio.packed.store import new_path
from intaglio.plan.hub import find_model
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.progress import Progress
from intaglio.runs.export import write_exact
from intaglio.runs.proof import Evaluation
from intaglio.runs.texts import held_out, training_text
from intaglio.train.corpus import Corpus
from intaglio.train.data.sources import Data, path_of
from intaglio.train.options import Options
from intaglio.train.pack import pack_model
from intaglio.train.run_folder import OF_THE_PROCESS, hold
from intaglio.train.sharding import (
    dismiss_processes,
    from_main,
    is_main,
    start_processes,
    wait_for_all,
    world_size,
)

FLOAT_RECIPE = "drafter"
FLOAT, QUANTIZED = "float", "quantized"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The texts that acceptance is measured on.

    They are `prompts` prompts of held-out text, each `prompt_tokens` long, and the `tokens` tokens that the target
    writes after each.
    """

    text: Data | None = None
    prompts: int = 32
    prompt_tokens: int = 32
    tokens: int = 96

    def __post_init__(self) -> None:
        if min(self.prompts, self.prompt_tokens) < 1 or self.tokens < 10:
            raise InputError(
                f"{self.prompts} prompts of {self.prompt_tokens} tokens, continued by {self.tokens}: expected one or "
                "more prompts of one or more tokens, and 10 or more behind them"
            )


def run(
    target_dir: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    data: Data | None,
    drafter_dir: str | Path | None = None,
    shape: Shape | None = None,
    original_dir: str | Path | None = None,
    texts: Texts | None = None,
    options: Options | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> DrafterReport | None:
    """Train a drafter for `target_dir` by `recipe` on `data`, and leave it, its files and the report in `out`.

    target_dir: a packed model, or a float checkpoint. data: see `train.corpus.load_corpus`; None lets the target
    write it. drafter_dir: a float drafter to begin with; None for a new one of this shape. original_dir: the float
    checkpoint that the target was made from: with it and `drafter_dir` the report has the pair that both were.
    Of several processes, as torchrun starts them, the main one has the report, the others return None.
    Raises ConfigError for models that do not fit, CorpusError for text too short, MismatchError for a file that
    does not hold what was trained.
    """
    progress, texts, out = progress or Progress(), texts or Texts(), Path(out)
    check_output(out, [target_dir, drafter_dir, original_dir, path_of(data), path_of(texts.text)])
    device = start_processes()
    progress = progress if is_main() else Progress()
    target_dir = find_model(target_dir, progress)
    drafter_dir = None if drafter_dir is None else find_model(drafter_dir, progress)
    original_dir = None if original_dir is None else find_model(original_dir, progress)
    with hold(out), progress.logged(out) if is_main() else nullcontext():
        return _run(
            target_dir, recipe, out, data, drafter_dir, shape, original_dir, texts, options, resume, progress, device
        )


def _run(
    target_dir: str | Path,
    recipe: Recipe,
    out: Path,
    data: Data | None,
    drafter_dir: str | Path | None,
    shape: Shape | None,
    original_dir: str | Path | None,
    texts: Texts,
    options: Options | None,
    resume: bool,
    progress: Progress,
    device: torch.device,
) -> DrafterReport | None:
    if (
        not resume
        and out.exists()
        and (not out.is_dir() or any(path.name not in OF_THE_PROCESS for path in out.iterdir()))
    ):
        raise OutputError(f"{out}: is not empty: choose another folder, or continue the run in it with --resume")
    progress.stage("Loading the target")
    target, identity = open_target(target_dir)
    before = None if drafter_dir is None else load_drafter(drafter_dir)
    first = before if before is not None else new_drafter(target, shape or Shape.official(target.config.to_dict()))
    first = from_main(first)
    check_fits(first, target)
    floats = replace(Recipe.load(FLOAT_RECIPE), drafter=recipe.drafter, schedule=recipe.schedule)
    plans = {FLOAT: make_plan(first.config.to_dict(), floats)}
    plans |= {QUANTIZED: make_plan(first.config.to_dict(), recipe)} if recipe.name != FLOAT_RECIPE else {}
    for plan in plans.values():
        format_of(plan).check(plan, Path(target_dir))  # an export would refuse it only after training
    target = place_target(target, device)
    progress.stage("Reading text")
    corpus, prompts = _texts(target, plans[FLOAT], load_tokenizer(target_dir), data, texts, progress)
    name = f"{model_name(target_dir)}-assistant"
    record = {"name": name, "method": "drafter, trained", "data": str(data or "its own")}
    trained: dict[str, TextModel] = {}
    for name, plan in plans.items():
        progress.stage(f"Training {name}")
        how: dict[str, Any] = {"target_digest": identity, "options": options, "resume": resume}
        latents = train_drafter(target, first, plan, corpus, out / name, progress=progress, **how)
        pack_model(latents, out / name / "packed", assets=target_dir, provenance=record, replace=resume)
        wait_for_all()  # the main process writes, and all read it back
        first = trained[name] = load_packed(PackedModel.open(out / name / "packed"))
    main, sharded = is_main(), world_size() > 1
    dismiss_processes()
    if not main:
        return None
    target = open_target(target_dir)[0] if sharded else target
    progress.stage("Exporting")
    _export(PackedModel.open(out / list(plans)[-1] / "packed"), out, replace=resume)
    report = _measure(_pairs(target, original_dir, before, trained), prompts, texts, device, progress)
    write_report(report, out, replace=resume)
    return report


def open_target(path: str | Path) -> tuple[TextModel, str]:
    """A packed model as it computes, or a float checkpoint, and its identity: a hash of the packed model, or a path."""
    path = Path(path)
    target_config(path)  # refuses what cannot be a target
    if not (path / PACKED_FILE).is_file():
        return load_model(path), str(path.resolve())
    packed = PackedModel.open(path)
    packed.check()
    return load_simulated(packed), packed.sha256()


def _texts(
    target: TextModel, plan: Plan, tokenizer: Any, data: Data | None, texts: Texts, progress: Progress
) -> tuple[Corpus, Tensor]:
    """Training text, and prompts int64 [N, P] that it does not hold."""
    if plan.recipe.schedule.assistant_only:
        raise InputError(
            "schedule.assistant_only: a drafter guesses every token of its target: --set schedule.assistant_only=false"
        )
    corpus = training_text(plan, data, tokenizer, target, progress)
    windows = Evaluation(text=texts.text, tokens=texts.prompts * texts.prompt_tokens, window=texts.prompt_tokens)
    corpus, windows_NT = held_out(corpus, windows, plan, tokenizer)
    return corpus, torch.from_numpy(windows_NT[: texts.prompts, : texts.prompt_tokens]).long()


def _export(packed: PackedModel, out: Path, *, replace: bool) -> None:
    """Put the result into `out`: packed model, transformers folder, and a GGUF where its grids allow; each is read
    back, and MismatchError raised for one that does not hold what was trained."""
    with new_path(out / "packed", replace=replace) as temporary:
        shutil.copytree(packed.path, temporary)
    write_exact(export_hf, packed, out / "hf", replace=replace)
    if not packed.plan.mobile:
        write_exact(export_gguf, packed, out / "model.gguf", replace=replace)


def _pairs(
    target: TextModel, original_dir: str | Path | None, before: TextModel | None, trained: dict[str, TextModel]
) -> list[tuple[str, str, Any, Any]]:
    """Names and models of the pairs that can be compared, the original pair first."""
    pairs: list[tuple[str, str, Any, Any]] = []
    if before is not None:
        if original_dir is not None:
            original = load_model(original_dir)
            check_fits(before, original)
            pairs.append(("original", "original", original, before))
        pairs.append(("target", "original", target, before))
    return pairs + [("target", f"retrained, {name}", target, drafter) for name, drafter in trained.items()]


def _measure(
    pairs: list[tuple[str, str, Any, Any]], prompts: Tensor, texts: Texts, device: torch.device, progress: Progress
) -> DrafterReport:
    progress.stage("Measuring acceptance")
    measured: list[Pair] = []
    written: dict[int, dict[bool, Tensor]] = {}
    for number, (target_name, drafter_name, target, drafter) in enumerate(pairs, 1):
        for _, _, other, _ in pairs:
            other.to(device if other is target else "cpu")  # one target at a time: a second may not fit on a GPU
        drafter.to(device)
        by_target = written.setdefault(id(target), {})
        pair = measure_pair(target_name, drafter_name, target, drafter, prompts, texts.tokens, by_target)
        measured.append(pair)
        progress.part(number, len(pairs), f"{pair.best.length:.2f} tokens a round")
    return DrafterReport(tuple(measured), prompts=len(prompts), tokens=texts.tokens)
