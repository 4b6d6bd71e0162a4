"""PackedModel: the codes, scales and float leftovers of a quantized model, on disk.

This is what training hands over and every exporter takes. A folder with

    packed.safetensors    NAME.codes, NAME.scale (and NAME.super_scale) of each tensor on a
                          BlockGrid; NAME itself, bfloat16, of each on a FloatGrid (float32 of
                          towers on f32); each static scale of activations and KV cache, a
                          float32 scalar
    config.json, tokenizer and generation files of the source model

The recipe, the model's config and the provenance stand in the safetensors metadata, so the
plan can be made again and compared by digest. Codes of four or two bits lie two or four in a byte,
the first in the lowest bits, as code - code_min. Tensors are read and written one at a time. The metadata hold
the SHA-256 of every tensor and of the header; a tensor is compared with its own when it is first read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import ConfigError, InputError, WeightError
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.numerics.rounding import is_normal_positive
from intaglio.numerics.steps import check_steps
from intaglio.packed.codes import FIELDS, unpack_codes
from intaglio.packed.hashes import Hashes
from intaglio.packed.identity import CONFIG, MISSING, OTHER, PACKED, PACKED_FILE, look
from intaglio.packed.store import (
    SAFETENSORS_DTYPES,
    SafetensorsReader,
    headers,
    open_safetensors,
    row_slices,
)
from intaglio.plan.carried import describe_whole
from intaglio.plan.family import TOWER_ROLES
from intaglio.plan.files import MALFORMED, one_line, without_folders
from intaglio.plan.hub import find_model
from intaglio.plan.plan import Plan, PlannedTensor, make_plan
from intaglio.plan.recipe import Recipe

FILE_NAME = PACKED_FILE
FORMAT = "intaglio-packed-2"
WITHOUT_HASHES = "intaglio-packed-1"
log = logging.getLogger(__name__)


def check_static(name: str, value: float) -> None:
    """Raise WeightError for a static scale that is neither 0, off, nor a normal positive float32."""
    if value != 0 and not bool(is_normal_positive(torch.tensor(value, dtype=torch.float32))):
        raise WeightError(
            f"{name} = {value!r}: expected 0, which is off, or a normal positive float32 number: "
            "calibrate it again, or set it to 0"
        )


def parts_of_plan(plan: Plan) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes under which a plan's tensors and static scales are stored."""
    parts = {part: spec for tensor in plan.everything for part, spec in parts_of(tensor).items()}
    return parts | {name: (torch.float32, ()) for name in static_names(plan)}


def static_names(plan: Plan) -> list[str]:
    """Names of a plan's static scales; those of carried tensors come last."""
    return [scale.name for scale in plan.static_scales] + list(plan.carried_scales)


def parts_of(tensor: PlannedTensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes under which one tensor is stored."""
    grid, shape = tensor.grid, tensor.spec.shape
    if not isinstance(grid, BlockGrid):
        return {tensor.name: (tensor.stored_dtype, shape)}
    *lead, columns = shape
    packed = grid.code_bits in FIELDS
    codes = (torch.uint8, (*lead, columns * grid.code_bits // 8)) if packed else (torch.int8, shape)
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{tensor.name}.codes": codes,
        f"{tensor.name}.scale": (grid.scale_dtype, (*lead, columns // grid.block_size)),
    }
    if grid.super_block is not None:
        parts[f"{tensor.name}.super_scale"] = (torch.float16, (*lead, columns // grid.super_block))
    return parts


def metadata_of(plan: Plan, provenance: dict[str, Any]) -> dict[str, str]:
    """Metadata of a file from which `read_plan` makes the plan again."""
    return {
        "format": FORMAT,
        "recipe": plan.recipe.to_toml(),
        "config": json.dumps(plan.model.whole or plan.model.config),
        "unused": json.dumps([tensor.name for tensor in plan.carried if tensor.spec.role not in TOWER_ROLES]),
        "plan": plan.layout_digest,
        "provenance": without_folders(json.dumps(provenance)),
    }


def read_plan(file_path: Path) -> tuple[Plan, dict[str, Any]]:
    """Plan and provenance of a file with the metadata of `metadata_of`. ConfigError if they are damaged."""
    with open_safetensors(file_path) as file:
        metadata = file.metadata() or {}
    if metadata.get("format") not in (FORMAT, WITHOUT_HASHES):
        raise ConfigError(f"{file_path}: format {str(metadata.get('format'))[:40]!r}: expected {FORMAT!r}")
    try:
        config, provenance = json.loads(metadata["config"]), json.loads(metadata["provenance"])
        unused = json.loads(metadata.get("unused", "[]"))
        recipe = Recipe.from_toml(metadata["recipe"], source=f"{file_path} recipe")
        if not isinstance(config, dict) or not isinstance(provenance, dict) or not isinstance(unused, list):
            raise ValueError("config and provenance are expected to be JSON objects, unused a list")
    except MALFORMED as error:
        raise ConfigError(f"{file_path}: damaged metadata: {one_line(error)}") from error
    plan = make_plan(describe_whole(config, map(str, unused)), recipe)
    if metadata.get("plan") != plan.layout_digest:
        raise ConfigError(
            f"{file_path}: was packed by plan {str(metadata.get('plan'))[:12]}, but its recipe and config make "
            f"plan {plan.layout_digest[:12]}: it is damaged or of another version of intaglio; pack the model again"
        )
    return plan, provenance


@dataclass(frozen=True)
class PackedModel:
    """A packed model on disk. `read` gives one tensor; nothing is kept in memory.

    path: the folder. plan: as resolved when it was packed. provenance: how it was made. hashes: of its tensors;
    None for a model packed before there were hashes.
    """

    path: Path
    plan: Plan
    provenance: dict[str, Any]
    hashes: Hashes | None = field(default=None, compare=False, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> PackedModel:
        """Raises ConfigError for anything that is not a complete packed model of this version.

        Only the header is read; `check` reads all tensors. A model without hashes is taken, and a warning logged.
        """
        path = find_model(path)
        file_path = path / FILE_NAME
        found = look(path)
        if found.kind in (MISSING, OTHER, CONFIG):
            raise ConfigError(f"{path}: no {FILE_NAME}: expected the folder that train or quantize wrote")
        if found.kind != PACKED:
            raise found.error()
        plan, provenance = read_plan(file_path)
        with open_safetensors(file_path) as file:
            hashed = (file.metadata() or {}).get("format") == FORMAT
        hashes = Hashes(file_path) if hashed else None
        expected = {part: (SAFETENSORS_DTYPES[dtype], shape) for part, (dtype, shape) in parts_of_plan(plan).items()}
        stored = headers(file_path)
        if stored != expected:
            odd = sorted(set(stored.items()) ^ set(expected.items()))[0][0]
            raise ConfigError(f"{file_path}: tensor {odd} is missing, unexpected or not as planned")
        if hashes is not None and hashes.digests.keys() != expected.keys():
            raise ConfigError(f"{file_path}: has hashes of other tensors than it holds: pack the model again")
        if hashes is None:
            log.warning("%s: was packed before tensors had hashes, so damage to it is not noticed", file_path)
        return cls(path, plan, provenance, hashes)

    def check(self) -> None:
        """Compare every tensor with its hash, at the speed of the disk. ConfigError names one that differs."""
        if self.hashes is not None:
            self.hashes.check_all()

    def _part(self, file: SafetensorsReader, name: str, rows: slice | None = None) -> Tensor:
        """A stored tensor, or rows of it, once its bytes are known to be those that were written."""
        if self.hashes is not None:
            self.hashes.check(name)
        return file.read(name, rows)

    @property
    def lossy_blocks(self) -> int:
        """Number of blocks that a conversion fitted anew, because their trained codes could not be had."""
        lossy = self.provenance.get("lossy")
        return int(lossy["blocks"]) if isinstance(lossy, dict) else 0

    @property
    def file_metadata(self) -> dict[str, str]:
        """Metadata of a safetensors file made of this model."""
        lossy = {"intaglio_lossy_blocks": str(self.lossy_blocks)} if self.lossy_blocks else {}
        return {"format": "pt"} | lossy

    def text_only(self) -> PackedModel:
        """The same without towers and their embedders."""
        return dataclasses.replace(self, plan=self.plan.text_only())

    def read(self, name: str, rows: slice | None = None, device: torch.device | str = "cpu") -> Quantized | Tensor:
        """A Quantized for a tensor on a BlockGrid, a float tensor, as stored, for one on a FloatGrid.

        rows: which of them, or of which experts, if not all. device: where they go; codes are unpacked there.
        """
        with self._reader() as file:
            return self._read(file, self.plan[name], rows, device)

    def chunks(
        self, name: str, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[slice | None, Quantized | Tensor]]:
        """Values of `read`, a few rows at a time, with their numbers; None and all of a tensor that is small."""
        tensor = self.plan[name]
        with self._reader() as file:
            for rows in row_slices(tensor.spec.shape):
                yield rows, self._read(file, tensor, rows, device)

    def __iter__(self) -> Iterator[tuple[PlannedTensor, Quantized | Tensor]]:
        """Every tensor of the text model with its value, in plan order, one at a time."""
        with self._reader() as file:
            for tensor in self.plan:
                yield tensor, self._read(file, tensor)

    def _reader(self) -> SafetensorsReader:
        return SafetensorsReader(self.path / FILE_NAME)

    def _read(
        self,
        file: SafetensorsReader,
        tensor: PlannedTensor,
        rows: slice | None = None,
        device: torch.device | str = "cpu",
    ) -> Quantized | Tensor:
        name, grid = tensor.name, tensor.grid
        if not isinstance(grid, BlockGrid):
            return self._part(file, name, rows).to(device)
        codes = unpack_codes(self._part(file, f"{name}.codes", rows).to(device), grid)
        lowest, highest = codes.aminmax() if codes.numel() else (grid.code_min, grid.code_max)
        if not grid.code_min <= int(lowest) <= int(highest) <= grid.code_max:
            raise InputError(f"{self.path}: {name}: codes outside {grid.code_min}..{grid.code_max}")
        super_scale = self._part(file, f"{name}.super_scale", rows).to(device) if grid.super_block else None
        quantized = Quantized(grid, codes, self._part(file, f"{name}.scale", rows).to(device), super_scale)
        try:
            check_steps(quantized, rows.start if rows else 0)
        except WeightError as error:
            raise InputError(f"{self.path}: {name}: {error}") from None
        return quantized

    def read_static(self) -> dict[str, float]:
        """Every static scale by its name, those of carried tensors too; 0 where nothing is to be quantized.

        Raises InputError for one that no runtime could use, and for one that differs from its owner's.
        """
        with self._reader() as file:
            values = {name: float(self._part(file, name)) for name in static_names(self.plan)}
        try:
            for name, value in values.items():
                check_static(name, value)
        except WeightError as error:
            raise InputError(f"{self.path}: {error}") from None
        for scale in self.plan.static_scales:
            if values[scale.name] != values[scale.owner]:
                raise InputError(
                    f"{self.path}: {scale.name} = {values[scale.name]!r}, but it is the scale of {scale.owner}, "
                    f"which is {values[scale.owner]!r}: pack the model again"
                )
        return values

    def decode(self, name: str) -> Tensor:
        """float32 values of one tensor, equal to what every runtime decodes."""
        value = self.read(name)
        return value.decode() if isinstance(value, Quantized) else value.float()

    def sha256(self) -> str:
        """SHA-256 of packed.safetensors."""
        return file_sha256(self.path / FILE_NAME)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
