"""A finished run on the disk: its packed models by kind, their files, and the references beside the trained one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from intaglio.errors import IntaglioError
from intaglio.formats.table import Export, Format, format_of
from intaglio.numerics.device import device_for
from intaglio.packed.checkpoint import TextModel
from intaglio.packed.model import PackedModel
from intaglio.plan.files import without_folders
from intaglio.plan.plan import Plan, make_plan
from intaglio.progress import Progress
from intaglio.runs.export import make_files
from intaglio.train.corpus import Corpus
from intaglio.train.layerwise import quantize_on_text
from intaglio.train.options import Options
from intaglio.train.quantize import quantize

# kind -> folder of the run, in the order of the report
PACKED = {"stock": "stock", "fitted": "fitted", "start": "start", "trained": "packed"}
FAILURES = (IntaglioError, torch.OutOfMemoryError)  # of references and measurements, which take no run down
FIT_LABELS = {"mse": "MSE fit", "stock": "Stock fit", "absmax": "Absmax fit"}
REFERENCES = {"none": (), "stock": ("stock",), "all": ("stock", "fitted", "start")}


@dataclass(frozen=True)
class Bench:
    """A finished run: the original's folder, and the packed models made of it, by kind.

    failures: why a reference that was asked for is missing, by kind. device: of the measurements. given: the
    original, if it is in memory already.
    """

    model_dir: Path
    out: Path
    tokenizer: Any
    packed: dict[str, PackedModel]
    failures: dict[str, str] = field(default_factory=dict)
    device: torch.device = field(default_factory=device_for)
    given: TextModel | None = None

    @classmethod
    def open(cls, model_dir: str | Path, out: Path, tokenizer: Any, kinds: Iterable[str], **how: Any) -> Bench:
        """A run's folder with the packed models of these kinds. Raises ConfigError as `PackedModel.open` does."""
        packed = {kind: PackedModel.open(out / folder) for kind, folder in PACKED.items() if kind in kinds}
        return cls(Path(model_dir), out, tokenizer, packed, **how)

    @property
    def plan(self) -> Plan:
        return self.packed["trained"].plan

    @property
    def format(self) -> Format:
        return format_of(self.plan)

    @property
    def labels(self) -> dict[str, str]:
        fit = FIT_LABELS[self.plan.recipe.fit]
        return {"stock": self.format.stock_label, "fitted": fit, "start": "GPTQ start", "trained": "QAT"}

    def opened(self, kind: str) -> Bench:
        """The bench with the packed model of one more kind."""
        packed = self.packed | {kind: PackedModel.open(self.out / PACKED[kind])}
        return dataclasses.replace(self, packed={kind: packed[kind] for kind in PACKED if kind in packed})

    def with_those_there(self, references: str) -> Bench:
        """The bench with the references that are in the folder; one that cannot be opened is a failure."""
        bench = self
        for kind in REFERENCES[references]:
            if (self.out / PACKED[kind]).is_dir():
                try:
                    bench = bench.opened(kind)
                except FAILURES as error:
                    bench = bench.failed(kind, error)
        return bench

    def failed(self, kind: str, error: Exception) -> Bench:
        """The bench without this kind, and why."""
        packed = {other: model for other, model in self.packed.items() if other != kind}
        return dataclasses.replace(self, packed=packed, failures=self.failures | {kind: failure_of(error)})

    def path(self, export: Export) -> Path:
        return self.out / export.name


def with_references(
    bench: Bench,
    references: str,
    corpus: Corpus,
    options: Options | None,
    progress: Progress,
    *,
    replace: bool,
) -> Bench:
    """The bench with the untrained models, each with its files; of one that fails the reason is kept.

    "start" is what GPTQ alone gives; without GPTQ training began with the recipe's fit.
    """
    schedule = bench.plan.recipe.schedule
    for kind in REFERENCES[references]:
        if kind in bench.failures or (kind == "start" and not schedule.gptq_tokens):
            continue
        try:
            if kind == "start" and "layers" not in schedule.stages:
                bench = bench.opened(kind)  # training left it
                continue
            progress.stage(f"Making {bench.labels[kind]}")
            _make_reference(bench, kind, corpus, options, replace=replace)
            bench = bench.opened(kind)
            make_files(bench.packed[kind], bench.out, kind, replace=replace, device=bench.device)
        except FAILURES as error:
            bench = bench.failed(kind, error)
    return bench


def _make_reference(bench: Bench, kind: str, corpus: Corpus, options: Options | None, *, replace: bool) -> None:
    plan, path = bench.plan, bench.out / PACKED[kind]
    if kind == "stock":
        plan = make_plan(bench.model_dir, format_of(plan).stock_recipe(plan.recipe))
    if plan.static_scales or kind == "start":
        gptq, device = kind == "start", bench.device
        quantize_on_text(
            bench.model_dir, plan, corpus, path, gptq=gptq, options=options, device=device, replace=replace
        )
    else:
        quantize(bench.model_dir, plan, path, replace=replace, device=bench.device)


def failure_of(error: Exception) -> str:
    """The reason for a person, in a line, without paths of this machine."""
    return without_folders(str(error).splitlines()[0]) if str(error) else type(error).__name__
