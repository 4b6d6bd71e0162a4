"""Recipes: which grid each tensor gets, and how to train it. TOML in, TOML out.

A recipe has ordered weight rules. Each names roles (see `family`) or a regular expression over
tensor names, or both, and may keep to some layers; the first rule that fits a tensor wins. A rule
that fits no tensor of the model is an error unless it says `optional = true`, and so is any key that
is not known here. What a recipe says of activations and of the KV cache is in `static`, of training in `schedule`
and, for drafters, in `drafting`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import tomli_w

from intaglio.errors import RecipeError
from intaglio.numerics.grid import INT2, INT4, INT8, BlockGrid, Grid, grid_named
from intaglio.plan.checks import (
    Rule,
    check_keys,
    check_value,
    names_among,
    one_of,
    read_table,
    to_table,
    typed,
)
from intaglio.plan.drafting import DRAFTING_RULES, Drafting
from intaglio.plan.families import FAMILIES, ROLES
from intaglio.plan.family import TOWER_ROLES
from intaglio.plan.files import read_text
from intaglio.plan.patterns import pattern
from intaglio.plan.schedule import SCHEDULE_RULES, Schedule, check_schedule
from intaglio.plan.static import ACTIVATION_RULES, KV_CACHE_RULES, Activations, KvCache

FITS = ("mse", "absmax", "stock")
EARLY, LATE = "early", "late"
LONGEST_RECIPE = 1 << 22  # bytes
CHANNEL_GRIDS: tuple[Grid, ...] = (INT2, INT4, INT8)


@dataclass(frozen=True, kw_only=True)
class WeightRule:
    """Tensors of these roles whose name matches get this grid.

    name: the rule's table in the TOML file; `--set weights.NAME.grid=...` addresses it.
    roles: roles of the family table; empty for any.
    match: regular expression, searched in the tensor's name; empty for any.
    layers: "early" or "late", told apart by `ModelSpec.first_late_layer`; "3-17" for these layers,
        both included; empty for any, and for tensors outside of layers.
    slices: whether rows of the table of per-layer embeddings have a scale for each layer's slice, on the
        grids that leave their block size open; else one for the row.
    trainable: whether training moves the tensor's latents.
    optional: whether a model without such a tensor is fine.
    """

    name: str
    grid: Grid
    roles: tuple[str, ...] = ()
    match: str = ""
    layers: str = ""
    slices: bool = True
    trainable: bool = True
    optional: bool = False

    def fits(self, tensor_name: str, role: str, first_late_layer: int = 0) -> bool:
        named = (not self.roles or role in self.roles) and (not self.match or self._matches(tensor_name))
        return named and self._has_layer(tensor_name, first_late_layer)

    def _matches(self, tensor_name: str) -> bool:
        try:
            return pattern(self.match).search(tensor_name) is not None
        except ValueError as error:
            raise RecipeError(f"[weights.{self.name}]: match {self.match[:80]!r} cannot be used: {error}") from None

    def _has_layer(self, tensor_name: str, first_late_layer: int) -> bool:
        if not self.layers:
            return True
        layer = re.search(r"layers\.(\d+)\.", tensor_name)
        if layer is None:
            return False
        number = int(layer[1])
        if self.layers in (EARLY, LATE):
            return (number >= first_late_layer) == (self.layers == LATE)
        first, last = self.layers.split("-")
        return int(first) <= number <= int(last)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A name, a line of prose, the rules, how to fit first scales, and the schedule.

    families: model types that the recipe is for; empty for any.
    activations, kv_cache: None where these stay floats. drafter: how a drafter is trained; None for other models.
    """

    name: str
    summary: str = ""
    fit: str = "mse"
    families: tuple[str, ...] = ()
    rules: tuple[WeightRule, ...] = ()
    activations: Activations | None = None
    kv_cache: KvCache | None = None
    drafter: Drafting | None = None
    schedule: Schedule = field(default_factory=Schedule)

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
        """A preset by name or a TOML file by path, with `key=value` overrides applied."""
        text = _read(name_or_path)
        return cls.from_toml(text, source=str(name_or_path), overrides=overrides)

    @classmethod
    def from_toml(cls, text: str, *, source: str = "recipe", overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
        """The recipe that a TOML text describes. `source` names it in error messages."""
        try:
            table = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise RecipeError(f"{source}: not valid TOML: {error}") from None
        for override in overrides:
            _apply_override(table, override, source)
        return _parse(table, source)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The table that `to_toml` writes: every rule and the whole schedule, defaults included."""
        table: dict[str, Any] = {"name": self.name, "summary": self.summary, "fit": self.fit}
        if self.families:
            table["families"] = list(self.families)
        table["weights"] = {rule.name: _rule_table(rule) for rule in self.rules}
        parts = {"activations": self.activations, "kv_cache": self.kv_cache, "drafter": self.drafter}
        table |= {key: to_table(part) for key, part in parts.items() if part is not None}
        return table | {"schedule": to_table(self.schedule)}

    def with_schedule(self, **changes: Any) -> Recipe:
        return replace(self, schedule=replace(self.schedule, **changes))

    def rule_for(self, tensor_name: str, role: str, first_late_layer: int = 0) -> WeightRule | None:
        return next((rule for rule in self.rules if rule.fits(tensor_name, role, first_late_layer)), None)


def preset_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(p.name.removesuffix(".toml") for p in _presets().iterdir() if p.name.endswith(".toml"))


def _presets() -> Traversable:
    return resources.files("intaglio.plan") / "presets"


def _read(name_or_path: str | Path) -> str:
    if str(name_or_path) in preset_names():
        return (_presets() / f"{name_or_path}.toml").read_text("utf-8")
    path = Path(name_or_path)
    if not path.is_file():
        raise RecipeError(
            f"no recipe {str(name_or_path)!r}: expected a TOML file or one of {', '.join(preset_names())}"
        )
    return read_text(path, limit=LONGEST_RECIPE, error=RecipeError)


def _apply_override(table: dict[str, Any], override: str, source: str) -> None:
    """Set `a.b.c=value`; the value is TOML, or a bare string where it is not."""
    key, separator, text = override.partition("=")
    if not separator:
        raise RecipeError(f"--set {override!r}: expected key=value, for example schedule.lr=1e-4")
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override!r}: {parent!r} of {source} is a value, not a table")
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        table[last] = text.strip()


def _parse(table: dict[str, Any], source: str) -> Recipe:
    check_keys(table, {f.name for f in fields(Recipe)} - {"rules"} | {"weights", "channel_scales"}, source)
    rules = table.get("weights")
    if not isinstance(rules, dict) or not rules:
        raise RecipeError(f"{source}: no [weights.NAME] rules: expected at least one")

    def part(key: str, kind: type[Any], known: Mapping[str, Rule]) -> Any:
        body = table.get(key)
        return None if body is None else read_table(kind, body, f"{source}: [{key}]", known)

    plain = {key: table[key] for key in ("summary", "fit", "families") if key in table}
    parts = {
        "name": typed(table, "name", str, source),
        "rules": _with_scales(table, tuple(_parse_rule(name, body, source) for name, body in rules.items()), source),
        "activations": part("activations", Activations, ACTIVATION_RULES),
        "kv_cache": part("kv_cache", KvCache, KV_CACHE_RULES),
        "drafter": part("drafter", Drafting, DRAFTING_RULES),
        "schedule": part("schedule", Schedule, SCHEDULE_RULES) or Schedule(),
    }
    recipe = replace(read_table(Recipe, plain | {"name": parts["name"]}, source, RECIPE_RULES), **parts)
    check_schedule(recipe.schedule, f"{source}: [schedule]")
    _check_fit(recipe, source)
    return recipe


def _with_scales(table: dict[str, Any], rules: tuple[WeightRule, ...], source: str) -> tuple[WeightRule, ...]:
    """The rules, with the -bf16 sort of every channel grid where `channel_scales` asks for it."""
    said = {"channel_scales": "f32"} | table
    check_value(said, "channel_scales", one_of(("f32", "bf16")), source)
    if said["channel_scales"] == "f32":
        return rules
    if not any(rule.grid in CHANNEL_GRIDS for rule in rules):
        raise RecipeError(f"{source}: channel_scales = 'bf16', but no rule has grid int2, int4 or int8: leave it out")
    narrow = {grid: grid_named(f"{grid.name}-bf16") for grid in CHANNEL_GRIDS}
    return tuple(replace(rule, grid=narrow.get(rule.grid, rule.grid)) for rule in rules)


def _check_fit(recipe: Recipe, source: str) -> None:
    """llama.cpp's own scales are any float16, which a portable grid does not hold; those of absmax any float32."""
    advice = {
        "stock": (lambda grid: grid.ggml_type and not grid.portable, "use the -free grids, as recipe q4_0-stock does"),
        "absmax": (lambda grid: grid.positive, "use int2, int4 and int8, as recipe mobile does"),
    }
    holds, instead = advice.get(recipe.fit, (lambda grid: True, ""))
    for rule in recipe.rules:
        if isinstance(rule.grid, BlockGrid) and not holds(rule.grid):
            raise RecipeError(
                f"{source}: fit = {recipe.fit!r} writes scales that grid {rule.grid.name} of "
                f"[weights.{rule.name}] does not hold: {instead}"
            )


def _parse_rule(name: str, body: Any, source: str) -> WeightRule:
    where = f"{source}: [weights.{name}]"
    check_keys(body, {f.name for f in fields(WeightRule)} - {"name"}, where)
    match = body.get("match", "")
    try:
        pattern(match)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{where}: match {repr(match)[:80]} is not a regular expression: {error}") from None
    if body.get("roles", []) == [] and not match:
        raise RecipeError(f"{where}: neither roles nor match: expected one of them, or both")
    name_of_grid = typed(body, "grid", str, where)
    try:
        grid = grid_named(name_of_grid)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    return read_table(WeightRule, body | {"name": name, "grid": grid}, where, WEIGHT_RULES)


def _are_layers(value: Any) -> bool:
    span = re.fullmatch(r"(\d{1,4})-(\d{1,4})", value) if isinstance(value, str) else None
    return value in ("", EARLY, LATE) or (span is not None and int(span[1]) <= int(span[2]))


RECIPE_RULES = {"fit": one_of(FITS, any_type=True), "families": names_among(tuple(sorted(FAMILIES)))}
WEIGHT_RULES = {
    "roles": names_among(tuple(sorted({role for _, role in ROLES} | set(TOWER_ROLES)))),
    "layers": Rule(
        _are_layers, f"{EARLY!r} or {LATE!r}, or the first and last layer, for example '0-14'", any_type=True
    ),
}


def _rule_table(rule: WeightRule) -> dict[str, Any]:
    """The entries of a rule that differ from the defaults."""
    table = to_table(rule) | {"grid": rule.grid.name}
    return {f.name: table[f.name] for f in fields(rule) if f.name != "name" and getattr(rule, f.name) != f.default}
