"""Facts about the model that a packed model is made of, for its provenance and for the card of a release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from intaglio.plan.hub import origin

# Names of folders that tell a kind of content, and no model.
NAMELESS = ("model", "hf", "packed", "checkpoint", "merged", "final")
CARD = "README.md"


def model_name(model_dir: str | Path) -> str:
    """Name of the model of a folder: the Hub's, or the folder's, or its parent's where that says nothing."""
    if found := origin(model_dir):
        return found.partition("/")[2].partition("@")[0]
    path = Path(model_dir).resolve()
    return path.parent.name if path.name in NAMELESS and path.parent.name else path.name


def provenance_of(model_dir: str | Path) -> dict[str, Any]:
    """Record of a model: its name; base_model, the Hub's name with the commit; and the license of its card.

    Outside of the Hub the base is the one that the card of the folder names. What is unknown is left out.
    """
    said = _card(path if (path := Path(model_dir)).is_dir() else path.parent)
    base, license_ = origin(model_dir) or said.get("base_model"), said.get("license")
    record = {"name": model_name(model_dir), "base_model": base, "license": license_}
    return {key: value for key, value in record.items() if isinstance(value, str)}


def _card(folder: Path) -> dict[str, Any]:
    """Metadata of a folder's model card; empty where it has none. A card is no part of a model and may be malformed."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(folder / CARD) or {}
    except Exception:  # yaml has exceptions of its own
        return {}
