"""Checks that a folder for transformers holds the model beside its weights, and nothing that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from intaglio.formats.checkpoint.kept import KEPT_FILE
from intaglio.formats.facts import CONFIG, compare_facts, config_facts, spelled_twice, strange_files
from intaglio.formats.speech import compare_folder_speech, read_speech
from intaglio.formats.tally import Tally
from intaglio.packed.assets import ASSETS
from intaglio.packed.model import PackedModel
from intaglio.packed.shards import shards
from intaglio.packed.store import headers
from intaglio.plan.family import load_config, text_config

KNOWN = (*ASSETS, KEPT_FILE, "config.json", "model.safetensors", "model.safetensors.index.json")


def compare_folder_facts(packed: PackedModel, folder: Path, tally: Tally) -> None:
    """Count into `tally` the facts of a folder's config, tokenizer, templates and settings, and what lies beside."""
    config, model = load_config(folder), packed.plan.model
    files = shards(folder)
    # other programs read some fields under names of their own, and these have to say the same
    expected = config_facts(model.whole or model.config) | spelled_twice(model.layer_config)
    compare_facts(CONFIG, expected, config_facts(config), tally)
    _compare_tie(config, files, tally)
    compare_folder_speech(read_speech(packed.path, model.config), folder, text_config(config), tally)
    strange = strange_files(folder, [*KNOWN, *(file.name for file in files)])
    tally.unlike_facts += [f"{name}: a file that no export writes, and a runtime may load" for name in strange]


def _compare_tie(config: dict[str, Any], files: list[Path], tally: Tally) -> None:
    """A stored head and the config's tie contradict each other: one of them is not used."""
    stored = any(name.startswith("lm_head.") for file in files for name in headers(file))
    tied = (config.get("text_config") or {}).get("tie_word_embeddings", config.get("tie_word_embeddings", True))
    compare_facts(CONFIG, {"tie_word_embeddings": not stored}, {"tie_word_embeddings": bool(tied)}, tally)
