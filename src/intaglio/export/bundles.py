"""GGUF as Ollama and LM Studio take it: a folder with a Modelfile, and the folders of a model library.

Neither program is in a package registry, so neither was run: what is written follows their sources and
manuals (Ollama: docs/modelfile.md, and server/ for the renderers and parsers of `gemma4`), and the tests
parse it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from intaglio.errors import ConfigError
from intaglio.export.folder import silent
from intaglio.export.gguf import export_gguf
from intaglio.packed.model import PackedModel
from intaglio.packed.store import new_path
from intaglio.packed.verify import read_gguf
from intaglio.packed.verify_bundles import MODELFILE

# What ends a turn, and the names of Ollama's code that writes prompts and reads answers, where it has any.
STOP = {"gemma4": "<turn|>", "gemma3": "<end_of_turn>"}
OLLAMA_FORMAT = {"gemma4": "gemma4"}
SAMPLING = {"temperature": 1.0, "top_p": 0.95, "top_k": 64}  # Google's, for a model that says nothing else
PUBLISHER = "intaglio"
DRAFTER = "gemma4-assistant"  # general.architecture of a drafter's GGUF


def export_ollama(
    packed: PackedModel,
    path: str | Path,
    *,
    replace: bool = False,
    gguf: Path | None = None,
    draft: Path | None = None,
    on_progress: Callable[[int, int], None] = silent,
) -> None:
    """Write the folder `path` with model.gguf and a Modelfile, for `ollama create NAME -f path/Modelfile`.

    gguf: the model's GGUF where it is there already: linked, not written again. draft: the GGUF of a
    drafter, which goes along. Raises as `export_gguf`, and ConfigError for a drafter that does not fit the model.
    """
    _check_runs_alone(packed)
    if draft is not None:
        _check_draft(packed, draft)
    with new_path(Path(path), replace=replace) as temporary:
        temporary.mkdir()
        _place(packed, temporary / "model.gguf", gguf, on_progress)
        if draft is not None:
            shutil.copyfile(draft, temporary / "draft.gguf")
        (temporary / MODELFILE).write_text(modelfile(packed, with_draft=draft is not None), "utf-8")


def modelfile(packed: PackedModel, *, with_draft: bool = False) -> str:
    """The text of an Ollama Modelfile."""
    architecture = packed.plan.model.family.gguf_architecture
    lines = ["FROM ./model.gguf"] + ["DRAFT ./draft.gguf"] * with_draft
    if architecture in OLLAMA_FORMAT:
        lines += [f"RENDERER {OLLAMA_FORMAT[architecture]}", f"PARSER {OLLAMA_FORMAT[architecture]}"]
    lines += [f"PARAMETER stop {STOP[architecture]}"] if architecture in STOP else []
    lines += [f"PARAMETER {key} {value}" for key, value in _sampling(packed.path).items()]
    return "\n".join(lines) + "\n"


def _sampling(folder: Path) -> dict[str, Any]:
    """What the model's generation_config.json says of sampling, else Google's settings."""
    path = folder / "generation_config.json"
    try:
        said = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        return {key: said[key] if isinstance(said.get(key), int | float) else SAMPLING[key] for key in SAMPLING}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a generation_config.json: {error}") from None


def export_lmstudio(
    packed: PackedModel,
    path: str | Path,
    *,
    replace: bool = False,
    gguf: Path | None = None,
    on_progress: Callable[[int, int], None] = silent,
) -> None:
    """Write the folder `path` with PUBLISHER/MODEL/MODEL.gguf, to be copied into LM Studio's folder of models.

    gguf: as for `export_ollama`. Raises as `export_gguf`.
    """
    _check_runs_alone(packed)
    name = library_name(packed)
    with new_path(Path(path), replace=replace) as temporary:
        folder = temporary / PUBLISHER / f"{name}-GGUF"
        folder.mkdir(parents=True)
        _place(packed, folder / f"{name}.gguf", gguf, on_progress)


def library_name(packed: PackedModel) -> str:
    """What a file of this model is called: the model's name and its recipe's, in letters that any system takes."""
    return re.sub(r"[^\w.-]+", "-", f"{model_title(packed)}-{packed.plan.recipe.name}")


def model_title(packed: PackedModel) -> str:
    """What a person calls the model."""
    return str(packed.provenance.get("name") or packed.path.resolve().name)


def _check_runs_alone(packed: PackedModel) -> None:
    family = packed.plan.model.family
    if family.drafter:
        raise ConfigError(
            f"{family.model_type}: a drafter does not run by itself: export it to gguf, and give that file to the "
            "ollama export of its target with --draft"
        )


def _check_draft(packed: PackedModel, draft: Path) -> None:
    """Raise ConfigError for a file that is no drafter's GGUF, or that of a drafter for another model.

    llama.cpp, which Ollama runs, looks at the width alone before it computes.
    """
    if not draft.is_file():
        raise ConfigError(f"{draft}: no such file: expected the GGUF of a drafter")
    found = read_gguf(draft).fields
    architecture = found["general.architecture"].contents() if "general.architecture" in found else None
    if architecture != DRAFTER:
        raise ConfigError(f"{draft}: general.architecture = {architecture!r}: expected {DRAFTER!r}, a drafter's")
    if packed.plan.model.family.gguf_architecture != "gemma4":
        raise ConfigError(f"{draft}: drafts for Gemma 4, this model is {packed.plan.model.family.model_type}")
    config = packed.plan.model.layer_config
    if config.layer_types[-2:] != ["sliding_attention", "full_attention"]:
        raise ConfigError(
            f"layer_types ends with {config.layer_types[-2:]}: llama.cpp lets drafters read the caches of the last "
            "two layers, which must be ['sliding_attention', 'full_attention']"
        )
    sliding, full = config.per_layer_config[-2:]
    expected = {
        "embedding_length_out": config.hidden_size,
        "attention.key_length": full.head_dim,
        "attention.key_length_swa": sliding.head_dim,
        "attention.sliding_window": config.sliding_window,
    }
    got = {key: found[name].contents() for key in expected if (name := f"{DRAFTER}.{key}") in found}
    tokens = "tokenizer.ggml.tokens"
    expected[tokens], got[tokens] = config.vocab_size, len(found[tokens].data) if tokens in found else None
    for key, value in expected.items():
        if got.get(key) != value:
            raise ConfigError(f"{draft}: {key}: {got.get(key)}, this model's is {value}: it drafts for another model")


def _place(packed: PackedModel, target: Path, gguf: Path | None, on_progress: Callable[[int, int], None]) -> None:
    if gguf is None:
        export_gguf(packed, target, on_progress=on_progress)
        return
    try:
        os.link(gguf, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(gguf, target)
