"""Match a source's tensors to the model's, and find the recipe of the grids that were found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from intaglio.errors import ConfigError
from intaglio.formats.gguf.names import GGUF_ROPE_FACTORS, gguf_name
from intaglio.numerics.grid import F16, F32, GGUF_GRIDS, Q4_0, Q8_0, BlockGrid, Grid, Quantized
from intaglio.numerics.identify import ROW_GRIDS
from intaglio.packed.names import check_rest, own_name, untied
from intaglio.plan.carried import describe_whole, unused_names
from intaglio.plan.family import TOWER_ROLES, ModelSpec, TensorSpec, load_config, read_spec
from intaglio.plan.found import recipe_for
from intaglio.plan.plan import HEAD, LEFT_ALONE
from intaglio.plan.recipe import Recipe
from intaglio.sources.agree import check_agreement
from intaglio.sources.inspect import Verdict
from intaglio.sources.stored import DEQUANTIZED, GgufFile, Source, Stored

PRESETS = ("q4_0", "q4_0-free", "q2_0", "mobile-e2b", "mobile-e4b", "mobile")
CONVERTED = Recipe(name="converted", summary="The grids of a converted checkpoint")
GGUF_TOWERS = ("v.", "a.", "mm.")  # llama.cpp's prefixes: vision, audio, and projectors to the text model
EMBEDDING = "token_embedding"
SHOWN = 3  # names in a message


def assets_of(source: Source, config: str | Path | None) -> Path:
    """The folder of config and tokenizer."""
    if config is not None:
        return Path(config).parent if Path(config).is_file() else Path(config)
    if source.kind == "gguf" or not source.path.is_dir():
        raise ConfigError(
            f"{source.path}: brings no config.json and tokenizer.json: give a folder that has them with --config, "
            "for example the original checkpoint's"
        )
    return source.path


def model_of(source: Source, assets: Path, text_only: bool) -> ModelSpec:
    """The model that the config describes, with the tensors of the source beside its text model."""
    if source.kind == "gguf":
        return _gguf_model(source, assets)
    config = load_config(assets)
    config.pop("quantization_config", None)
    try:
        alone = describe_whole(config)
        unused = unused_names((own_name(tensor.name) for tensor in source.tensors), alone)
        model = describe_whole(config, unused)
    except ConfigError as error:
        raise ConfigError(f"{assets}: {error}") from error
    return model.text_only() if text_only else model


def _gguf_model(source: Source, assets: Path) -> ModelSpec:
    """The text model of the config; ConfigError where the GGUF says that it is of another one."""
    model = read_spec(assets)
    check_agreement(source, model, assets)
    return model


def match(
    source: Source, model: ModelSpec, *, text_only: bool = False, requantize: bool = False
) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """The source's tensor for each of the model's, and the names of those that the model has no use for.

    text_only: towers of a GGUF are left out. requantize: types of GGUF that no grid holds are taken as the floats that
    they decode to. Raises ConfigError for tensors that are missing, of another shape or type, or that would be lost.
    """
    gguf = source.kind == "gguf"
    stored = {tensor.name if gguf else own_name(tensor.name): tensor for tensor in source.tensors}
    found = {}
    for tensor in (*model.tensors, *model.carried):
        name = gguf_name(tensor.name) if gguf else tensor.name
        part = stored.pop(name, None)
        if part is None:
            advice = ": to do without towers, say --text-only" if tensor.role in TOWER_ROLES else ""
            raise ConfigError(f"{source.path}: {name} is missing{advice}")
        if part.shape != tensor.shape:
            raise ConfigError(
                f"{source.path}: {part.name} has shape {list(part.shape)}, the config says {list(tensor.shape)}: "
                "config and weights are of different models"
            )
        if part.kind in DEQUANTIZED and not requantize:
            raise ConfigError(
                f"{source.path}: {part.name} is of type {part.kind}, whose codes no grid here holds: say --requantize "
                "to fit such tensors anew, which marks the result as lossy"
            )
        if not part.is_float and part.kind not in DEQUANTIZED and (part.bits is None or not in_rows(tensor)):
            raise ConfigError(f"{source.path}: {part.name} is of type {part.kind}: expected floats, or codes we know")
        found[tensor.name] = part
    stored.pop(GGUF_ROPE_FACTORS, None)
    towers = [name for name in stored if gguf and name.startswith(GGUF_TOWERS)]
    if towers and not text_only:
        raise ConfigError(
            f"{source.path}: holds towers beside the text model ({_some(towers)}): to do without them, say --text-only"
        )
    if not gguf:
        if model.tied_head and HEAD in stored:
            _check_tied(source, stored.pop(HEAD), next(found[t.name] for t in model.tensors if t.role == EMBEDDING))
        check_rest(source.path, {name: tensor.name for name, tensor in stored.items()}, model)
    odd = [name for name in stored if gguf and name not in towers]
    if odd:
        raise ConfigError(f"{source.path}: {len(odd)} tensors are not part of this model: {_some(odd)}")
    return found, tuple(tensor.name for tensor in stored.values())


def _check_tied(source: Source, head: Stored, embedding: Stored) -> None:
    """Raise ConfigError for a head that is stored beside an embedding of other values, to which the config ties it."""
    same = (head.kind, head.shape) == (embedding.kind, embedding.shape) and all(
        torch.equal(_decoded(mine), _decoded(other))
        for (_, mine), (_, other) in zip(head.pieces(), embedding.pieces(), strict=True)
    )
    if not same:
        raise untied(source.path, head.name, embedding.name)


def _decoded(value: Quantized | Tensor) -> Tensor:
    return value.decode() if isinstance(value, Quantized) else value


def in_file_order(source: Source, found: dict[str, Stored]) -> Iterator[str]:
    """Names of the tensors that were found, as their files have them; a file is closed when the next begins."""
    names = {tensor.name: name for name, tensor in found.items()}
    yield from (names[tensor.name] for tensor in source if tensor.name in names)


def recipe_of(model: ModelSpec, found: dict[str, Stored], verdicts: dict[str, Verdict]) -> Recipe:
    """A preset if it has the grids that were found, else one made of them."""
    by_row = any(v.hypothesis is not None and v.hypothesis.by_row for v in verdicts.values())
    base = Recipe.load("mobile" if by_row else "q4_0")
    types = {
        kind: portable if all(v.portable for v in verdicts.values() if _is_of(kind, v)) else free
        for kind, (portable, free) in GGUF_GRIDS.items()
    }
    grids = {}
    for spec in (*model.tensors, *model.carried):
        grid = _found_grid(spec, verdicts[spec.name], types)
        grids[spec.name] = grid or _usual_grid(model, spec, base, found[spec.name], types)
    return recipe_for(model, grids, PRESETS, CONVERTED)


def _is_of(kind: str, verdict: Verdict) -> bool:
    return verdict.in_blocks if kind == "Q4_0" else verdict.grid == kind


def in_rows(spec: TensorSpec) -> bool:
    """Whether a tensor's rows can lie on a grid: those of a matrix, and of each expert's."""
    return len(spec.shape) == 2 or spec.role == "expert"


def _found_grid(spec: TensorSpec, verdict: Verdict, types: dict[str, BlockGrid]) -> Grid | None:
    if not in_rows(spec):
        return None
    if verdict.hypothesis is not None and verdict.hypothesis.by_row:
        return ROW_GRIDS[verdict.hypothesis.name]
    return next((grid for kind, grid in types.items() if _is_of(kind, verdict)), None)


def _usual_grid(model: ModelSpec, spec: TensorSpec, base: Recipe, stored: Stored, types: dict[str, BlockGrid]) -> Grid:
    """The recipe's grid for a tensor on which none was found; towers and a GGUF's matrices stay floats."""
    if spec.role in TOWER_ROLES and stored.kind == "F32":
        return F32
    if isinstance(stored.reader, GgufFile) and stored.kind in ("F16", "BF16") and in_rows(spec):
        return F16
    rule = base.rule_for(spec.name, spec.role, model.first_late_layer) or LEFT_ALONE
    if isinstance(rule.grid, BlockGrid) and spec.shape[-1] % rule.grid.column_multiple and in_rows(spec):
        return Q8_0 if spec.shape[-1] % Q8_0.column_multiple == 0 else F16  # as llama-quantize does with such rows
    return types["Q4_0"] if rule.grid == Q4_0 else rule.grid


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
