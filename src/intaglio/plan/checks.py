"""Checks of every table of a recipe: keys that are known, values of the right type."""

from __future__ import annotations

from typing import Any

from intaglio.errors import RecipeError


def check_keys(table: dict[str, Any], known: set[str], where: str) -> None:
    """Raise RecipeError for the first key that is not among the known ones."""
    unknown = sorted(set(table) - known)
    if unknown:
        raise RecipeError(f"{where}: unknown key {unknown[0]!r}: expected one of {', '.join(sorted(known))}")


def typed(table: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """The value of a key. RecipeError if it is missing or not of this type."""
    if not isinstance(table.get(key), kind):
        raise RecipeError(f"{where}: {key} = {table.get(key)!r}: expected {kind.__name__}")
    return table[key]


def one_of(table: dict[str, Any], key: str, allowed: tuple[str, ...], default: str, where: str) -> str:
    """The value of a key, or its default. RecipeError if it is not among those allowed."""
    value: str = table.get(key, default)
    if value not in allowed:
        raise RecipeError(f"{where}: {key} = {value!r}: expected one of {', '.join(allowed)}")
    return value
