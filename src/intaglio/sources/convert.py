"""Converts a checkpoint that someone else trained on a grid to a PackedModel with the trained codes.

Every tensor is looked into first (`inspect`). Nothing is written before it is clear that every trained block
comes over exactly, or the caller has said `requantize`; then just the blocks that do not are fitted anew, and
the packed model says so in its provenance, which exports and reports carry on.

Tensors without a trained grid are no such loss. An embedding that training left in floats is fitted to what
the recipe puts it on, Q6_K as in official files, or kept as floats if the recipe says so; the result says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as dataclass_replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import ConfigError, QualityError, RecipeError
from intaglio.formats.mobile.read_packed import import_mobile
from intaglio.numerics.exact import solve
from intaglio.numerics.grid import BlockGrid, FloatGrid, Quantized
from intaglio.numerics.identify import NAMES
from intaglio.packed.identity import look
from intaglio.packed.model import PackedModel
from intaglio.packed.origin import provenance_of
from intaglio.packed.write import write_packed
from intaglio.plan.hub import TEXTS, find_model
from intaglio.plan.plan import Plan, PlannedTensor, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.sources.inspect import Verdict, examine
from intaglio.sources.match import SHOWN, assets_of, in_file_order, in_rows, match, model_of, recipe_of
from intaglio.sources.open import open_source
from intaglio.sources.recode import coded
from intaglio.sources.restore import has_kept, restore
from intaglio.sources.stored import DEQUANTIZED, Source, Stored
from intaglio.train.quantize import fit_tensor

FITTED_TYPES = ("Q6_K", "Q8_0")  # on which a tensor without a trained grid is put without further ado
METHODS = {
    "floats": "recovered from a float checkpoint",
    "w4a16": "taken from compressed-tensors W4A16",
    "gguf": "taken from a GGUF",
    "mobile": "imported from the mobile format",
}


@dataclass(frozen=True)
class _Step:
    """Treatment of one tensor: its codes are taken or solved for, its values kept as floats, or it is fitted.

    lossy: blocks whose trained codes or scales do not come over.
    """

    tensor: PlannedTensor
    stored: Stored
    verdict: Verdict
    action: str  # "codes", "solved", "values" or "fit"
    lossy: int = 0


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Result of `convert`.

    kind: of the source. grids: how many tensors lay on each. blocks, recovered: of tensors whose codes were
    taken. fitted: tensors without a trained grid, and the grid that the recipe gave them. rounded: tensors kept as
    floats, and how many of their values changed. lossy: tensors, and how many of their trained blocks changed.
    left_out: tensors of the source that the model has no use for.
    """

    packed: PackedModel
    kind: str
    grids: dict[str, int] = field(default_factory=dict)
    blocks: int = 0
    recovered: int = 0
    fitted: dict[str, str] = field(default_factory=dict)
    rounded: dict[str, int] = field(default_factory=dict)
    lossy: dict[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        shared = {name: value for name, value in vars(self).items() if name not in ("packed", "left_out")}
        return shared | {"recipe": self.packed.plan.recipe.name, "left_out": list(self.left_out)}


def convert(
    path: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    overrides: Sequence[str] = (),
    config: str | Path | None = None,
    requantize: bool = False,
    text_only: bool = False,
    replace: bool = False,
    on_tensor: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Conversion:
    """Write the PackedModel `out` of a trained checkpoint: floats on a grid, mobile, W4A16 or GGUF.

    recipe: None takes the grids that are found. overrides: of its keys, or of the found recipe's. config: folder of
    config.json and tokenizer, for a source without. on_tensor: tensors done, in all (each counts twice: looked into,
    and written), and a name.
    Raises QualityError for trained blocks that do not come over exactly, unless `requantize`; ConfigError for a
    source that is damaged, of another model, or on no grid; RecipeError for a recipe that cannot hold it.
    """
    source = open_source(path)
    if source.kind == "packed":
        raise look(source.path).error()
    if source.kind == "mobile":
        return _imported(source, Path(out), recipe, text_only, replace)
    if recipe is None and not overrides and config is None and source.kind == "floats" and has_kept(source.path):
        kept = restore(source, Path(out), text_only=text_only, replace=replace, on_tensor=on_tensor)
        return _whole(kept, source.kind)
    assets = assets_of(source, None if config is None else find_model(config, files=TEXTS))
    model = model_of(source, assets, text_only)
    found, left_out = match(source, model, text_only=text_only, requantize=requantize)
    slices = {tensor.name: tensor.slice_columns for tensor in model.tensors}
    verdicts = {}
    for done, name in enumerate(in_file_order(source, found)):
        on_tensor(done, 2 * len(found), name)
        verdicts[name] = examine(found[name], slices.get(name))
    trained = any(verdict.on_grid for verdict in verdicts.values())
    if not trained and (recipe is None or config is None):
        raise ConfigError(f"{source.path}: no tensor lies on a grid: {_advice(source, config)}")
    chosen = recipe if recipe is not None else recipe_of(model, found, verdicts)
    if overrides:
        chosen = Recipe.from_toml(chosen.to_toml(), source=f"recipe {chosen.name}", overrides=list(overrides))
    plan = make_plan(model, chosen)
    steps = [_step(plan[name], found[name], verdicts[name], trained) for name in verdicts]
    lossy = {step.tensor.name: step.lossy for step in steps if step.lossy}
    if lossy and not requantize:
        raise QualityError(_unrecovered(source.path, steps))
    taken = [step for step in steps if step.action == "codes"]
    result = Conversion(
        packed=PackedModel(Path(out), plan, {}),
        kind=source.kind,
        grids=_counts(verdicts, steps),
        blocks=sum(step.verdict.tally.all for step in taken),
        recovered=sum(step.verdict.tally.all - step.lossy for step in taken),
        fitted={step.tensor.name: step.tensor.grid.name for step in steps if step.action == "fit" and not step.lossy},
        lossy=lossy,
        left_out=left_out,
    )
    _write(result, source, assets, steps, on_tensor, replace)
    return dataclass_replace(result, packed=PackedModel.open(out))


def _write(
    result: Conversion,
    source: Source,
    assets: Path,
    steps: list[_Step],
    on_tensor: Callable[[int, int, str], None],
    replace: bool,
) -> None:
    """Write the packed model, and count into `result.rounded` values of floats that change."""
    plan, total = result.packed.plan, 2 * len(steps)
    with write_packed(
        result.packed.path, plan, assets=assets, provenance=_provenance(source, result), replace=replace
    ) as writer:
        writer.leave_static_off()
        for done, step in enumerate(steps, len(steps)):
            on_tensor(done, total, step.tensor.name)
            for rows, value in _values(step, plan, source.kind, result.rounded):
                writer.add(step.tensor.name, value, rows)
            step.stored.reader.close()
    on_tensor(total, total, "")


def _imported(source: Source, out: Path, recipe: Recipe | None, text_only: bool, replace: bool) -> Conversion:
    if text_only:
        raise ConfigError(f"{source.path}: a mobile folder is taken as a whole: say --text-only when you export it")
    if recipe is not None:
        raise RecipeError(f"{source.path}: a mobile folder says itself which grids it has: leave out the recipe")
    return _whole(import_mobile(source.path, out, replace=replace), source.kind)


def _whole(packed: PackedModel, kind: str) -> Conversion:
    """The conversion of a source that says itself which codes and scales it has: all of them came over."""
    on_grids = [(t.spec, t.grid) for t in packed.plan.everything if isinstance(t.grid, BlockGrid)]
    count = sum(torch.Size(spec.shape).numel() // grid.block_size for spec, grid in on_grids)
    names = [grid.name for _, grid in on_grids]
    grids = {name: names.count(name) for name in dict.fromkeys(names)}
    return Conversion(packed=packed, kind=kind, grids=grids, blocks=count, recovered=count)


def _advice(source: Source, config: str | Path | None) -> str:
    """The way on from a source of floats that were not trained to a grid."""
    if source.path.is_dir() and config is None:
        return f"fit one with `intaglio quantize {source.path} --out packed`, or train to one"
    return "say which one to fit it to, for example with --recipe q4_0"


def _step(tensor: PlannedTensor, stored: Stored, verdict: Verdict, of_trained: bool = True) -> _Step:
    """Treatment of a tensor, and the number of its trained blocks that this changes."""
    grid, tally = tensor.grid, verdict.tally
    if isinstance(grid, FloatGrid):
        return _Step(tensor, stored, verdict, "values")
    if grid.portable and verdict.in_blocks and grid.ggml_type == "Q4_0" and not verdict.portable:
        raise RecipeError(
            f"{tensor.name}: the recipe's grid {grid.name} holds scales of {grid.step_bits} significant bits and "
            "blocks with a code -8, and this tensor has others: use q4_0-free"
        )
    if verdict.in_blocks and grid.ggml_type == "Q4_0":
        return _Step(tensor, stored, verdict, "codes", tally.all - tally.ships)
    if verdict.on_grid and grid.ggml_type == stored.kind:
        return _Step(tensor, stored, verdict, "codes")
    rows = verdict.hypothesis if verdict.hypothesis is not None and verdict.hypothesis.by_row else None
    if rows is not None and (grid.code_min, grid.block_size) == (rows.rule.code_min, rows.width):
        return _Step(tensor, stored, verdict, "codes", tally.all - tally.recovered)
    if stored.is_float and not verdict.on_grid and _solved(stored, grid):
        return _Step(tensor, stored, verdict, "solved")
    trained = verdict.on_grid or stored.kind in DEQUANTIZED or (of_trained and grid.ggml_type not in FITTED_TYPES)
    return _Step(tensor, stored, verdict, "fit", torch.Size(stored.shape).numel() // grid.block_size if trained else 0)


def _solved(stored: Stored, grid: BlockGrid) -> bool:
    """Whether all values lie on the grid, as embeddings of our own checkpoints do on Q6_K."""
    return grid.ggml_type in FITTED_TYPES and all(
        solve(value.float(), grid) is not None for _, value in stored.pieces()
    )


def _unrecovered(path: Path, steps: list[_Step]) -> str:
    lossy = [step for step in steps if step.lossy]
    count = sum(step.lossy for step in lossy)
    parts = []
    for step in lossy[:SHOWN]:
        tally = step.verdict.tally
        unlike = tally.all - tally.recovered
        what = "lies on no grid"
        if step.verdict.on_grid:
            hypothesis = step.verdict.hypothesis
            grid = step.verdict.grid if hypothesis is None else NAMES[hypothesis.name]
            what = f"{unlike:,} of {tally.all:,} blocks do not lie on its grid ({grid})"
        if step.verdict.on_grid and step.action == "fit":
            what = f"lies on another grid than {step.tensor.grid.name}, where the recipe puts it"
        elif step.verdict.on_grid and step.lossy > unlike:
            what += f", {step.lossy - unlike:,} have a scale that float16 does not hold"
        parts.append(f"{step.tensor.name}: {what}")
    more = f"; and {len(lossy) - SHOWN} more" if len(lossy) > SHOWN else ""
    return (
        f"{path}: {count:,} blocks of {len(lossy)} tensors cannot be taken over exactly: {'; '.join(parts)}{more}. "
        "Say --requantize to fit these anew, which marks the result as lossy, or keep them as floats by a recipe"
    )


def _counts(verdicts: dict[str, Verdict], steps: list[_Step]) -> dict[str, int]:
    solved = {step.tensor.name: step.tensor.grid.name for step in steps if step.action == "solved"}
    names = [solved.get(name, NAMES.get(verdict.grid, verdict.grid)) for name, verdict in verdicts.items()]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _provenance(source: Source, result: Conversion) -> dict[str, Any]:
    folder = source.path if source.path.is_dir() else source.path.with_suffix("")
    record = {**provenance_of(folder), "method": METHODS[source.kind], "source_grids": result.grids}
    if result.fitted:
        record["fitted"] = result.fitted
    if result.lossy:
        record["lossy"] = {"blocks": sum(result.lossy.values()), "tensors": result.lossy}
    return record


def _values(step: _Step, plan: Plan, kind: str, rounded: dict[str, int]) -> Iterator[tuple[slice | None, Any]]:
    """Every row of a tensor as it is packed, some at a time."""
    name, spec = step.tensor.name, step.tensor.spec
    shift = plan.model.family.norm_offset if kind == "gguf" and spec.role == "norm" else 0.0
    pieces = step.stored.pieces() if in_rows(spec) else [(None, step.stored.reader.read(step.stored.name))]
    for rows, value in pieces:
        # experts, [experts, rows, columns], come as rows of a matrix
        shape = spec.shape if rows is None else (rows.stop - rows.start, *spec.shape[1:])
        if step.action == "codes":
            yield rows, coded(step.tensor, step.verdict.hypothesis, value, plan.recipe.fit, rows, shape[:-1])
            continue
        floats = (value.decode() if isinstance(value, Quantized) else value).reshape(shape)
        if step.action == "solved":
            solved = solve(floats.float().flatten(0, -2), step.tensor.grid)  # type: ignore[arg-type]
            assert solved is not None
            yield rows, solved.with_lead(shape[:-1])
            continue
        unshifted = floats.float() - shift if shift else floats
        packed = fit_tensor(unshifted, plan, name, rows)
        if step.action == "values":
            assert isinstance(packed, Tensor)
            changed = int((packed.float() + shift != floats.float()).sum())
            if changed:
                rounded[name] = rounded.get(name, 0) + changed
        yield rows, packed
