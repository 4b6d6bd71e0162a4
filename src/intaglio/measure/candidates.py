"""Packed models, and artifacts in their own runtimes: as candidates beside the original, and as engines for text."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from intaglio.errors import ConfigError, InputError
from intaglio.formats.speech import read_speech
from intaglio.formats.words.read import is_mlx
from intaglio.measure.engine import ChatFormat, Engine, Transformers
from intaglio.measure.evaluate import Candidate, logits_of, transformers_runtime
from intaglio.measure.int8_cache import int8_source
from intaglio.measure.llamacpp import LlamaCpp
from intaglio.measure.original import Original, measuring_dtype
from intaglio.measure.simulate import decoded_model, load_simulated
from intaglio.packed.checkpoint import TextModel, load_model, load_quantized
from intaglio.packed.identity import CHECKPOINT, COMPRESSED, GGUF, MOBILE, PACKED, QUANTIZED, Found, expect, look
from intaglio.packed.model import PackedModel
from intaglio.plan.family import check_runs_alone, load_config, read_spec
from intaglio.train.static import switch_static


def artifact_candidate(path: Path, stack: ExitStack, original: Original) -> Candidate:
    """An exported file or folder in its own runtime, on the original's windows.

    llama.cpp runs a .gguf. transformers runs a folder, on the original's device and in its dtype.
    """
    found = look(path)
    if found.kind == GGUF and path.is_file():
        llama = stack.enter_context(LlamaCpp(path))
        return Candidate(source=llama.logits, runtime=llama.version, simulated=False)
    model = _open_folder(found, original.model.dtype, original.model.device)
    source = logits_of(model, original.windows_NT, original.batch)
    return Candidate(source=source, runtime=transformers_runtime(), simulated=False)


def packed_candidate(original: Original, packed: PackedModel, int8_cache: bool) -> Candidate:
    """A packed model, simulated on the original's windows and device; int8_cache: token by token, through one.

    Raises InputError for an int8 cache where the packed model has no scales for one.
    """
    model = decoded_model(original.model, packed)
    if not int8_cache:
        source: Any = logits_of(model, original.windows_NT, original.batch)
    else:
        if packed.plan.recipe.kv_cache is None:
            raise InputError(f"{packed.path}: recipe {packed.plan.recipe.name} leaves the KV cache in floats")
        switch_static(model, activations=True, kv_cache=False)  # the cache itself rounds them
        source = int8_source(model, original.windows_NT, packed.read_static())
    return Candidate(source=source, runtime=transformers_runtime(), simulated=True)


def open_engine(path: Path, stack: ExitStack, *, context_tokens: int, device: torch.device) -> Engine:
    """A model that reads and writes text: a .gguf in llama.cpp, a folder or a packed model in transformers.

    transformers computes in float32, or in bfloat16 where a GPU has no room for two such models; a packed model is
    simulated in float32. Raises ConfigError for anything else, for a drafter, and for a folder without a tokenizer.
    """
    found = expect(path, PACKED, GGUF, CHECKPOINT, MOBILE, COMPRESSED, QUANTIZED)
    if found.kind == GGUF:
        return stack.enter_context(LlamaCpp(path, context_tokens=context_tokens))
    packed = PackedModel.open(path) if found.kind == PACKED else None
    spec = packed.plan.model if packed else read_spec(path)
    check_runs_alone(spec, path)
    speech = read_speech(path, spec.config)
    if speech is None:
        raise ConfigError(f"{path}: has no tokenizer, and text cannot be read without one: copy the original's into it")
    if packed is not None:
        packed.check()
        model = load_simulated(packed).to(device)
    else:
        model = _open_folder(found, measuring_dtype(sum(tensor.numel for tensor in spec.tensors), device), device)
    first = speech.tokenizer.bos_token_id
    chat_format = ChatFormat(
        template=speech.templates.get("default", ""),
        special=dict(speech.tokenizer.special_tokens_map),
        first=-1 if first is None else first,
        ends=frozenset(speech.end_ids),
    )
    runtime = transformers_runtime() + (", simulated" if packed else "")
    return Transformers(
        path, model, speech.tokenizer, chat_format=chat_format, version=runtime, context_tokens=context_tokens
    )


def _open_folder(found: Found, dtype: torch.dtype, device: torch.device) -> TextModel:
    """A folder as transformers opens it. InputError for one that only mlx-lm reads."""
    path = found.path
    if is_mlx(path):
        raise InputError(f"{path}: a folder for mlx-lm, which does not run here: take the packed model instead")
    if found.kind in (MOBILE, COMPRESSED, QUANTIZED) and "quantization_config" in load_config(path):
        return load_quantized(path, dtype).to(device)
    return load_model(path, dtype, device)
