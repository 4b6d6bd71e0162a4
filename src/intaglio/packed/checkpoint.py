"""Source checkpoints: a transformers folder, as a model to train or as a stream of tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import ConfigError
from intaglio.packed.store import SafetensorsReader, headers, open_safetensors, row_slices
from intaglio.plan.carried import describe_whole, unused_names
from intaglio.plan.family import TOWER_ROLES, ModelSpec, TensorSpec, load_config, one_line, read_spec, text_config

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


def load_model(
    model_dir: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> TextModel:
    """The text model of a checkpoint folder, in eval mode, loaded by transformers.

    Weights are read in `dtype` rather than cast later: a cast of the whole model would round
    rotary tables too. Each goes from the file to `device`, so that a model on a GPU is never whole on the host.
    Raises ConfigError for a folder that is incomplete or does not fit its config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(model_dir)
    if is_mobile(path):
        raise ConfigError(f"{path}: is in the mobile format, whose weights are no floats: `convert` it first")
    spec = read_spec(path)
    _entries(path, spec.tensors)  # transformers would only say that something does not fit
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=AutoConfig.for_model(**spec.config),
            dtype=dtype,
            device_map={"": torch.device(device)},
            local_files_only=True,
            trust_remote_code=False,
            key_mapping={"^" + prefix.replace(".", r"\."): "model." for prefix in TEXT_PREFIXES},
        )
    except Exception as error:  # safetensors, JSON and shape errors come in many types
        raise ConfigError(f"{path}: transformers cannot load this checkpoint: {one_line(error)}") from error
    return model.eval()


def is_mobile(model_dir: str | Path) -> bool:
    """Whether a folder's config says that its weights are in the Gemma mobile format."""
    path = Path(model_dir)
    quantization = load_config(path).get("quantization_config") if (path / "config.json").is_file() else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == "gemma"


def load_quantized(model_dir: str | Path, dtype: torch.dtype = torch.float32) -> TextModel:
    """A folder whose config names a quantization that transformers reads, in eval mode, opened by its own reader.

    From 5.23 on, transformers wants a scale of shape [V, 1] for every embedding, though its reader
    computes with [V, L] as the table of per-layer embeddings has; Google's files are refused too.
    There the model is loaded without these scales, which then take their places. ConfigError where
    transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    path = Path(model_dir)
    loaded: Any
    try:
        with _quietly("transformers.modeling_utils"):  # which reports what is mended below
            loaded = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # as in load_model
        raise ConfigError(f"{path}: transformers cannot load this checkpoint: {one_line(error)}") from error
    model, info = loaded
    odd = {name for name, *_ in info["mismatched_keys"]}
    mended = {name for name in odd if name.endswith(".embedding_scale")}
    wrong = sorted(info["missing_keys"] | info["unexpected_keys"] | odd - mended)
    if wrong:
        raise ConfigError(
            f"{path}: {len(wrong)} tensors are missing, unexpected or of a wrong shape, the first is {wrong[0]}"
        )
    for shard in shards(path) if odd else []:
        with open_safetensors(shard) as file:
            for name in odd & set(file.keys()):
                scale = torch.nn.Parameter(file.get_tensor(name).clone(), requires_grad=False)
                module = model.get_submodule(name.rpartition(".")[0])
                if scale.ndim != 2 or scale.shape[0] != module.num_embeddings or module.embedding_dim % scale.shape[1]:
                    raise ConfigError(f"{path}: {name} has shape {list(scale.shape)}, which does not fit its table")
                module.embedding_scale = scale
    return model.eval()


@contextmanager
def _quietly(logger_name: str) -> Iterator[None]:
    """Let this logger say nothing but errors meanwhile."""
    logger = logging.getLogger(logger_name)

    def only_errors(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(only_errors)  # its level is left alone: transformers does other things at other levels
    try:
        yield
    finally:
        logger.removeFilter(only_errors)


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


def tensor_files(model_dir: Path) -> dict[str, Path]:
    """In which file of a checkpoint each tensor is, file by file.

    Raises ConfigError for a tensor that two shards hold, and for one that the index promises of a shard which
    has no such tensor.
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
    index = model_dir / "model.safetensors.index.json"
    if index.is_file() and not (model_dir / "model.safetensors").is_file():
        for name, shard_name in json.loads(index.read_text("utf-8"))["weight_map"].items():
            if name not in files or files[name].name != shard_name:
                found = files[name].name if name in files else "no shard"
                raise ConfigError(f"{index}: puts {name} into {shard_name}, but {found} holds it: download it again")
    return files


def checkpoint_spec(model_dir: str | Path, *, text_only: bool = False) -> ModelSpec:
    """The model of a folder with all that its files hold beside the text model; `text_only` leaves towers out.

    Without weights, what the config alone tells. Raises ConfigError as `describe` does.
    """
    path = Path(model_dir)
    config = load_config(path)
    try:
        alone = describe_whole(config)
        unused = unused_names(map(own_name, _stored_names(path)), alone) if path.is_dir() else []
        model = replace(alone, carried=describe_whole(text_config(config), unused).carried + alone.carried)
    except ConfigError as error:
        raise ConfigError(f"{model_dir}: {error}") from error
    return model.text_only() if text_only else model


def has_weights(model_dir: Path) -> bool:
    """Whether a folder has float weights to compare a config with."""
    return any(model_dir.glob("model*.safetensors*"))


def check_weights(model_dir: Path, spec: ModelSpec) -> None:
    """Raise ConfigError where a folder's weights are not those of the model; only their headers are read."""
    _entries(model_dir, spec.tensors + spec.carried)


def _stored_names(model_dir: Path) -> Iterator[str]:
    if has_weights(model_dir):
        yield from tensor_files(model_dir)


def stream_tensors(model_dir: Path, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the text model under its own name, one at a time, in the order of the files.

    Tensors that the model does not use (towers, unused k/v of KV-shared layers) are passed over.
    Raises ConfigError for a tensor that is missing or has another shape than the config says.
    """
    for shard, entries in _entries(model_dir, spec.tensors).items():
        with SafetensorsReader(shard) as file:
            for tensor, stored_name in entries:
                yield tensor.name, file.read(stored_name)


def stream_rows(model_dir: str | Path, spec: ModelSpec, rows: dict[str, slice]) -> Iterator[tuple[str, Tensor]]:
    """These rows of each tensor of the text model, in the order of the files: only they are read from disk."""
    for shard, entries in _entries(Path(model_dir), spec.tensors).items():
        with SafetensorsReader(shard) as file:
            for tensor, stored_name in entries:
                part = rows[tensor.name]
                yield tensor.name, file.read(stored_name, None if part == slice(None) else part)


def stored_dtype(model_dir: str | Path, spec: ModelSpec) -> torch.dtype:
    """bfloat16 if all the text model's tensors are stored in it, else float32, which holds any of them exactly."""
    wanted = {name for entries in _entries(Path(model_dir), spec.tensors).values() for _, name in entries}
    kinds = {
        dtype for shard in shards(Path(model_dir)) for name, (dtype, _) in headers(shard).items() if name in wanted
    }
    return torch.bfloat16 if kinds <= {"BF16", "I64"} else torch.float32


def stream_chunks(model_dir: Path, spec: ModelSpec) -> Iterator[tuple[str, slice | None, Tensor]]:
    """Each tensor of the model and of what is carried with it, a few rows at a time: name, rows and values.

    The rows are None where they are all. Order and errors as in `stream_tensors`.
    """
    for shard, entries in _entries(model_dir, spec.tensors + spec.carried).items():
        with SafetensorsReader(shard) as file:
            for tensor, stored_name in entries:
                for rows in row_slices(tensor.shape):
                    yield tensor.name, rows, file.read(stored_name, rows)


def _entries(model_dir: Path, tensors: tuple[TensorSpec, ...]) -> dict[Path, list[tuple[TensorSpec, str]]]:
    """In which file each tensor is, and its name there; the headers alone are read."""
    wanted = {t.name: t for t in tensors}
    found: dict[Path, list[tuple[TensorSpec, str]]] = {}
    for shard in dict.fromkeys(tensor_files(model_dir).values()):
        found[shard] = []
        with open_safetensors(shard) as file:
            for stored_name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                tensor = wanted.pop(own_name(stored_name), None)
                if tensor is None:
                    continue
                shape = file.get_slice(stored_name).get_shape()
                if tuple(shape) != tensor.shape:
                    raise ConfigError(
                        f"{shard}: {stored_name} has shape {shape}, the config says {list(tensor.shape)}: "
                        "config and weights are of different models"
                    )
                found[shard].append((tensor, stored_name))
    if wanted:
        first = wanted[min(wanted)]
        advice = ": to do without towers, say --text-only" if first.role in TOWER_ROLES else ""
        raise ConfigError(f"{model_dir}: {len(wanted)} tensors are missing, the first is {first.name}{advice}")
    return found


def own_name(stored_name: str) -> str:
    """Our name of a tensor that a checkpoint's file calls so."""
    for prefix in TEXT_PREFIXES:
        if stored_name.startswith(prefix):
            return "model." + stored_name.removeprefix(prefix)
    return stored_name
