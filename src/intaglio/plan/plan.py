"""Plans: a recipe resolved against one model. Every tensor, its grid, its bytes, and why.

A plan is computed from the config alone. Training, packing, exporters and the report all read the
same plan, so they cannot disagree on what a tensor is.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from intaglio.errors import RecipeError
from intaglio.numerics.grid import BF16, F32, WHOLE_ROW, BlockGrid, Grid, IndexGrid
from intaglio.plan.carried import whole_name
from intaglio.plan.family import TOWER_ROLES, ModelSpec, TensorSpec, describe, read_spec
from intaglio.plan.hub import CONFIG_ONLY, find_model
from intaglio.plan.recipe import Recipe, WeightRule
from intaglio.plan.static import StaticScale, activation_scales, kv_scales

HEAD = "lm_head.weight"
# The rule of towers that a recipe does not mention.
LEFT_ALONE = WeightRule(name="(no rule)", grid=BF16, trainable=False)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor, the grid it lives on and the rule that put it there."""

    spec: TensorSpec
    rule: WeightRule

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def grid(self) -> Grid:
        """The rule's grid; a block size that it leaves open is settled by the tensor's rows."""
        grid = self.rule.grid
        if isinstance(grid, BlockGrid) and len(self.spec.shape) >= 2:
            return grid.for_width((self.rule.slices and self.spec.slice_columns) or self.spec.shape[-1])
        return grid

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data in the grid's format, without padding; in GGUF any vector is float32."""
        in_gguf = self.grid.ggml_type and self.spec.role not in TOWER_ROLES
        grid = F32 if len(self.spec.shape) < 2 and in_gguf else self.grid
        return grid.size_bytes(self.spec.shape)

    @property
    def full_floats(self) -> bool:
        """Whether float32 values are kept as they are; other floats are rounded to bfloat16 (see `FloatGrid`)."""
        return self.grid == F32 and self.spec.role in TOWER_ROLES

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of values that are no codes: int64 for numbers of tokens, bfloat16 for floats rounded to it."""
        if isinstance(self.grid, IndexGrid):
            return torch.int64
        return torch.float32 if self.full_floats else torch.bfloat16

    @property
    def quantized_linear(self) -> bool:
        return isinstance(self.grid, BlockGrid) and "embedding" not in self.spec.role


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against a model. Frozen; iterate for the text model's tensors in state-dict order.

    carried: what the checkpoint holds beside these: towers, and unused tensors of KV-shared layers.
    """

    recipe: Recipe
    model: ModelSpec
    tensors: tuple[PlannedTensor, ...]
    carried: tuple[PlannedTensor, ...] = ()

    def __iter__(self) -> Iterator[PlannedTensor]:
        return iter(self.tensors)

    def __getitem__(self, name: str) -> PlannedTensor:
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, PlannedTensor]:
        return {t.name: t for t in self.everything}

    @property
    def everything(self) -> tuple[PlannedTensor, ...]:
        return self.tensors + self.carried

    @property
    def embedding(self) -> PlannedTensor:
        """The table of token embeddings."""
        return next(t for t in self.tensors if t.spec.role == "token_embedding")

    def stored_name(self, name: str) -> str:
        """Name in a folder of the whole model of a tensor, module or static scale of ours."""
        return whole_name(name) if self.model.whole else name

    def under(self, *modules: str) -> Plan:
        """The plan of the text model's tensors under these modules alone, with the static scales that are there."""
        prefixes = tuple(f"{module}." for module in modules)
        return replace(self, tensors=tuple(t for t in self.tensors if t.name.startswith(prefixes)), carried=())

    def text_only(self) -> Plan:
        """The plan without towers and their embedders."""
        carried = tuple(t for t in self.carried if t.spec.role not in TOWER_ROLES)
        return replace(self, model=self.model.text_only(), carried=carried)

    @property
    def portable(self) -> bool:
        """Whether a bfloat16 checkpoint can hold every value of the text model exactly."""
        return all(t.grid.portable for t in self.tensors)

    @property
    def mobile(self) -> bool:
        """Whether its grids are those of the Gemma mobile format; otherwise they are GGUF's."""
        return any(isinstance(t.grid, BlockGrid) and t.grid.positive and not t.grid.ggml_type for t in self.tensors)

    @property
    def size_bytes(self) -> int:
        return sum(t.size_bytes for t in self.everything)

    @functools.cached_property
    def static_scales(self) -> tuple[StaticScale, ...]:
        """The scalars of activations and KV cache, layer by layer as far as the recipe wants them.

        The head, tied or not, has none: its logits are to stay floats.
        """
        activations = self.recipe.activations
        roles = activations.roles if activations else ()
        linears = [t.spec for t in self.tensors if t.spec.role in roles and isinstance(t.grid, BlockGrid)]
        scales = activation_scales(linears)
        if self.recipe.kv_cache is not None:
            attention = {t.name.rpartition(".q_proj.")[0] for t in self.tensors}
            scales += [scale for scale in kv_scales(self.model) if scale.module in attention]
        return tuple(scales)

    @functools.cached_property
    def carried_scales(self) -> tuple[str, ...]:
        """Names of the activation scales of carried linears; each has its own value, 0 unless it was imported."""
        linears = [t.spec for t in self.carried if t.quantized_linear and getattr(t.grid, "positive", False)]
        return tuple(scale.name for scale in activation_scales(linears))

    @property
    def digest(self) -> str:
        """SHA-256 over model config, recipe and assignment: equal plans have equal digests."""
        return _sha256([*self._config, self.recipe.to_dict(), self.rows()])

    @property
    def layout_digest(self) -> str:
        """SHA-256 over what stored tensors mean: model config, assignment and static scales, but no schedule."""
        return _sha256([*self._config, self.rows(), [[s.name, s.owner] for s in self.static_scales]])

    @property
    def _config(self) -> list[dict[str, Any]]:
        return [self.model.config] + ([self.model.whole] if self.model.whole else [])

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-ready row a tensor."""
        return [
            {
                "tensor": t.name,
                "role": t.spec.role,
                "shape": list(t.spec.shape),
                "grid": t.grid.name,
                "bytes": t.size_bytes,
                "rule": t.rule.name,
            }
            for t in self.everything
        ]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def make_plan(model: str | Path | dict[str, Any] | ModelSpec, recipe: Recipe | str) -> Plan:
    """Resolve `recipe` against a model folder or name of the Hub, its config, or a ModelSpec.

    Raises RecipeError for a family that the recipe is not for, for a tensor that no rule covers or
    whose columns its grid cannot hold, for a rule that fits no tensor and is not optional, and for a
    tied head on another grid than its embedding.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    if not isinstance(model, ModelSpec):
        model = describe(model) if isinstance(model, dict) else read_spec(find_model(model, files=CONFIG_ONLY))
    _check_family(recipe, model)
    tensors = tuple(PlannedTensor(spec, _rule_for(recipe, model, spec)) for spec in model.tensors)
    carried = tuple(PlannedTensor(spec, _rule_for(recipe, model, spec)) for spec in model.carried)
    plan = Plan(recipe, model, tensors, carried)
    _check_unused_rules(recipe, plan.everything, _tied_head_rule(recipe, model, tensors))
    for rule in recipe.rules:
        _check_shapes([tensor for tensor in plan.everything if tensor.rule is rule])
    return plan


def _check_family(recipe: Recipe, model: ModelSpec) -> None:
    model_type = model.family.model_type
    if recipe.families and model_type not in recipe.families:
        raise RecipeError(
            f"recipe {recipe.name} is for {', '.join(recipe.families)}, this model is {model_type}: "
            "choose another recipe, for example q4_0"
        )


def _tied_head_rule(recipe: Recipe, model: ModelSpec, tensors: tuple[PlannedTensor, ...]) -> WeightRule | None:
    """The rule of a tied head. Raises RecipeError unless it is that of the embedding."""
    rule = recipe.rule_for(HEAD, "head") if model.tied_head else None
    if rule is None or ("head" not in rule.roles and "lm_head" not in rule.match):
        return None  # the rule is a general one, for any tensor without a rule of its own
    embedding = next(t for t in tensors if t.spec.role == "token_embedding")
    if rule.grid != embedding.rule.grid:
        raise RecipeError(
            f"recipe {recipe.name}: [weights.{rule.name}] puts {HEAD} on {rule.grid.name}, but in this model the head "
            f"is tied to {embedding.name}, which [weights.{embedding.rule.name}] puts on {embedding.rule.grid.name}: "
            f"say the same of both, for example --set weights.{rule.name}.grid={embedding.rule.grid.name}"
        )
    return rule


def _rule_for(recipe: Recipe, model: ModelSpec, spec: TensorSpec) -> WeightRule:
    rule = recipe.rule_for(spec.name, spec.role, model.first_late_layer)
    if rule is None and spec.role in TOWER_ROLES:
        return LEFT_ALONE
    if rule is None and spec.role in ("expert", "router"):
        raise RecipeError(
            f"recipe {recipe.name} has no grid for experts and their routers, which this model has ({spec.name}): "
            "choose one that has, for example q4_0"
        )
    if rule is None:
        raise RecipeError(
            f"recipe {recipe.name}: no rule covers {spec.name} {list(spec.shape)}: "
            f'add one, for example [weights.more] with roles = ["{spec.role}"] and a grid'
        )
    return rule


def _check_unused_rules(recipe: Recipe, tensors: tuple[PlannedTensor, ...], head: WeightRule | None) -> None:
    used = {tensor.rule.name for tensor in tensors} | ({head.name} if head else set())
    for rule in recipe.rules:
        if rule.name not in used and not rule.optional:
            raise RecipeError(
                f"recipe {recipe.name}: [weights.{rule.name}] matches no tensor of this model: "
                "correct roles or match, or say optional = true"
            )


def _fits(tensor: PlannedTensor) -> bool:
    preset, shape = tensor.rule.grid, tensor.spec.shape
    if not isinstance(preset, BlockGrid):
        return True
    if len(shape) != 2 and tensor.spec.role != "expert":
        return False
    pieces = preset.block_size == WHOLE_ROW and tensor.rule.slices and tensor.spec.slice_columns
    return (pieces or shape[-1]) % preset.column_multiple == 0


def _check_shapes(tensors: list[PlannedTensor]) -> None:
    """Raise RecipeError for tensors of one rule that its grid cannot hold, with a recipe that can."""
    odd = [tensor for tensor in tensors if not _fits(tensor)]
    if not odd:
        return
    grid, rule, shape = odd[0].rule.grid, odd[0].rule.name, odd[0].spec.shape
    matrix = len(shape) == 2 or odd[0].spec.role == "expert"
    need = f"columns that are a multiple of {grid.column_multiple}" if matrix else "a matrix"
    other = "f16" if matrix else "f32"
    if len(odd) == len(tensors):
        advice = f"give the rule another one, for example with --set weights.{rule}.grid={other}"
    else:
        body = f"match = '{expression(odd)}' and grid = '{other}'"
        advice = f"put a rule before [weights.{rule}], for example [weights.odd] with {body}"
    more = f", nor do {len(odd) - 1} more of the rule's {len(tensors)} tensors" if len(odd) > 1 else ""
    raise RecipeError(
        f"{odd[0].name}: shape {list(shape)} does not fit grid {grid.name} of [weights.{rule}], "
        f"which needs {need}{more}: {advice}"
    )


def expression(tensors: Sequence[PlannedTensor | TensorSpec]) -> str:
    """A regular expression that matches these tensors and no other."""
    layers: dict[str, list[str]] = {}
    for tensor in tensors:
        kind = re.sub(r"\.\d+\.", ".#.", tensor.name)
        layers.setdefault(kind, []).extend(re.findall(r"\.(\d+)\.", tensor.name))
    return "|".join("^" + kind.replace("#", f"({'|'.join(numbers)})") + "$" for kind, numbers in layers.items())
