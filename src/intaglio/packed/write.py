"""Writing a PackedModel: a folder that appears when every tensor of its plan was added."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.packed.assets import copy_assets
from intaglio.packed.codes import pack_codes
from intaglio.packed.model import FILE_NAME, PackedModel, check_static, metadata_of, parts_of_plan, static_names
from intaglio.packed.outputs import check_output
from intaglio.packed.store import SafetensorsWriter, new_path
from intaglio.plan.plan import Plan


class PackedWriter:
    """Fills a new PackedModel; made by `write_packed`."""

    def __init__(self, plan: Plan, writer: SafetensorsWriter):
        self.plan = plan
        self.writer = writer

    def add(self, name: str, value: Quantized | Tensor, rows: slice | None = None) -> None:
        """Store one planned tensor: a Quantized for a BlockGrid, a float tensor for a FloatGrid.

        rows: which of the tensor's these are, if not all; they come in order.
        """
        tensor = self.plan[name]
        grid = tensor.grid
        if isinstance(value, Quantized):
            if value.grid != grid:
                raise ValueError(f"{name}: on grid {value.grid.name}, planned {grid.name}")
            self.writer.write(f"{name}.codes", pack_codes(value.codes, value.grid), rows)
            self.writer.write(f"{name}.scale", value.scale, rows)
            if value.super_scale is not None:
                self.writer.write(f"{name}.super_scale", value.super_scale, rows)
            return
        stored = value.to(tensor.stored_dtype)
        if isinstance(grid, BlockGrid) or not torch.equal(stored.float(), value.float()):
            raise ValueError(f"{name}: values that are not on grid {grid.name}")
        self.writer.write(name, stored, rows)

    def add_static(self, name: str, value: float) -> None:
        """Store a static scale, and with it all that share it. WeightError for one that no runtime could use.

        name: of the owner, `StaticScale.owner`; 0 leaves what it scales as floats.
        """
        check_static(name, value)
        sharing = [scale.name for scale in self.plan.static_scales if scale.owner == name]
        sharing += [carried for carried in self.plan.carried_scales if carried == name]
        if not sharing:
            raise ValueError(f"{name}: no static scale of this plan, or one that is another's")
        for shared in sharing:
            self.writer.write(shared, torch.tensor(value, dtype=torch.float32))

    def leave_static_off(self) -> None:
        """Store 0 for every static scale: nothing was calibrated."""
        for name in static_names(self.plan):
            self.writer.write(name, torch.zeros(()))


@contextmanager
def write_packed(
    path: Path, plan: Plan, *, assets: Path, provenance: dict[str, Any], replace: bool = False
) -> Iterator[PackedWriter]:
    """Create a PackedModel folder; it appears under `path` only when every tensor was added."""
    metadata = metadata_of(plan, provenance)
    check_output(path, [assets])
    with new_path(path, replace=replace) as temporary:
        temporary.mkdir()
        copy_assets(assets, temporary)
        config = json.dumps(plan.model.whole or plan.model.config, indent=2) + "\n"
        (temporary / "config.json").write_text(config, "utf-8")
        with SafetensorsWriter(temporary / FILE_NAME, parts_of_plan(plan), metadata, hashed=True) as writer:
            yield PackedWriter(plan, writer)


def join_packed(text: PackedModel, carrying: PackedModel, path: Path, *, replace: bool = False) -> None:
    """Write a packed model with the text model of `text` and the carried tensors of `carrying`, unchanged."""
    plan = dataclasses.replace(text.plan, model=carrying.plan.model, carried=carrying.plan.carried)
    static = text.read_static() | {name: carrying.read_static()[name] for name in plan.carried_scales}
    with write_packed(path, plan, assets=text.path, provenance=text.provenance, replace=replace) as writer:
        for tensor in plan.everything:
            source = text if tensor in text.plan.tensors else carrying
            for rows, value in source.chunks(tensor.name):
                writer.add(tensor.name, value, rows)
        owners = {scale.name for scale in plan.static_scales if scale.owned} | set(plan.carried_scales)
        for name in owners:
            writer.add_static(name, static[name])
