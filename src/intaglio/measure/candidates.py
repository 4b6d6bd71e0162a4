"""Models that are compared with the original: packed models, and artifacts in their own runtimes."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from intaglio.errors import InputError
from intaglio.formats.words.read import is_mlx
from intaglio.measure.evaluate import Candidate, logits_of, transformers_runtime
from intaglio.measure.int8_cache import int8_source
from intaglio.measure.llamacpp import LlamaCpp
from intaglio.measure.original import Original
from intaglio.measure.simulate import decoded_model
from intaglio.packed.checkpoint import load_model, load_quantized
from intaglio.packed.identity import COMPRESSED, GGUF, MOBILE, QUANTIZED, look
from intaglio.packed.model import PackedModel
from intaglio.plan.family import load_config
from intaglio.train.static import switch_static


def artifact_candidate(path: Path, stack: ExitStack, original: Original) -> Candidate:
    """An exported file or folder in its own runtime, on the original's windows.

    llama.cpp runs a .gguf. transformers runs a folder, on the original's device and in its dtype.
    """
    found = look(path)
    if found.kind == GGUF and path.is_file():
        llama = stack.enter_context(LlamaCpp(path))
        return Candidate(source=llama.logits, runtime=llama.version, simulated=False)
    if is_mlx(path):
        raise InputError(f"{path}: a folder for mlx-lm, which measures nothing here: measure the packed model instead")
    device, dtype = original.model.device, original.model.dtype
    quantized = found.kind in (MOBILE, COMPRESSED, QUANTIZED) and "quantization_config" in load_config(path)
    model = load_quantized(path, dtype).to(device) if quantized else load_model(path, dtype, device)
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
