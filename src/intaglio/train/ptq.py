"""Quantization without training that looks at text: GPTQ, or static scales to calibrate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from intaglio.packed.checkpoint import TextModel
from intaglio.plan.plan import Plan
from intaglio.train.corpus import Corpus
from intaglio.train.loop import Options, dtype_of
from intaglio.train.pack import pack_model
from intaglio.train.sharding import start_processes
from intaglio.train.student import build_student, calibrate_student, gptq_start


def quantize_on_text(
    teacher: TextModel,
    plan: Plan,
    corpus: Corpus,
    out: str | Path,
    *,
    assets: str | Path,
    gptq: bool = False,
    options: Options | None = None,
    provenance: dict[str, Any] | None = None,
    replace: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a PackedModel of `teacher` by the recipe's fit, its static scales, if any, calibrated on `corpus`.

    teacher: float32 text model; it stays as it is, on a GPU if there is one.
    gptq: let GPTQ choose the codes, on the schedule's share of the corpus. on_progress: tokens done and in all.
    Raises as `prepare` and `calibrate` do.
    """
    options = options or Options()
    device = start_processes()
    latents = build_student(teacher.to(device), plan, dtype=dtype_of(options))
    method = f"fit {plan.recipe.fit}"
    if gptq:
        gptq_start(latents, teacher, corpus, device)
        method += f", GPTQ on {corpus.source}"
    if plan.static_scales:
        calibrate_student(latents, corpus, device, on_progress)
        method += f", calibrated on {corpus.source}"
    record = {"method": method, **(provenance or {})}
    pack_model(latents, out, assets=assets, provenance=record, replace=replace)
