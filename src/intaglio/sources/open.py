"""Opening a checkpoint of any kind: what it is, and its tensors."""

from __future__ import annotations

import math
from pathlib import Path

from intaglio.errors import ConfigError
from intaglio.packed.checkpoint import tensor_files
from intaglio.packed.model import FILE_NAME as PACKED_FILE
from intaglio.packed.store import SafetensorsReader, headers
from intaglio.plan.family import load_config
from intaglio.sources.coded import mobile_tensors, w4a16_tensors
from intaglio.sources.stored import Source, Stored, open_gguf


def open_source(path: str | Path) -> Source:
    """A folder, a .safetensors file or a .gguf file. ConfigError for anything else, and for damaged ones."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file or folder: expected a checkpoint's folder, a .safetensors or a .gguf")
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        return open_gguf(path)
    if path.suffix == ".safetensors":
        return Source(path, "floats", _safetensors({path: None}))
    raise ConfigError(f"{path}: neither GGUF nor .safetensors: expected one of them, or a checkpoint's folder")


def _open_folder(path: Path) -> Source:
    if (path / PACKED_FILE).is_file():
        return Source(path, "packed", (), load_config(path))
    config = load_config(path) if (path / "config.json").is_file() else None
    quantization = (config or {}).get("quantization_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    method = quantization.get("quant_method")
    tensors = _safetensors(dict.fromkeys(tensor_files(path).values()))
    if method == "gemma":
        return Source(path, "mobile", mobile_tensors(path, tensors, quantization), config)
    if method == "compressed-tensors":
        return Source(path, "w4a16", w4a16_tensors(path, tensors, quantization), config)
    if method is not None:
        raise ConfigError(
            f"{path}: quant_method {method!r}: expected a float checkpoint, 'gemma' (mobile) or 'compressed-tensors'"
        )
    return Source(path, "floats", tensors, config)


def _safetensors(files: dict[Path, None]) -> tuple[Stored, ...]:
    tensors = []
    for file in files:
        reader = SafetensorsReader(file)
        for name, (kind, shape) in headers(file).items():
            size = math.prod(shape) * int("".join(filter(str.isdigit, kind.split("_")[0])) or 8) // 8
            tensors.append(Stored(name, kind, shape, size, reader))
    return tuple(tensors)
