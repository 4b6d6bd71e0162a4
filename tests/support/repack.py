"""A packed model with other tensors or metadata, whose hashes are right again."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from intaglio.packed.model import FILE_NAME
from intaglio.packed.store import DIGESTS, SEAL, SafetensorsWriter, open_safetensors


def resave(folder: Path, tensors: dict[str, Tensor] | None = None, **metadata: str) -> None:
    """Write packed.safetensors again: a format before hashes is written without any."""
    path = folder / FILE_NAME
    with open_safetensors(path) as file:
        old = {key: value for key, value in file.metadata().items() if key not in (DIGESTS, SEAL)}
    values, said = load_file(path) | (tensors or {}), old | metadata
    specs = {name: (value.dtype, tuple(value.shape)) for name, value in values.items()}
    with SafetensorsWriter(
        path.with_suffix(".new"), specs, said, hashed=said["format"] != "intaglio-packed-1"
    ) as writer:
        for name, value in values.items():
            writer.write(name, value)
    path.with_suffix(".new").replace(path)  # tensors that were loaded may still be mapped from the old file
