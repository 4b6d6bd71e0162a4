"""Source checkpoints: a transformers folder, as a model to train or as a stream of tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.errors import ConfigError
from intaglio.packed.store import open_safetensors
from intaglio.plan.family import ModelSpec, describe, load_config, text_config

# A multimodal checkpoint nests its text model; the text model alone does not.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.")


def load_model(model_dir: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The text model of a checkpoint folder, in eval mode, loaded by transformers.

    Weights are read in `dtype` rather than cast later: a cast of the whole model would round
    rotary tables too. Raises ConfigError for a folder that is incomplete or does not fit its config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(model_dir)
    config = text_config(load_config(path))
    shards(path)
    spec = describe(config)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=AutoConfig.for_model(**config),
            dtype=dtype,
            local_files_only=True,
            key_mapping={"^" + prefix.replace(".", r"\."): "model." for prefix in TEXT_PREFIXES},
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, JSON and shape errors come in many types
        raise ConfigError(f"{path}: transformers cannot load this checkpoint: {_first_line(error)}") from error
    missing = sorted({t.name for t in spec.tensors} & set(info["missing_keys"]))
    if missing:
        raise ConfigError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return model.eval()


def load_tokenizer(model_dir: str | Path) -> Any:
    """The folder's tokenizer. ConfigError if there is none or it cannot be read."""
    from transformers import AutoTokenizer

    path = Path(model_dir)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise ConfigError(f"{path}: no usable tokenizer: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


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
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{index}: not a shard index: {_first_line(error)}") from None
    for name in names:
        if Path(name).name != name or not (model_dir / name).is_file():
            raise ConfigError(f"{index}: lists {name!r}, which is not a file of this folder")
    return [model_dir / name for name in names]


def stream_tensors(model_dir: Path, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the text model under its own name, one at a time, in the order of the files.

    Tensors that the model does not use (towers, unused k/v of KV-shared layers) are passed over.
    Raises ConfigError for a tensor that is missing or has another shape than the config says.
    """
    wanted = {t.name: t.shape for t in spec.tensors}
    for shard in shards(model_dir):
        with open_safetensors(shard) as file:
            for stored_name in file.keys():
                name = _text_name(stored_name)
                if name not in wanted:
                    continue
                tensor = file.get_tensor(stored_name)
                if tuple(tensor.shape) != wanted[name]:
                    raise ConfigError(
                        f"{shard}: {stored_name} has shape {list(tensor.shape)}, the config says {list(wanted[name])}"
                    )
                del wanted[name]
                yield name, tensor
    if wanted:
        raise ConfigError(f"{model_dir}: {len(wanted)} tensors are missing, the first is {sorted(wanted)[0]}")


def _text_name(stored_name: str) -> str:
    for prefix in TEXT_PREFIXES:
        if stored_name.startswith(prefix):
            return "model." + stored_name.removeprefix(prefix)
    return stored_name
