"""GGUF as Ollama and LM Studio take it: a folder with a Modelfile, and the folders of a model library.

Neither program is in a package registry, so neither was run: what is written follows their sources and
manuals (Ollama: docs/modelfile.md, and server/ for the renderers and parsers of `gemma4`), and the tests
parse it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from intaglio.errors import ConfigError
from intaglio.formats.gguf.read import read_gguf
from intaglio.formats.gguf.read_bundles import MODELFILE
from intaglio.formats.gguf.write import export_gguf
from intaglio.formats.speech import read_speech
from intaglio.formats.turns import SAMPLING, modelfile_facts
from intaglio.formats.write_folder import silent
from intaglio.packed.model import PackedModel
from intaglio.packed.store import new_path
from intaglio.plan.families import drafter_of

PUBLISHER = "intaglio"


def export_ollama(
    packed: PackedModel,
    path: str | Path,
    *,
    replace: bool = False,
    gguf: str | Path | None = None,
    draft: str | Path | None = None,
    on_progress: Callable[[int, int], None] = silent,
) -> None:
    """Write the folder `path` with model.gguf and a Modelfile, for `ollama create NAME -f path/Modelfile`.

    gguf: the model's GGUF where it is there already: linked, not written again. draft: the GGUF of a
    drafter, which goes along. Raises as `export_gguf`, and ConfigError for a drafter that does not fit the model.
    """
    _check_runs_alone(packed)
    if draft is not None:
        _check_draft(packed, draft)
    text = modelfile(packed, with_draft=draft is not None)
    with new_path(Path(path), replace=replace) as temporary:
        temporary.mkdir()
        _place(packed, temporary / "model.gguf", gguf, on_progress)
        if draft is not None:
            shutil.copyfile(draft, temporary / "draft.gguf")
        (temporary / MODELFILE).write_text(text, "utf-8")


def modelfile(packed: PackedModel, *, with_draft: bool = False) -> str:
    """The text of an Ollama Modelfile.

    Raises ConfigError for a chat template that Ollama would not use, and for sampling settings that are no numbers.
    """
    spec = packed.plan.model.text_only()
    facts = modelfile_facts(read_speech(packed.path, spec.layer_config.to_dict()), spec.family.ollama_code)
    lines = ["FROM ./model.gguf"] + ["DRAFT ./draft.gguf"] * with_draft
    lines += [f"{name} {facts[name]}" for name in ("RENDERER", "PARSER") if facts[name]]
    lines += [f'TEMPLATE """{facts["TEMPLATE"]}"""'] * bool(facts["TEMPLATE"])
    lines += [f'PARAMETER stop "{text}"' for text in facts["stop"]]
    lines += [f"PARAMETER {name} {facts[name]}" for name in SAMPLING]
    return "\n".join(lines) + "\n"


def export_lmstudio(
    packed: PackedModel,
    path: str | Path,
    *,
    replace: bool = False,
    gguf: str | Path | None = None,
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
    """The stem of this model's file names: the model's name and its recipe's, in letters that any system takes."""
    return re.sub(r"[^\w.-]+", "-", f"{model_title(packed)}-{packed.plan.recipe.name}").lstrip("-.") or "model"


def model_title(packed: PackedModel) -> str:
    """The model's name for people: one line of text that can be written to any file."""
    name = str(packed.provenance.get("name") or packed.path.resolve().name)
    return " ".join(name.encode("utf-8", "replace").decode("utf-8").split()) or "model"


def _check_runs_alone(packed: PackedModel) -> None:
    family = packed.plan.model.family
    if family.drafter:
        raise ConfigError(
            f"{family.model_type}: a drafter does not run by itself: export it to gguf, and give that file to the "
            "ollama export of its target with --draft"
        )


def _check_draft(packed: PackedModel, draft: str | Path) -> None:
    """Raise ConfigError for a file that is no drafter's GGUF, or that of a drafter for another model.

    llama.cpp, which Ollama runs, looks at the width alone before it computes.
    """
    family = packed.plan.model.family
    drafter = drafter_of(family.model_type)
    if drafter is None:
        raise ConfigError(f"{draft}: models of type {family.model_type} have no drafters: leave it out")
    if not Path(draft).is_file():
        raise ConfigError(f"{draft}: no such file: expected the GGUF of a drafter")
    found = read_gguf(Path(draft)).fields
    architecture = found["general.architecture"].contents() if "general.architecture" in found else None
    wanted = drafter.gguf_architecture
    if architecture != wanted:
        raise ConfigError(f"{draft}: general.architecture = {architecture!r}: expected {wanted!r}, a drafter's")
    config = packed.plan.model.layer_config
    # a drafter has no keys and values of its own: it attends to the caches of two layers of its target
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
    got = {key: found[name].contents() for key in expected if (name := f"{wanted}.{key}") in found}
    tokens = "tokenizer.ggml.tokens"
    expected[tokens], got[tokens] = config.vocab_size, len(found[tokens].data) if tokens in found else None
    for key, value in expected.items():
        if got.get(key) != value:
            raise ConfigError(f"{draft}: {key}: {got.get(key)}, this model's is {value}: it drafts for another model")


def _place(packed: PackedModel, target: Path, gguf: str | Path | None, on_progress: Callable[[int, int], None]) -> None:
    if gguf is None:
        export_gguf(packed, target, on_progress=on_progress)
        return
    try:
        os.link(gguf, target)  # a second copy would take gigabytes
    except OSError:  # another file system, or one without links
        shutil.copyfile(gguf, target)
