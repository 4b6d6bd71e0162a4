"""Reading a table of a recipe into its frozen dataclass: keys that are known, values of the right type and range."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple, TypeVar

from intaglio.errors import RecipeError

T = TypeVar("T")


class Rule(NamedTuple):
    """A test of a key's value. expected: the words of its message. any_type: it replaces the check of the type."""

    holds: Callable[[Any], bool]
    expected: str
    any_type: bool = False


SHARE = Rule(lambda value: 0 <= value < 1, "a share in [0, 1)")
FINITE = Rule(lambda value: 0 <= value < math.inf, "0 or more, and finite")


def at_least(least: int) -> Rule:
    """No number below this one."""
    return Rule(lambda value: value >= least, f"{least} or more")


def one_of(allowed: tuple[str, ...], *, any_type: bool = False) -> Rule:
    """One of these words."""
    return Rule(lambda value: value in allowed, f"one of {', '.join(allowed)}", any_type)


def names_among(known: tuple[str, ...], *, empty: bool = True) -> Rule:
    """A list of these words. empty: whether it may have none."""

    def holds(value: Any) -> bool:
        return isinstance(value, list) and all(name in known for name in value) and (empty or bool(value))

    return Rule(holds, f"a list of {', '.join(known)}", True)


def check_keys(table: Any, known: set[str], where: str) -> None:
    """Raise RecipeError for anything but a table, and for its first key that is not among the known ones."""
    if not isinstance(table, dict):
        raise RecipeError(f"{where}: expected a table, got {table!r}")
    unknown = sorted(set(table) - known)
    if unknown:
        raise RecipeError(f"{where}: unknown key {unknown[0]!r}: expected one of {', '.join(sorted(known))}")


def typed(table: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """The value of a key. RecipeError if it is missing or not of this type."""
    if not isinstance(table.get(key), kind):
        raise RecipeError(f"{where}: {key} = {table.get(key)!r}: expected {kind.__name__}")
    return table[key]


def check_value(table: dict[str, Any], key: str, rule: Rule, where: str) -> None:
    """Raise RecipeError for a value that breaks its rule."""
    if not rule.holds(table[key]):
        raise RecipeError(f"{where}: {key} = {table[key]!r}: expected {rule.expected}")


def read_table(kind: type[T], body: Any, where: str, rules: Mapping[str, Rule]) -> T:
    """The dataclass of a table. A key that is left out has the field's default, whose type is the key's type.

    A whole number may be written as int or float. A list becomes a tuple. A field without default is checked by the
    caller. Raises RecipeError, whose message names the table, the key, its value and what was expected.
    """
    defaults = {f.name: f.default for f in fields(kind)}  # type: ignore[arg-type]
    check_keys(body, set(defaults), where)
    values = dict(body)
    for key, value in body.items():
        wanted, rule = type(defaults[key]), rules.get(key)
        by_type = defaults[key] is not MISSING and not (rule and rule.any_type)
        if wanted is float and type(value) is int:
            values[key] = float(value)
        if by_type and wanted is int and type(value) is float and value.is_integer():
            values[key] = int(value)
        if by_type and type(values[key]) is not wanted:
            raise RecipeError(f"{where}: {key} = {value!r}: expected {wanted.__name__}")
        if rule:
            check_value(values, key, rule, where)
        if isinstance(value, list):
            values[key] = tuple(float(x) if type(x) is int else x for x in value)
    return kind(**values)


def to_table(value: Any) -> dict[str, Any]:
    """The table that `read_table` reads back."""
    found = {f.name: getattr(value, f.name) for f in fields(value)}
    return {key: list(entry) if isinstance(entry, tuple) else entry for key, entry in found.items()}
