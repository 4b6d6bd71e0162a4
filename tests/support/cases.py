"""Tiny models, packed and exported both ways."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.gguf.write import export_gguf
from intaglio.packed.model import PackedModel
from intaglio.plan.recipe import Recipe
from tests.support.tiny import FAMILY, GEMMA2, GEMMA3, GEMMA4, GEMMA4_DENSE, make_checkpoint, pack

CONFIGS = {"gemma4": GEMMA4, "gemma4-dense": GEMMA4_DENSE, "gemma3": GEMMA3, "gemma2": GEMMA2}


@dataclass(frozen=True)
class Case:
    """A tiny model: its checkpoint, packed model, GGUF file and transformers folder."""

    name: str
    checkpoint: Path
    packed: PackedModel
    gguf: Path
    hf: Path


def make_case(name: str, folder: Path, config: dict[str, Any] | None = None, recipe: Recipe | str = "q4_0") -> Case:
    """name: of CONFIGS, or of another kind of model in FAMILY, where no config is given."""
    checkpoint = make_checkpoint(folder / "checkpoint", config or CONFIGS.get(name) or FAMILY[name])
    packed = pack(checkpoint, folder / "packed", recipe)
    export_gguf(packed, folder / "model.gguf")
    export_hf(packed, folder / "hf")
    return Case(name, checkpoint, packed, folder / "model.gguf", folder / "hf")


def with_type(source: Path, target: Path, name: str, number: int) -> Path:
    """A copy of a GGUF file that says of one tensor that it is of another type."""
    data = bytearray(source.read_bytes())
    info = data.index(len(name).to_bytes(8, "little") + name.encode()) + 8 + len(name)
    at = info + 4 + 8 * int.from_bytes(data[info : info + 4], "little")  # behind the number of dimensions and each size
    data[at : at + 4] = number.to_bytes(4, "little")
    target.write_bytes(data)
    return target


def fields(path: Path) -> dict[str, Any]:
    """The keys of a GGUF file and what they hold."""
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}
