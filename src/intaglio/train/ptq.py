"""Quantization without training where activations have static scales: fit, calibrate on text, pack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from intaglio.packed.checkpoint import TextModel
from intaglio.plan.plan import Plan
from intaglio.train.corpus import Corpus
from intaglio.train.loop import Options, make_accelerator
from intaglio.train.pack import pack_model
from intaglio.train.student import build_student, calibrate_student


def quantize_calibrated(
    teacher: TextModel,
    plan: Plan,
    corpus: Corpus,
    out: str | Path,
    *,
    assets: str | Path,
    options: Options | None = None,
    provenance: dict[str, Any] | None = None,
    replace: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a PackedModel of `teacher` by the recipe's fit, its static scales calibrated on `corpus`.

    teacher: float32 text model; it stays as it is. on_progress: tokens done and in all. Raises as
    `prepare` and `calibrate` do.
    """
    accelerator = make_accelerator(options or Options(), None)
    student = build_student(teacher.to(accelerator.device), plan)
    calibrate_student(student, plan, corpus, accelerator, on_progress)
    record = {"method": f"fit {plan.recipe.fit}, calibrated on {corpus.source}", **(provenance or {})}
    pack_model(student, plan, out, assets=assets, provenance=record, replace=replace)
