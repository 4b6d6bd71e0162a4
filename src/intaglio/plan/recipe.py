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
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import tomli_w

from intaglio.errors import RecipeError
from intaglio.numerics.grid import INT2, INT4, INT8, BlockGrid, Grid, grid_named
from intaglio.plan.checks import check_keys, one_of, typed
from intaglio.plan.drafting import Drafting, parse_drafting
from intaglio.plan.families import FAMILIES, ROLES
from intaglio.plan.family import TOWER_ROLES
from intaglio.plan.files import read_text
from intaglio.plan.patterns import pattern
from intaglio.plan.schedule import Schedule, parse_schedule
from intaglio.plan.static import Activations, KvCache, parse_activations, parse_kv_cache

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
        schedule = asdict(self.schedule)
        schedule |= {"betas": list(self.schedule.betas), "stages": list(self.schedule.stages)}
        table: dict[str, Any] = {"name": self.name, "summary": self.summary, "fit": self.fit}
        if self.families:
            table["families"] = list(self.families)
        table["weights"] = {rule.name: _rule_table(rule) for rule in self.rules}
        if self.activations is not None:
            table["activations"] = asdict(self.activations) | {"roles": list(self.activations.roles)}
        if self.kv_cache is not None:
            table["kv_cache"] = asdict(self.kv_cache)
        if self.drafter is not None:
            table["drafter"] = asdict(self.drafter) | {"step_weights": list(self.drafter.step_weights)}
        return table | {"schedule": schedule}

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
    known = {"name", "summary", "fit", "families", "channel_scales", "weights", "activations", "kv_cache"}
    known |= {"drafter", "schedule"}
    check_keys(table, known, source)
    rules = table.get("weights")
    if not isinstance(rules, dict) or not rules:
        raise RecipeError(f"{source}: no [weights.NAME] rules: expected at least one")
    recipe = Recipe(
        name=typed(table, "name", str, source),
        summary=typed({"summary": ""} | table, "summary", str, source),
        fit=one_of(table, "fit", FITS, "mse", source),
        families=_parse_names(table.get("families", []), "families", sorted(FAMILIES), source),
        rules=_with_scales(table, tuple(_parse_rule(name, body, source) for name, body in rules.items()), source),
        activations=parse_activations(table.get("activations"), source),
        kv_cache=parse_kv_cache(table.get("kv_cache"), source),
        drafter=parse_drafting(table.get("drafter"), source),
        schedule=parse_schedule(table.get("schedule", {}), source),
    )
    _check_fit(recipe, source)
    return recipe


def _with_scales(table: dict[str, Any], rules: tuple[WeightRule, ...], source: str) -> tuple[WeightRule, ...]:
    """The rules, with the -bf16 sort of every channel grid where `channel_scales` asks for it."""
    if one_of(table, "channel_scales", ("f32", "bf16"), "f32", source) == "f32":
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
    if not isinstance(body, dict):
        raise RecipeError(f"{where}: expected a table, got {body!r}")
    check_keys(body, {"grid", "roles", "match", "layers", "slices", "trainable", "optional"}, where)
    match = body.get("match", "")
    try:
        pattern(match)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{where}: match {repr(match)[:80]} is not a regular expression: {error}") from None
    known_roles = sorted({role for _, role in ROLES} | set(TOWER_ROLES))
    roles = _parse_names(body.get("roles", []), "roles", known_roles, where)
    if not roles and not match:
        raise RecipeError(f"{where}: neither roles nor match: expected one of them, or both")
    flags = {"slices": True, "trainable": True, "optional": False} | body
    return WeightRule(
        name=name,
        grid=_parse_grid(body, where),
        roles=roles,
        match=match,
        layers=_parse_layers(body.get("layers", ""), where),
        slices=typed(flags, "slices", bool, where),
        trainable=typed(flags, "trainable", bool, where),
        optional=typed(flags, "optional", bool, where),
    )


def _parse_names(names: Any, key: str, known: list[str], where: str) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(name in known for name in names):
        raise RecipeError(f"{where}: {key} = {names!r}: expected a list of {', '.join(known)}")
    return tuple(names)


def _parse_layers(layers: Any, where: str) -> str:
    if isinstance(layers, str):
        span = re.fullmatch(r"(\d{1,4})-(\d{1,4})", layers)
        if layers in ("", EARLY, LATE) or (span and int(span[1]) <= int(span[2])):
            return layers
    raise RecipeError(
        f"{where}: layers = {layers!r}: expected {EARLY!r} or {LATE!r}, or the first and last layer, for example '0-14'"
    )


def _parse_grid(body: dict[str, Any], where: str) -> Grid:
    name = typed(body, "grid", str, where)
    try:
        return grid_named(name)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _rule_table(rule: WeightRule) -> dict[str, Any]:
    table: dict[str, Any] = {"grid": rule.grid.name}
    if rule.roles:
        table["roles"] = list(rule.roles)
    if rule.match:
        table["match"] = rule.match
    if rule.layers:
        table["layers"] = rule.layers
    if not rule.slices:
        table["slices"] = False
    if not rule.trainable:
        table["trainable"] = False
    if rule.optional:
        table["optional"] = True
    return table
