"""A checkpoint of ours with its scales (`formats.checkpoint.kept`) back into the packed model, bit for bit.

Each code is its value divided by the step that was kept. Every value is compared with what its code decodes to, and
the config with that of the export: a folder that was changed since is refused rather than taken for what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import ConfigError
from intaglio.formats.checkpoint.kept import KEPT_FILE, in_checkpoint, kept_parts
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.packed.codes import unpack_codes
from intaglio.packed.model import PackedModel, read_plan
from intaglio.packed.names import own_name
from intaglio.packed.store import SAFETENSORS_DTYPES, SafetensorsReader, headers, row_slices
from intaglio.packed.write import write_packed
from intaglio.plan.family import load_config, transformers_config
from intaglio.plan.plan import Plan, PlannedTensor
from intaglio.sources.stored import Source, Stored

# Keys that an export, or transformers, writes into a config anew.
NOT_OF_THE_MODEL = ("dtype", "architectures", "transformers_version", "_name_or_path", "id2label", "label2id")


def has_kept(folder: Path) -> bool:
    """Whether a folder has the scales of its weights beside them."""
    return (folder / KEPT_FILE).is_file()


def restore(
    source: Source,
    out: Path,
    *,
    text_only: bool = False,
    replace: bool = False,
    on_tensor: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> PackedModel:
    """Write the packed model that a folder was exported from; `text_only` leaves its towers out.

    Raises ConfigError where weights or config are no longer those of the export.
    """
    path = source.path / KEPT_FILE
    plan, provenance = read_plan(path)
    _check_config(source.path, plan)
    expected = {part: (SAFETENSORS_DTYPES[dtype], shape) for part, (dtype, shape) in kept_parts(plan).items()}
    found = {part: header for part, header in headers(path).items() if not part.endswith((".odd_at", ".odd_codes"))}
    if found != expected:
        odd = sorted(set(found.items()) ^ set(expected.items()))[0][0]
        raise ConfigError(f"{path}: {odd} is missing, unexpected or not as planned: {_advice(source.path)}")
    plan = plan.text_only() if text_only else plan
    weights = {own_name(tensor.name): tensor for tensor in source.tensors}
    total = len(plan.everything)
    with (
        SafetensorsReader(path) as kept,
        write_packed(out, plan, assets=source.path, provenance=provenance, replace=replace) as writer,
    ):
        for done, tensor in enumerate(plan.everything):
            on_tensor(done, total, tensor.name)
            stored = weights.get(tensor.name) if in_checkpoint(plan, tensor) else None
            if in_checkpoint(plan, tensor) and (stored is None or stored.shape != tensor.spec.shape):
                raise ConfigError(
                    f"{source.path}: {tensor.name} is missing or of another shape: {_advice(source.path)}"
                )
            for rows in row_slices(tensor.spec.shape):
                value = _kept_whole(kept, tensor, rows) if stored is None else _value(kept, tensor, stored, rows)
                writer.add(tensor.name, value, rows)
            if stored is not None:
                stored.reader.close()
        for name in {scale.owner for scale in plan.static_scales} | set(plan.carried_scales):
            writer.add_static(name, float(kept.read(name)))
    on_tensor(total, total, "")
    return PackedModel.open(out)


def _advice(folder: Path) -> str:
    return f"export it again, or remove {folder / KEPT_FILE} to look for the grid in the weights alone"


def _kept_whole(kept: SafetensorsReader, tensor: PlannedTensor, rows: slice | None) -> Quantized | Tensor:
    """A tensor that no checkpoint holds."""
    if not isinstance(tensor.grid, BlockGrid):
        return kept.read(tensor.name, rows)
    return _with_scales(kept, tensor, unpack_codes(kept.read(f"{tensor.name}.codes", rows), tensor.grid), rows)


def _with_scales(kept: SafetensorsReader, tensor: PlannedTensor, codes: Tensor, rows: slice | None) -> Quantized:
    assert isinstance(tensor.grid, BlockGrid)
    super_scale = kept.read(f"{tensor.name}.super_scale", rows) if tensor.grid.super_block else None
    return Quantized(tensor.grid, codes, kept.read(f"{tensor.name}.scale", rows), super_scale)


def _value(kept: SafetensorsReader, tensor: PlannedTensor, stored: Stored, rows: slice | None) -> Quantized | Tensor:
    """Some rows of a tensor by their values and their scales."""
    values: Tensor = stored.reader.read(stored.name, rows)
    if not isinstance(tensor.grid, BlockGrid):
        if not torch.equal(values.to(tensor.stored_dtype).to(values.dtype), values):
            raise _changed(stored, tensor.name)
        return values
    value = _with_scales(kept, tensor, torch.zeros(values.shape, dtype=torch.int8), rows)
    codes = tensor.grid.encode(values.float(), value.step)
    value = Quantized(value.grid, codes, value.scale, value.super_scale)
    if not torch.equal(value.decode().to(values.dtype), values):
        raise _changed(stored, tensor.name)
    if f"{tensor.name}.odd_at" in kept.names:
        _put_odd(kept, tensor, codes, rows)
    return value


def _put_odd(kept: SafetensorsReader, tensor: PlannedTensor, codes: Tensor, rows: slice | None) -> None:
    at, odd = kept.read(f"{tensor.name}.odd_at"), kept.read(f"{tensor.name}.odd_codes")
    first = (rows.start if rows else 0) * torch.Size(tensor.spec.shape[1:]).numel()
    mine = (at >= first) & (at < first + codes.numel())
    codes.view(-1)[at[mine] - first] = odd[mine]


def _changed(stored: Stored, name: str) -> ConfigError:
    folder = stored.reader.path.parent  # type: ignore[attr-defined]
    return ConfigError(
        f"{folder}: {name} has values that its scales in {KEPT_FILE} do not give: the weights were changed since the "
        f"export: {_advice(folder)}"
    )


def _check_config(folder: Path, plan: Plan) -> None:
    """Raise ConfigError where config.json is not that of the export."""
    mine, theirs = _facts(plan.model.whole or plan.model.config), _facts(load_config(folder))
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            raise ConfigError(
                f"{folder}: config.json says {key} = {theirs.get(key)!r}, and {KEPT_FILE} is of a model with "
                f"{mine.get(key)!r}: {_advice(folder)}"
            )


def _facts(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config in transformers' words, the same for every spelling; nested keys with dots."""
    found: dict[str, Any] = {}

    def add(prefix: str, table: dict[str, Any]) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            elif key not in NOT_OF_THE_MODEL:
                found[prefix + str(key)] = value

    add("", transformers_config(config).to_dict())
    return found
