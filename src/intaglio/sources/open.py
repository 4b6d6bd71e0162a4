"""Opens a checkpoint of any kind: its kind, and its tensors."""

from __future__ import annotations

import math
from pathlib import Path

from intaglio.errors import ConfigError
from intaglio.packed.identity import CHECKPOINT, COMPRESSED, GGUF, MOBILE, PACKED, TENSORS, WEIGHTS, expect
from intaglio.packed.shards import tensor_files
from intaglio.packed.store import SafetensorsReader, headers
from intaglio.plan.family import load_config
from intaglio.plan.hub import ARTIFACT, find_model
from intaglio.sources.coded import mobile_tensors, w4a16_tensors
from intaglio.sources.stored import Source, Stored, open_gguf


def open_source(path: str | Path) -> Source:
    """A folder, a .safetensors or .gguf file, or a name of the Hub. ConfigError for other kinds and damaged ones."""
    path = find_model(path, files=ARTIFACT)
    kind = expect(path, CHECKPOINT, WEIGHTS, TENSORS, MOBILE, COMPRESSED, GGUF, PACKED).kind
    if kind == GGUF:
        return open_gguf(path if path.is_file() else _only_gguf(path))
    if kind == TENSORS:
        return Source(path, "floats", _safetensors({path: None}))
    config = load_config(path) if kind != WEIGHTS else None
    if kind == PACKED:
        return Source(path, "packed", (), config)
    tensors = _safetensors(dict.fromkeys(tensor_files(path).values()))
    quantization = (config or {}).get("quantization_config") or {}
    if kind == MOBILE:
        return Source(path, "mobile", mobile_tensors(path, tensors, quantization), config)
    if kind == COMPRESSED:
        return Source(path, "w4a16", w4a16_tensors(path, tensors, quantization), config)
    return Source(path, "floats", tensors, config)


def _only_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise ConfigError(f"{folder}: holds {len(found)} GGUF files: name one of them, for example {found[0]}")
    return found[0]


def _safetensors(files: dict[Path, None]) -> tuple[Stored, ...]:
    tensors = []
    for file in files:
        reader = SafetensorsReader(file)
        for name, (kind, shape) in headers(file).items():
            size = math.prod(shape) * int("".join(filter(str.isdigit, kind.split("_")[0])) or 8) // 8
            tensors.append(Stored(name, kind, shape, size, reader))
    return tuple(tensors)
