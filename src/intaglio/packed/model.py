"""PackedModel: the codes, scales and float leftovers of a quantized model, on disk.

This is what training hands over and every exporter takes. A folder with

    packed.safetensors    NAME.codes, NAME.scale (and NAME.super_scale) of each tensor on a
                          BlockGrid; NAME itself, bfloat16, of each on a FloatGrid
    config.json, tokenizer and generation files of the source model

The recipe, the text model's config and the provenance stand in the safetensors metadata, so the
plan can be made again and compared by digest. Codes of four bits lie two in a byte, the first in
the low half, as code - code_min. Tensors are read and written one at a time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intaglio.errors import ConfigError, InputError
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.packed.store import SAFETENSORS_DTYPES, SafetensorsWriter, new_path, open_safetensors
from intaglio.plan.plan import Plan, PlannedTensor, make_plan
from intaglio.plan.recipe import Recipe

FILE_NAME = "packed.safetensors"
FORMAT = "intaglio-packed-1"
# What belongs to a model beside its weights; copied where present.
ASSETS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)


def copy_assets(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights, as far as it is there."""
    for name in ASSETS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def pack_nibbles(codes: Tensor, code_min: int) -> Tensor:
    """int8 [R, C] of at most 16 values to uint8 [R, C / 2]."""
    unsigned = (codes - code_min).to(torch.uint8)
    return unsigned[:, ::2] | (unsigned[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, code_min: int) -> Tensor:
    """uint8 [R, C / 2] back to int8 [R, C]."""
    pairs = packed.numpy().astype("<u2")  # both nibbles of a byte end up in a byte of their own
    pairs |= pairs << 4
    pairs &= 0x0F0F
    codes = pairs.view(np.int8)
    codes += code_min
    return torch.from_numpy(codes)


def fits_nibble(grid: BlockGrid) -> bool:
    """Whether the codes of a grid take four bits."""
    return grid.code_max - grid.code_min < 16


def _parts(tensor: PlannedTensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes under which a planned tensor is stored."""
    grid, shape = tensor.grid, tensor.spec.shape
    if not isinstance(grid, BlockGrid):
        return {tensor.name: (torch.bfloat16, shape)}
    rows, columns = shape
    nibbles = fits_nibble(grid)
    codes = (torch.uint8, (rows, columns // 2)) if nibbles else (torch.int8, (rows, columns))
    scale_dtype = torch.float16 if grid.super_block is None else torch.int8
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{tensor.name}.codes": codes,
        f"{tensor.name}.scale": (scale_dtype, (rows, columns // grid.block_size)),
    }
    if grid.super_block is not None:
        parts[f"{tensor.name}.super_scale"] = (torch.float16, (rows, columns // grid.super_block))
    return parts


class PackedWriter:
    """Fills a new PackedModel; made by `write_packed`."""

    def __init__(self, plan: Plan, writer: SafetensorsWriter):
        self.plan = plan
        self.writer = writer

    def add(self, name: str, value: Quantized | Tensor) -> None:
        """Store one planned tensor: a Quantized for a BlockGrid, a float tensor for a FloatGrid."""
        grid = self.plan[name].grid
        if isinstance(value, Quantized):
            if value.grid != grid:
                raise ValueError(f"{name}: on grid {value.grid.name}, planned {grid.name}")
            codes = pack_nibbles(value.codes, value.grid.code_min) if fits_nibble(value.grid) else value.codes
            self.writer.write(f"{name}.codes", codes)
            self.writer.write(f"{name}.scale", value.scale)
            if value.super_scale is not None:
                self.writer.write(f"{name}.super_scale", value.super_scale)
            return
        stored = value.to(torch.bfloat16)
        if isinstance(grid, BlockGrid) or not torch.equal(stored.float(), value.float()):
            raise ValueError(f"{name}: float values that are not on grid {grid.name}")
        self.writer.write(name, stored)


@contextmanager
def write_packed(
    path: Path, plan: Plan, *, assets: Path, provenance: dict[str, Any], replace: bool = False
) -> Iterator[PackedWriter]:
    """Create a PackedModel folder; it appears under `path` only when every tensor was added."""
    specs = {part: spec for tensor in plan for part, spec in _parts(tensor).items()}
    metadata = {
        "format": FORMAT,
        "recipe": plan.recipe.to_toml(),
        "config": json.dumps(plan.model.config),
        "plan": plan.digest,
        "provenance": json.dumps(provenance),
    }
    with new_path(path, replace=replace) as temporary:
        temporary.mkdir()
        copy_assets(assets, temporary)
        config = json.dumps(plan.model.config, indent=2) + "\n"
        (temporary / "config.json").write_text(config, "utf-8")
        with SafetensorsWriter(temporary / FILE_NAME, specs, metadata) as writer:
            yield PackedWriter(plan, writer)


@dataclass(frozen=True)
class PackedModel:
    """A packed model on disk. `read` gives one tensor; nothing is kept in memory.

    path: the folder. plan: as resolved when it was packed. provenance: how it was made.
    """

    path: Path
    plan: Plan
    provenance: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> PackedModel:
        """Raises ConfigError for anything that is not a complete packed model of this version."""
        path = Path(path)
        file_path = path / FILE_NAME
        if not file_path.is_file():
            raise ConfigError(f"{path}: no {FILE_NAME}: expected the folder that train or quantize wrote")
        with open_safetensors(file_path) as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - safe_open does not iterate
            stored = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        if metadata.get("format") != FORMAT:
            raise ConfigError(f"{file_path}: format {metadata.get('format')!r}: expected {FORMAT!r}")
        try:
            config, provenance = json.loads(metadata["config"]), json.loads(metadata["provenance"])
            recipe = Recipe.from_toml(metadata["recipe"], source=f"{file_path} recipe")
            if not isinstance(config, dict) or not isinstance(provenance, dict):
                raise ValueError("config and provenance are expected to be JSON objects")
        except (KeyError, ValueError, RecursionError) as error:
            raise ConfigError(f"{file_path}: damaged metadata: {error}") from error
        plan = make_plan(config, recipe)
        parts = {part: spec for tensor in plan for part, spec in _parts(tensor).items()}
        expected = {part: (SAFETENSORS_DTYPES[dtype], shape) for part, (dtype, shape) in parts.items()}
        if stored != expected:
            odd = sorted(set(stored.items()) ^ set(expected.items()))[0][0]
            raise ConfigError(f"{file_path}: tensor {odd} is missing, unexpected or not as planned")
        return cls(path, plan, provenance)

    def read(self, name: str) -> Quantized | Tensor:
        """A Quantized for a tensor on a BlockGrid, a bfloat16 tensor for one on a FloatGrid."""
        with open_safetensors(self.path / FILE_NAME) as file:
            return self._read(file, name)

    def __iter__(self) -> Iterator[tuple[PlannedTensor, Quantized | Tensor]]:
        """Every planned tensor with its value, in plan order, one at a time."""
        with open_safetensors(self.path / FILE_NAME) as file:
            for tensor in self.plan:
                yield tensor, self._read(file, tensor.name)

    def _read(self, file: Any, name: str) -> Quantized | Tensor:
        grid = self.plan[name].grid
        if not isinstance(grid, BlockGrid):
            return file.get_tensor(name)
        codes = file.get_tensor(f"{name}.codes")
        if fits_nibble(grid):
            codes = unpack_nibbles(codes, grid.code_min)
        lowest, highest = codes.aminmax() if codes.numel() else (grid.code_min, grid.code_max)
        if not grid.code_min <= int(lowest) <= int(highest) <= grid.code_max:
            raise InputError(f"{self.path}: {name}: codes outside {grid.code_min}..{grid.code_max}")
        super_scale = file.get_tensor(f"{name}.super_scale") if grid.super_block else None
        return Quantized(grid, codes, file.get_tensor(f"{name}.scale"), super_scale)

    def decode(self, name: str) -> Tensor:
        """float32 values of one tensor, equal to what every runtime decodes."""
        value = self.read(name)
        return value.decode() if isinstance(value, Quantized) else value.float()

    def sha256(self) -> str:
        """Of packed.safetensors."""
        return file_sha256(self.path / FILE_NAME)


def file_sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
