"""The safetensors files of a checkpoint, and the tensors in each."""

from __future__ import annotations

import re
from pathlib import Path

from intaglio.errors import ConfigError
from intaglio.packed.store import open_safetensors
from intaglio.plan.files import read_json, reading

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NUMBERED = re.compile(r"model-\d+-of-\d+\.safetensors")


def shards(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint, from its index where there is one.

    Raises ConfigError for a folder without weights, for a damaged index, and for files that the index
    contradicts: a whole model beside an index of other files, or a numbered shard that the index does not list.
    """
    index = model_dir / INDEX
    single = model_dir / SINGLE
    numbered = sorted(path.name for path in model_dir.glob("model-*") if NUMBERED.fullmatch(path.name))
    if not index.is_file():
        if not single.is_file():
            raise ConfigError(f"{model_dir}: no {SINGLE} or {INDEX}: expected weights{unlisted(model_dir)}")
        if numbered:
            raise ConfigError(
                f"{model_dir}: {SINGLE} is a whole model, and {numbered[0]} is a shard of another without its {INDEX}: "
                "remove the one that is out of date"
            )
        return [single]
    names = sorted(set(_weight_map(index).values()))
    if single.is_file() and SINGLE not in names:
        raise ConfigError(
            f"{model_dir}: {SINGLE} is a whole model, and {INDEX} lists other files ({names[0]}, ...): "
            "remove the one that is out of date"
        )
    for name in names:
        if not (model_dir / name).is_file():
            raise ConfigError(f"{index}: lists {name!r}, which is not a file of this folder")
    stray = [name for name in numbered if name not in names]
    if stray:
        raise ConfigError(
            f"{model_dir}: {stray[0]} is a shard that {INDEX} does not list: remove it, or download both again"
        )
    return [model_dir / name for name in names]


def unlisted(folder: Path) -> str:
    """Words for a message about missing weights: a safetensors file that is there all the same."""
    odd = sorted(path.name for path in folder.glob("*.safetensors"))
    if odd and NUMBERED.fullmatch(odd[0]):
        return f" (there is the shard {odd[0]}: download {INDEX} too)"
    return f" (there is {odd[0]}, which no index lists)" if odd else ""


def tensor_files(model_dir: Path) -> dict[str, Path]:
    """The file of a checkpoint that each tensor is in, file by file.

    Raises ConfigError for a tensor that two shards hold, and for one that the index promises of a shard which
    has no such tensor; else as `shards`.
    """
    files: dict[str, Path] = {}
    for shard in shards(model_dir):
        with open_safetensors(shard) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                if name in files:
                    raise ConfigError(
                        f"{model_dir}: {name} is in {files[name].name} and in {shard.name}: expected once"
                    )
                files[name] = shard
    index = model_dir / INDEX
    if index.is_file():
        listed = _weight_map(index)
        for name, shard_name in listed.items():
            if name not in files or files[name].name != shard_name:
                found = files[name].name if name in files else "no shard"
                raise ConfigError(f"{index}: puts {name} into {shard_name}, but {found} holds it: download it again")
        more = sorted(files.keys() - listed.keys())
        if more:
            raise ConfigError(f"{index}: does not list {more[0]}, which {files[more[0]].name} holds: download it again")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    with reading(index, "not a shard index"):
        found: dict[str, str] = read_json(index)["weight_map"]
        if not found:
            raise ValueError("its weight_map is empty")
        for name in found.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise ConfigError(f"{index}: lists {name!r}, which is not a file of this folder")
        return found
