"""Configs of the Gemma 4 family that come with the package: facts about shapes, no weights.

They are rebuilt descriptions, with the shapes of Google's models; see NOTICE.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from intaglio.errors import ConfigError
from intaglio.plan.family import load_config

MODELS = ("gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b")
DRAFTER = "-assistant"  # after a model's name, of the drafter made for it


def bundled_names() -> tuple[str, ...]:
    """Models, then their drafters."""
    return (*MODELS, *(name + DRAFTER for name in MODELS))


def bundled_name(name: str) -> str | None:
    """The bundled config that a person means: `e2b`, `gemma-4-E2B-it`, `google/gemma-4-12B-it-assistant`, or None."""
    plain = name.lower().removeprefix("google/").replace("-it", "")
    known = {short: full for full in bundled_names() for short in (full, full.removeprefix("gemma-4-"))}
    return known.get(plain)


def bundled_config(name: str) -> dict[str, Any]:
    """The config of one of `bundled_names`."""
    text = (resources.files("intaglio.plan") / "configs" / f"{name}.json").read_text("utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


def find_config(model: str | Path) -> dict[str, Any]:
    """Config of a folder, of a config.json, or of a bundled name. What is there as a path wins over a name."""
    name = None if Path(model).exists() else bundled_name(str(model))
    if name is not None:
        return bundled_config(name)
    if not Path(model).exists():
        raise ConfigError(
            f"{model}: no such folder or file, and no model that intaglio knows by name: expected a model folder, its "
            f"config.json, or one of {', '.join(bundled_names())}"
        )
    return load_config(model)
