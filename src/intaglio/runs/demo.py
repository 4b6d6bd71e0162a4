"""The demo: the bundled tiny Gemma 4 goes the whole way on two CPU cores."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any

import torch

from intaglio.errors import OutputError, RecipeError
from intaglio.measure.drafter_report import DrafterReport
from intaglio.measure.report import Report
from intaglio.packed.outputs import remove
from intaglio.plan.files import read_json
from intaglio.plan.recipe import Recipe
from intaglio.progress import Progress
from intaglio.runs.drafter import Texts
from intaglio.runs.drafter import run as run_drafter
from intaglio.runs.proof import Evaluation
from intaglio.runs.train import run
from intaglio.tiny import DRAFTER_DIR, HELDOUT_TEXT, MODEL_DIR, TRAIN_TEXT
from intaglio.train.options import Options
from intaglio.train.run_folder import LOCK_FILE, RUN_FILE, hold

# Short runs for a small machine: GPTQ brings the codes near, small batches make more steps of the rest, and there is
# no time for a long tail, nor for norm gains to settle after large steps.
SHORT = {
    "batch_size": 4,
    "sequence_length": 256,
    "gptq_tokens": 32_768,
    "scale_lr": 1e-3,
    "float_lr": 1.0,
    "frozen_tail": 0.1,
    "tail_lr": 0.5,
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "q4_0": SHORT | {"tokens": 143_360, "lr": 1e-4},
    "mobile": SHORT | {"tokens": 163_840, "lr": 5e-4},
}
# The drafter's two stages, in floats and on its grids, share this.
DRAFTER_SCHEDULE = {"tokens": 81_920, "batch_size": 4, "sequence_length": 256, "lr": 5e-4}
# Names of what a run leaves; a folder with anything else is not removed.
IN_A_RUN = (
    r"(run|report|losses|speed|codes|heldout|model|stock)\.\w+"
    r"|checkpoints|packed|stock|fitted|start|hf|mobile|stock-mobile|drafter|\..*"
)
PROMPTS = (
    "It was a bright morning, and the whole family",
    "The captain looked out over the sea and",
    "And the king said to the people,",
)


def run_demo(
    out: str | Path, *, recipe: str = "q4_0", replace: bool = False, progress: Progress | None = None
) -> Report:
    """Train, export, verify and measure the bundled model in `out`."""
    if recipe not in SCHEDULES:
        raise RecipeError(f"the demo has no schedule for recipe {recipe!r}: expected {' or '.join(SCHEDULES)}")
    if Path(out).exists():
        _remove_run(Path(out), replace)
    report = run(
        MODEL_DIR,
        Recipe.load(recipe).with_schedule(**SCHEDULES[recipe]),
        out,
        data=TRAIN_TEXT,
        evaluation=Evaluation(text=HELDOUT_TEXT, tokens=12288, window=256, prompts=PROMPTS),
        options=Options(precision=faster_precision(), compiled=False, eval_every=35),
        progress=progress,
    )
    assert report is not None, "one process has the report"
    return report


def _remove_run(out: Path, replace: bool) -> None:
    """Remove an earlier demo. OutputError for anything else, and for a run that somebody works in."""
    if not (replace and (out / RUN_FILE).is_file()):
        raise OutputError(f"{out}: already exists: remove it, name another with --out, or give --replace")
    others = sorted(path.name for path in out.iterdir() if not re.fullmatch(IN_A_RUN, path.name))
    if others or not {"plan", "corpus"} <= set(read_json(out / RUN_FILE)):
        raise OutputError(f"{out}: holds {others[0] if others else RUN_FILE}, which is no demo's: remove it yourself")
    with hold(out):
        for path in out.iterdir():
            if path.name != LOCK_FILE:
                remove(path)


def run_demo_drafter(out: str | Path, *, recipe: str = "q4_0", progress: Progress | None = None) -> DrafterReport:
    """Train the bundled drafter again for the model that `run_demo` has just left in `out`."""
    report = run_drafter(
        Path(out) / "packed",
        Recipe.load(f"drafter-{recipe}").with_schedule(**DRAFTER_SCHEDULE),
        Path(out) / "drafter",
        data=TRAIN_TEXT,
        drafter_dir=DRAFTER_DIR,
        original_dir=MODEL_DIR,
        texts=Texts(text=HELDOUT_TEXT),
        options=Options(precision=faster_precision(), compiled=False),
        progress=progress,
    )
    assert report is not None, "one process has the report"
    return report


def faster_precision() -> str:
    """bf16 where this machine multiplies bfloat16 faster than float32; many processors have no such instruction."""
    square = torch.ones(512, 512)
    seconds = {"no": math.inf, "bf16": math.inf}
    for _ in range(5):
        for name, matrix in {"no": square, "bf16": square.bfloat16()}.items():
            began = time.perf_counter()
            matrix @ matrix
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return min(seconds, key=lambda name: seconds[name])
