"""Source checkpoints: a transformers folder, as a model to train or as a stream of tensors."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import ConfigError
from intaglio.packed.identity import CHECKPOINT, CONFIG, FLOAT_KINDS, PACKED, expect
from intaglio.packed.names import TEXT_PREFIXES, WRAPPED, check_rest, is_tower, missing, own_name, untied
from intaglio.packed.shards import INDEX, SINGLE, shards, tensor_files
from intaglio.packed.store import SafetensorsReader, headers, open_safetensors, row_slices
from intaglio.plan.carried import describe_whole, unused_names
from intaglio.plan.families import WHOLES
from intaglio.plan.family import (
    ModelSpec,
    TensorSpec,
    build_meta_model,
    load_config,
    read_spec,
    text_config,
    transformers_config,
)
from intaglio.plan.files import one_line, read_json
from intaglio.plan.hub import find_model
from intaglio.plan.plan import HEAD

# A transformers causal language model: its `model`, `config` and `generate` have no static types.
TextModel = Any


def load_model(
    model_dir: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> TextModel:
    """The text model of a checkpoint folder, or of a name of the Hub, in eval mode, loaded by transformers.

    Weights are read in `dtype` rather than cast later: a cast of the whole model would round
    rotary tables too. Each goes from the file to `device`, so that a model on a GPU is never whole on the host.
    Raises ConfigError for anything but a whole checkpoint of floats, and for one that is incomplete or does not fit
    its config.
    """
    from transformers import AutoModelForCausalLM

    path = find_model(model_dir)
    expect(path, CHECKPOINT)
    spec = read_spec(path)
    entries = _entries(path, spec.tensors, spec)  # transformers would only say that something does not fit
    # transformers reads no names of wrappers, and no index without metadata
    by_us = any(WRAPPED.search(name) for found in entries.values() for _, name in found)
    by_us |= (path / INDEX).is_file() and "metadata" not in read_json(path / INDEX)
    loader: Any = type(build_meta_model(spec.config)) if by_us else AutoModelForCausalLM
    try:
        model = loader.from_pretrained(
            None if by_us else path,
            state_dict=dict(stream_rows(path, spec)) if by_us else None,
            config=transformers_config(spec.config),
            dtype=dtype,
            device_map={"": torch.device(device)},
            local_files_only=True,
            trust_remote_code=False,
            key_mapping={"^" + prefix.replace(".", r"\."): "model." for prefix in TEXT_PREFIXES},
        )
    except Exception as error:  # safetensors, JSON and shape errors come in many types
        raise ConfigError(f"{path}: transformers cannot load this checkpoint: {one_line(error)}") from error
    return model.eval()


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
    unmended = {name for name in odd if not name.endswith(".embedding_scale")}
    wrong = sorted(info["missing_keys"] | info["unexpected_keys"] | unmended)
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


def checkpoint_spec(
    model_dir: str | Path, *, text_only: bool = False, kinds: tuple[str, ...] = (CHECKPOINT,)
) -> ModelSpec:
    """The model of a folder with all that its files hold beside the text model; `text_only` leaves towers out.

    kinds: of folders that the caller can use, as `identity` names them. Without weights, the config alone tells.
    Raises ConfigError for another kind, and as `describe` does.
    """
    path = Path(model_dir)
    found = expect(path, *kinds)
    config = load_config(path)
    try:
        alone = describe_whole(config)
        stored = tensor_files(path) if found.kind not in (CONFIG, PACKED) and path.is_dir() else {}
        unused = unused_names(map(own_name, stored), alone)
        model = replace(alone, carried=describe_whole(text_config(config), unused).carried + alone.carried)
    except ConfigError as error:
        raise ConfigError(f"{model_dir}: {error}") from error
    return model.text_only() if text_only else model


def check_weights(model_dir: Path, spec: ModelSpec) -> None:
    """Raise ConfigError where a folder's weights are not those of the model; only their headers are read."""
    _entries(model_dir, spec.tensors + spec.carried, spec)


def notes(model_dir: str | Path, spec: ModelSpec) -> list[str]:
    """Sentences for the user of a checkpoint: parts that are left out, and names that are shortened."""
    path, said = Path(model_dir), []
    config = load_config(path)
    if spec.whole is None and text_config(config) is not config:
        kinds = [kind for kind in ("vision", "audio") if config.get(f"{kind}_config")]
        reason = "" if config["model_type"] in WHOLES else f", since intaglio reads no towers of {config['model_type']}"
        said.append(f"{path}: the text model alone is taken: {' and '.join(kinds) or 'no'} towers are left out{reason}")
    if not (path / SINGLE).is_file() and not (path / INDEX).is_file():
        return said
    names = list(tensor_files(path))
    if text_config(config) is config and (tower := next((n for n in names if is_tower(own_name(n))), None)):
        said.append(f"{path}: config.json is of a text model alone: towers are left out ({tower}, ...)")
    wrapped = next((match[0] for name in names if (match := WRAPPED.search(name))), None)
    if wrapped is not None:
        said.append(f"{path}: names hold {wrapped!r}, which a wrapper put there: it is taken off")
    return said


def stream_rows(
    model_dir: str | Path, spec: ModelSpec, rows: dict[str, slice] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the text model under its own name, one at a time, in the order of the files.

    rows: of each tensor, if not all; only they are read from disk. Towers and tensors that are known to be unused are
    passed over. Raises ConfigError for a tensor that is missing, has another shape than the config says, is of no
    float type or has no place in the model.
    """
    for shard, entries in _entries(Path(model_dir), spec.tensors, spec).items():
        with SafetensorsReader(shard) as file:
            for tensor, stored_name in entries:
                part = slice(None) if rows is None else rows[tensor.name]
                yield tensor.name, file.read(stored_name, None if part == slice(None) else part)


def stored_dtype(model_dir: str | Path, spec: ModelSpec) -> torch.dtype:
    """bfloat16 if all the text model's tensors are stored in it, else float32, which holds any of them exactly."""
    kinds: set[str] = set()
    for shard, entries in _entries(Path(model_dir), spec.tensors, spec).items():
        stored = headers(shard)
        kinds |= {stored[name][0] for _, name in entries}
    return torch.bfloat16 if kinds <= {"BF16", "I64"} else torch.float32


def stream_chunks(
    model_dir: Path, spec: ModelSpec, *, only: Container[str] | None = None
) -> Iterator[tuple[str, slice | None, Tensor]]:
    """Each tensor of the model and of what is carried with it, a few rows at a time: name, rows and values.

    only: names of the tensors that are wanted, if not all. The rows are None where they are all. Order and errors as
    in `stream_rows`.
    """
    for shard, entries in _entries(model_dir, spec.tensors + spec.carried, spec).items():
        with SafetensorsReader(shard) as file:
            for tensor, stored_name in entries:
                for rows in row_slices(tensor.shape) if only is None or tensor.name in only else ():
                    yield tensor.name, rows, file.read(stored_name, rows)


class TensorReader:
    """Tensors of a folder's text model by name. Where each lies is looked up once. Errors as in `stream_rows`."""

    def __init__(self, model_dir: Path, spec: ModelSpec):
        entries = _entries(model_dir, spec.tensors, spec)
        self.places = {tensor.name: (shard, name) for shard, found in entries.items() for tensor, name in found}

    def read(self, names: Iterable[str], *, pinned: bool = False) -> dict[str, Tensor]:
        """These tensors, in memory of their own, from which a GPU copies faster where it is pinned."""
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            files: dict[Path, SafetensorsReader] = {}
            for name in names:
                shard, stored_name = self.places[name]
                if shard not in files:
                    files[shard] = stack.enter_context(SafetensorsReader(shard))
                tensor = files[shard].read(stored_name)
                found[name] = tensor.pin_memory() if pinned else tensor.clone()
        return found


def _entries(
    model_dir: Path, tensors: tuple[TensorSpec, ...], spec: ModelSpec
) -> dict[Path, list[tuple[TensorSpec, str]]]:
    """The file that each of these tensors is in, and its name there; but for a head, the headers alone are read."""
    expect(model_dir, CHECKPOINT)
    wanted = {t.name: t for t in tensors}
    stored: dict[str, str] = {}  # by our names, what the files call them
    found: dict[Path, list[tuple[TensorSpec, str]]] = {}
    files = tensor_files(model_dir)
    for stored_name in files:
        name = own_name(stored_name)
        if stored.setdefault(name, stored_name) != stored_name:
            raise ConfigError(f"{model_dir}: {stored[name]} and {stored_name} are one tensor: expected one of them")
    for shard in dict.fromkeys(files.values()):
        found[shard] = []
        for stored_name, (kind, shape) in headers(shard).items():
            tensor = wanted.pop(own_name(stored_name), None)
            if tensor is None:
                continue
            if shape != tensor.shape:
                raise ConfigError(
                    f"{shard}: {stored_name} has shape {list(shape)}, the config says {list(tensor.shape)}: "
                    "config and weights are of different models"
                )
            if kind not in (("I64", "I32") if tensor.role == "token_ordering" else FLOAT_KINDS):
                raise ConfigError(f"{shard}: {stored_name} is of type {kind}: expected floats: download it again")
            found[shard].append((tensor, stored_name))
    known = {t.name for t in tensors}
    if wanted:
        raise ConfigError(f"{model_dir}: {missing(wanted, list(files), known)}")
    rest = {name: stored[name] for name in stored.keys() - known}
    if spec.tied_head and HEAD in rest:
        _check_tied(model_dir, rest.pop(HEAD), spec, files)
    check_rest(model_dir, rest, spec)
    return found


def _check_tied(model_dir: Path, head: str, spec: ModelSpec, files: dict[str, Path]) -> None:
    """Raise ConfigError where config.json says that the head is the embedding, and the files hold another head."""
    embedding = next(tensor for tensor in spec.tensors if tensor.role == "token_embedding")
    stored = next(name for name in files if own_name(name) == embedding.name)
    with SafetensorsReader(files[head]) as first, SafetensorsReader(files[stored]) as second:
        same = headers(files[head])[head][1] == embedding.shape and all(
            torch.equal(first.read(head, rows), second.read(stored, rows)) for rows in row_slices(embedding.shape)
        )
    if not same:
        raise untied(model_dir, head, stored)
