"""Formats: what a recipe's grids are shipped as, and what they are measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intaglio.export.gguf import check_exportable, check_grids, export_gguf
from intaglio.export.hf import export_hf
from intaglio.export.litert import check_litert
from intaglio.export.mobile import export_mobile
from intaglio.numerics.grid import Q4_0, Q4_0_FREE, Q4_0_POSITIVE, Q6_K, Q6_K_FREE, Q8_0, Q8_0_FREE, Grid
from intaglio.plan.plan import Plan
from intaglio.plan.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Export:
    """A file or folder that a run leaves.

    name: in the run folder. kind: of the packed model that it is made from, "trained" or "stock".
    runs: False for an artifact whose measurement would repeat another's. on_device: whether `write` takes a device.
    """

    name: str
    kind: str
    write: Callable[..., Any]
    runs: bool = True
    on_device: bool = False


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a plan ends.

    label: what the report calls the rounding. stock_label, stock_recipe: what anyone's tool would do
    without training, for a recipe. exports: what a run writes. check: raises before training what an
    export would raise after it, for a plan and the source model's folder.
    """

    label: str
    stock_label: str
    stock_recipe: Callable[[Recipe], Recipe]
    exports: tuple[Export, ...]
    check: Callable[[Plan, Path], None]


def _check_gguf(plan: Plan, model_dir: Path) -> None:
    check_grids(plan)
    check_exportable(plan.model, model_dir)


# What llama.cpp's quantizer writes into the tensor types of portable grids.
STOCK_GRIDS: dict[Grid, Grid] = {Q4_0: Q4_0_FREE, Q6_K: Q6_K_FREE, Q8_0: Q8_0_FREE}


def _llama_quantize(recipe: Recipe) -> Recipe:
    """The same tensor types as the recipe's, filled as llama.cpp's own quantizer would."""
    rules = tuple(replace(rule, grid=STOCK_GRIDS.get(rule.grid, rule.grid)) for rule in recipe.rules)
    summary = "What llama-quantize writes, bit for bit; the reference that training is measured against"
    return replace(recipe, name="q4_0-stock", summary=summary, fit="stock", rules=rules)


def _absmax(recipe: Recipe) -> Recipe:
    return replace(recipe, name=f"{recipe.name}-absmax", fit="absmax")


HF = Export(name="hf", kind="trained", write=export_hf, runs=False, on_device=True)
GGUF = Format(
    label="Q4_0",
    stock_label="Stock rounding",
    stock_recipe=_llama_quantize,
    exports=(
        Export(name="model.gguf", kind="trained", write=export_gguf),
        Export(name="stock.gguf", kind="stock", write=export_gguf),
        HF,
    ),
    check=_check_gguf,
)
MOBILE = Format(
    label="mobile absmax",
    stock_label="Absmax rounding",
    stock_recipe=_absmax,
    exports=(
        Export(name="mobile", kind="trained", write=export_mobile),
        Export(name="stock-mobile", kind="stock", write=export_mobile),
    ),
    check=lambda plan, model_dir: None,
)


LITERT = Format(
    label="absmax for LiteRT",
    stock_label="Absmax rounding",
    stock_recipe=_absmax,
    exports=(HF,),  # the bundle needs an environment
    check=lambda plan, model_dir: check_litert(plan),
)


def format_of(plan: Plan) -> Format:
    """The format that holds the plan's grids."""
    if not plan.mobile:
        return GGUF
    return LITERT if any(tensor.grid == Q4_0_POSITIVE for tensor in plan) else MOBILE
