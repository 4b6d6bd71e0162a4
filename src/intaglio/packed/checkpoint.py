"""Source checkpoints: a transformers folder, as a model to train or as a stream of tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import ConfigError
from intaglio.packed.store import open_safetensors
from intaglio.plan.family import ModelSpec, one_line, read_spec

# A transformers causal language model: its `model`, `config` and `generate` have no static types.
TextModel = Any

# A multimodal checkpoint nests its text model; the text model alone does not.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.")
# Folder names that say what lies in them, and not whose it is.
NAMELESS = ("model", "hf", "packed", "checkpoint", "merged", "final")


def model_name(model_dir: str | Path) -> str:
    """What a person calls the model of a folder: the folder's name, or its parent's where that says nothing."""
    path = Path(model_dir).resolve()
    return path.parent.name if path.name in NAMELESS and path.parent.name else path.name


def load_model(model_dir: str | Path, dtype: torch.dtype = torch.float32) -> TextModel:
    """The text model of a checkpoint folder, in eval mode, loaded by transformers.

    Weights are read in `dtype` rather than cast later: a cast of the whole model would round
    rotary tables too. Raises ConfigError for a folder that is incomplete or does not fit its config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(model_dir)
    spec = read_spec(path)
    for _ in _entries(path, spec):  # transformers would only say that something does not fit
        pass
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=AutoConfig.for_model(**spec.config),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            key_mapping={"^" + prefix.replace(".", r"\."): "model." for prefix in TEXT_PREFIXES},
        )
    except Exception as error:  # safetensors, JSON and shape errors come in many types
        raise ConfigError(f"{path}: transformers cannot load this checkpoint: {one_line(error)}") from error
    return model.eval()


def load_quantized(model_dir: str | Path) -> TextModel:
    """A folder whose config names a quantization that transformers reads, float32, in eval mode: nothing of ours.

    Raises ConfigError where transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    path = Path(model_dir)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ConfigError(f"{path}: transformers cannot load this folder: {one_line(error)}") from error
    return model.eval()


def load_tokenizer(model_dir: str | Path) -> Any:
    """The folder's tokenizer. ConfigError if there is none or it cannot be read."""
    from transformers import AutoTokenizer

    path = Path(model_dir)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"{path}: no usable tokenizer: {one_line(error)}") from error


def shards(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint, from its index where there is one."""
    index = model_dir / "model.safetensors.index.json"
    single = model_dir / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ConfigError(f"{model_dir}: no model.safetensors or model.safetensors.index.json: expected weights")
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{index}: not a shard index: {one_line(error)}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (model_dir / name).is_file():
            raise ConfigError(f"{index}: lists {name!r}, which is not a file of this folder")
    return [model_dir / name for name in names]


def stream_tensors(model_dir: Path, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the text model under its own name, one at a time, in the order of the files.

    Tensors that the model does not use (towers, unused k/v of KV-shared layers) are passed over.
    Raises ConfigError for a tensor that is missing or has another shape than the config says.
    """
    for name, file, stored_name in _entries(model_dir, spec):
        yield name, file.get_tensor(stored_name)


def _entries(model_dir: Path, spec: ModelSpec) -> Iterator[tuple[str, Any, str]]:
    """Name of each tensor, the open file that holds it and its name there; the headers alone are read."""
    wanted = {t.name: t.shape for t in spec.tensors}
    for shard in shards(model_dir):
        with open_safetensors(shard) as file:
            for stored_name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                name = _text_name(stored_name)
                if name not in wanted:
                    continue
                shape = file.get_slice(stored_name).get_shape()
                if tuple(shape) != wanted[name]:
                    raise ConfigError(
                        f"{shard}: {stored_name} has shape {shape}, the config says {list(wanted[name])}: "
                        "config and weights are of different models"
                    )
                del wanted[name]
                yield name, file, stored_name
    if wanted:
        raise ConfigError(f"{model_dir}: {len(wanted)} tensors are missing, the first is {sorted(wanted)[0]}")


def _text_name(stored_name: str) -> str:
    for prefix in TEXT_PREFIXES:
        if stored_name.startswith(prefix):
            return "model." + stored_name.removeprefix(prefix)
    return stored_name
