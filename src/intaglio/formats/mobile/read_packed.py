"""A folder in the Gemma mobile format, ours or Google's, back into a PackedModel: codes and scales as they are.

The plan comes from config.json: bits by the reader's rule for each module, and a recipe that says so,
one of ours where it agrees. Every tensor has to be there, and no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import ConfigError, RecipeError, WeightError
from intaglio.formats.listed import ListedTensor
from intaglio.formats.mobile.layout import LINEAR_OR_EMBEDDING, resolve_bits, stored_tensors
from intaglio.numerics.grid import BF16, F32, INT2, INT4, INT8, BlockGrid, Grid, Quantized
from intaglio.numerics.steps import check_steps
from intaglio.packed.codes import unpack_codes
from intaglio.packed.model import PackedModel
from intaglio.packed.origin import provenance_of
from intaglio.packed.shards import shards
from intaglio.packed.store import FLOATS, SAFETENSORS_DTYPES, SafetensorsReader, headers, row_slices
from intaglio.packed.write import write_packed
from intaglio.plan.carried import describe_whole, text_name, unused_names, whole_name
from intaglio.plan.families import WHOLES
from intaglio.plan.family import TOWER_ROLES, TensorSpec, is_mobile, load_config, text_config
from intaglio.plan.found import recipe_for
from intaglio.plan.hub import find_model
from intaglio.plan.plan import HEAD, Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.plan.static import Activations, KvCache

PRESETS = ("mobile-e2b", "mobile-e4b", "mobile")
IMPORTED = Recipe(
    name="mobile-imported",
    summary="The bits of an imported folder",
    activations=Activations(),
    kv_cache=KvCache(),
)
GRIDS: dict[int | None, Grid] = {2: INT2, 4: INT4, 8: INT8, None: BF16}


@dataclass(frozen=True)
class _Folder:
    """The place of each tensor of a folder, with dtype and shape as its file's header says."""

    path: Path
    files: dict[str, Path]
    headers: dict[str, tuple[str, tuple[int, ...]]]

    def read(self, name: str) -> Tensor:
        return next(self.chunks(name, ()))[1]

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[slice | None, Tensor]]:
        """A tensor of as many rows as a planned one of this shape, by the chunks of that one."""
        with SafetensorsReader(self.files[name]) as file:
            for rows in row_slices(shape):
                yield rows, file.read(name, rows)


def import_mobile(folder: str | Path, out: str | Path, *, replace: bool = False) -> PackedModel:
    """Write the PackedModel `out` of a mobile folder; its export is the same folder again, byte for byte.

    Raises ConfigError for a folder of another kind or family, for tensors that are missing, unknown
    or not as its config says, and for scales that no runtime could use; nothing is left behind.
    """
    path = find_model(folder)
    if not is_mobile(path):
        raise ConfigError(f"{path}: no folder in the mobile format: expected quant_method 'gemma' in its config.json")
    found = _open(path)
    try:
        plan = _plan(found)
        expected = stored_tensors(plan)
    except RecipeError as error:
        raise ConfigError(f"{path}: {error}") from error
    _check_layout(found, expected)
    provenance = {**provenance_of(path), "method": "imported from the mobile format"}
    with write_packed(Path(out), plan, assets=path, provenance=provenance, replace=replace) as writer:
        try:
            for name, rows, value in _values(found, plan, expected):
                writer.add(name, value, rows)
            for name, scale in _static(found, plan, expected).items():
                writer.add_static(name, scale)
        except WeightError as error:
            raise ConfigError(f"{path}: {error}") from error
    return PackedModel.open(out)


def _open(path: Path) -> _Folder:
    by_file = {shard: headers(shard) for shard in shards(path)}
    files = {name: shard for shard, found in by_file.items() for name in found}
    return _Folder(path, files, {name: header for found in by_file.values() for name, header in found.items()})


def _plan(found: _Folder) -> Plan:
    """The plan that the folder's config and headers amount to."""
    config = load_config(found.path)
    quantization = config.pop("quantization_config")
    multimodal = config["model_type"] in WHOLES
    config["tie_word_embeddings"] = _head_is_embedding(found, multimodal)
    if multimodal:
        config["text_config"] = text_config(config) | {"tie_word_embeddings": config["tie_word_embeddings"]}
    try:
        alone = describe_whole(config)
        unused = unused_names([text_name(name) for name in found.headers], alone)
        model = describe_whole(config, unused)
    except ConfigError as error:
        raise ConfigError(f"{found.path}: {error}") from error
    grids = {t.name: _grid(found, t, quantization, multimodal) for t in (*model.tensors, *model.carried)}
    plan = make_plan(model, recipe_for(model, grids, PRESETS, IMPORTED))
    scales = next((n for n in found.headers if n.endswith("embed_tokens_per_layer.embedding_scale")), None)
    if scales is not None and found.headers[scales][1][1:] == (1,):
        rules = tuple(replace(r, slices="ple_embedding" not in r.roles) for r in plan.recipe.rules)
        plan = make_plan(model, replace(plan.recipe, rules=rules))
    return plan


def _head_is_embedding(found: _Folder, multimodal: bool) -> bool:
    """Whether the head's codes and scales are the embedding's, as where the two are one tensor."""
    embedding = whole_name("model.embed_tokens") if multimodal else "model.embed_tokens"
    pairs = ((HEAD, f"{embedding}.embedding_quantized"), ("lm_head.weight_scale", f"{embedding}.embedding_scale"))
    for head, table in pairs:
        header = found.headers.get(head)
        if header is None or header != found.headers.get(table):
            return False
        chunks = zip(found.chunks(head, header[1]), found.chunks(table, header[1]), strict=True)
        if not all(torch.equal(mine, other) for (_, mine), (_, other) in chunks):
            return False
    return True


def _grid(found: _Folder, tensor: TensorSpec, quantization: dict[str, Any], multimodal: bool) -> Grid:
    """The grid that a tensor is on; floats of towers keep the dtype that they have."""
    name = whole_name(tensor.name) if multimodal else tensor.name
    bits = None
    if tensor.role in LINEAR_OR_EMBEDDING:
        try:
            bits = resolve_bits(name.removesuffix(".weight"), quantization)
        except Exception as error:  # of regular expressions, and of anything in the place of a table
            raise ConfigError(f"{found.path}: quantization_config cannot be read: {error}") from error
    if bits not in GRIDS:
        raise ConfigError(f"{found.path}: quantization_config gives {name} {bits!r} bits: expected 2, 4 or 8")
    in_full = bits is None and tensor.role in TOWER_ROLES and found.headers.get(name, ("",))[0] == "F32"
    return F32 if in_full else GRIDS[bits]


def _check_layout(found: _Folder, expected: list[ListedTensor]) -> None:
    """Raise ConfigError that names tensors which are missing, unknown, or unlike what config.json says."""
    names = {tensor.name for tensor in expected}
    wrong = {"missing": names - set(found.headers), "not part of this model": set(found.headers) - names}
    for what, which in wrong.items():
        if which:
            some = ", ".join(sorted(which)[:3]) + (", ..." if len(which) > 3 else "")
            raise ConfigError(f"{found.path}: {len(which)} tensors are {what}: {some}: download or export it again")
    for tensor in expected:
        dtype, shape = found.headers[tensor.name]
        dtypes = tuple(FLOATS) if tensor.part == "values" else (SAFETENSORS_DTYPES[tensor.dtype],)
        if dtype not in dtypes or shape != tensor.shape:
            raise ConfigError(
                f"{found.path}: {tensor.name} is {dtype} {list(shape)}, expected {' or '.join(dtypes)} "
                f"{list(tensor.shape)} by its config.json"
            )


def _values(
    found: _Folder, plan: Plan, expected: list[ListedTensor]
) -> Iterator[tuple[str, slice | None, Quantized | Tensor]]:
    """Every planned tensor, a few rows at a time. WeightError names one with values that its grid has not."""
    parts: dict[str, dict[str, str]] = {}
    for tensor in expected:
        if tensor.part != "static":  # the embedding comes before a head that is tied to it
            parts.setdefault(tensor.source, {}).setdefault(tensor.part, tensor.name)
    for source, names in parts.items():
        grid, shape = plan[source].grid, plan[source].spec.shape
        if not isinstance(grid, BlockGrid):
            for rows, data in found.chunks(names["values"], shape):
                yield source, rows, _exact(data, plan[source].full_floats, names["values"])
            continue
        both = zip(found.chunks(names["codes"], shape), found.chunks(names["scale"], shape), strict=True)
        for (rows, data), (_, scale) in both:
            value = Quantized(grid, unpack_codes(data, grid), scale)
            _check(value, names, rows.start if rows else 0)
            yield source, rows, value


def _exact(values: Tensor, full_floats: bool, name: str) -> Tensor:
    if not full_floats and not torch.equal(values.to(torch.bfloat16).float(), values.float()):
        raise WeightError(f"{name}: has float values that bfloat16 does not hold: expected none in this format")
    return values


def _check(value: Quantized, names: dict[str, str], first_row: int) -> None:
    try:
        check_steps(value, first_row)
    except WeightError as error:
        raise WeightError(f"{names['scale']}: {error}") from None
    if int(value.codes.min()) < value.grid.code_min:
        raise WeightError(
            f"{names['codes']}: has codes below {value.grid.code_min}, which grid {value.grid.name} lacks"
        )


def _static(found: _Folder, plan: Plan, expected: list[ListedTensor]) -> dict[str, float]:
    """Values of the static scales that own theirs, by our names."""
    values = {tensor.source: float(found.read(tensor.name)) for tensor in expected if tensor.part == "static"}
    for scale in plan.static_scales:
        if values[scale.name] != values[scale.owner]:
            raise ConfigError(
                f"{found.path}: {scale.name} = {values[scale.name]!r}, but {scale.owner}, which scales the same "
                f"tensor, is {values[scale.owner]!r}: expected one value for both"
            )
    known = {scale.name: scale.owned for scale in plan.static_scales} | dict.fromkeys(plan.carried_scales, True)
    for name, value in values.items():
        if name not in known and value != 0:
            raise ConfigError(f"{found.path}: {name} = {value!r}: expected 0, nothing is quantized there")
    return {name: values[name] for name, owned in known.items() if owned}
