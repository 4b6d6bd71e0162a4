"""The rotary embedding that a model computes, and which runtimes compute the same one.

A rotary embedding is compared by what it does, not by its name: the angle by which each pair of channels of a head
turns from one position to the next, and the factor on cosines and sines.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

from intaglio.errors import ConfigError
from intaglio.plan.families import FAMILIES
from intaglio.plan.family import ModelSpec

BY_LENGTH = ("dynamic", "longrope")  # their angles depend on the length of the text
KINDS = ("full_attention", "sliding_attention")  # of layers
RELATIVE = 1e-5  # float32 powers of two libraries differ in the last bits


@dataclass(frozen=True)
class Rope:
    """A rotary embedding.

    angles: radians a position for each pair of channels of a head. scaling: factor on cosine and sine. by_length:
    whether the angles are those of short texts alone.
    """

    angles: tuple[float, ...]
    scaling: float = 1.0
    by_length: bool = False

    def same(self, other: Rope) -> bool:
        """Whether both turn every pair by the same angle, up to rounding in float32."""
        return (
            len(self.angles) == len(other.angles)
            and self.by_length == other.by_length
            and math.isclose(self.scaling, other.scaling, rel_tol=RELATIVE)
            and all(
                math.isclose(mine, theirs, rel_tol=RELATIVE, abs_tol=1e-20)
                for mine, theirs in zip(self.angles, other.angles, strict=True)
            )
        )

    def __str__(self) -> str:
        turned = sum(angle > 0 for angle in self.angles)
        slowest = min((angle for angle in self.angles if angle > 0), default=0.0)
        return f"{turned} of {len(self.angles)} pairs turned, the slowest by {slowest:.4g}, scaling {self.scaling:.4g}"


def plain_rope(base: float, pairs: int, factor: float = 1.0) -> Rope:
    """All pairs turned, the first by 1 / factor, the others ever slower."""
    return Rope(tuple(base ** (-i / pairs) / factor for i in range(pairs)))


def ropes(config: Any) -> dict[str, Rope]:
    """The rotary embedding of each type of layer, as transformers computes it for a text config.

    Raises ConfigError for parameters that transformers cannot compute.
    """
    module, name = FAMILIES[config.model_type].rotary
    kind = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    try:
        table = kind(config)
    except Exception as error:  # transformers raises many types for parameters that contradict themselves
        raise ConfigError(f"rope_parameters {config.rope_parameters}: {type(error).__name__}: {error}") from error
    if isinstance(table.rope_type, str):
        return dict.fromkeys(KINDS, _rope(table.inv_freq, table.attention_scaling, table.rope_type))
    return {
        layer_type: _rope(
            getattr(table, f"{layer_type}_inv_freq"), getattr(table, f"{layer_type}_attention_scaling"), rope_type
        )
        for layer_type, rope_type in table.rope_type.items()
    }


def _rope(angles: Any, scaling: float, rope_type: str) -> Rope:
    return Rope(tuple(angles.double().tolist()), float(scaling), rope_type in BY_LENGTH)


def rope_parameters(config: Any) -> dict[str, dict[str, Any]]:
    """The parameters of each type of layer; a config may say them once for both."""
    said = config.rope_parameters
    return dict.fromkeys(KINDS, said) if "rope_type" in said else said


def _in_mlx(said: dict[str, Any], width: int) -> Rope | None:
    """Angles that mlx-lm computes (rope_utils.py, of 0.32.2); None for types that are not known to be transformers'."""
    base, factor = said["rope_theta"], said.get("factor") or 1.0
    if said["rope_type"] in ("default", "linear"):
        return plain_rope(base, width // 2, factor if said["rope_type"] == "linear" else 1.0)
    rotated = (int(width * said.get("partial_rotary_factor", 1.0)) + 1) // 2
    return _first_turned(base, width, rotated, factor) if said["rope_type"] == "proportional" else None


def _in_vllm(said: dict[str, Any], width: int) -> Rope | None:
    """Angles that vLLM computes (rotary_embedding/, without a factor of proportional ones); None as for `_in_mlx`."""
    base, rotary = said["rope_theta"], int(width * (said.get("partial_rotary_factor") or 1.0))
    if said["rope_type"] == "proportional":
        return _first_turned(base, width, rotary // 2, 1.0)
    if said["rope_type"] not in ("default", "linear"):
        return None
    turned = plain_rope(base, rotary // 2, said["factor"] if said["rope_type"] == "linear" else 1.0)
    return Rope(turned.angles + (0.0,) * (width // 2 - rotary // 2))


def _first_turned(base: float, width: int, turned: int, factor: float) -> Rope:
    angles = plain_rope(base, width // 2, factor).angles
    return Rope(angles[:turned] + (0.0,) * (width // 2 - turned))


COMPUTED = {"mlx-lm": _in_mlx, "vLLM": _in_vllm}


def check_rope(spec: ModelSpec, runtime: str) -> None:
    """Raise ConfigError for a rotary embedding that a runtime computes otherwise than transformers.

    runtime: of COMPUTED, or any other name for a graph that is traced from transformers: that holds what does not
    depend on the length of the text.
    """
    for layer_type, rope in ropes(spec.layer_config).items():
        said = rope_parameters(spec.layer_config)[layer_type]
        computed = COMPUTED[runtime](said, 2 * len(rope.angles)) if runtime in COMPUTED else rope
        if runtime in spec.family.plain_in:
            computed = plain_rope(said["rope_theta"], len(rope.angles))
        if rope.by_length or computed is None or not rope.same(computed):
            raise ConfigError(refusal(layer_type, said, runtime))


def refusal(layer_type: str, said: dict[str, Any], runtime: str) -> str:
    """The message for rope parameters that a runtime would compute otherwise."""
    return (
        f"rope_parameters of {layer_type}, {said}: {runtime} would compute another rotary embedding: export it to hf, "
        "whose runtime is transformers"
    )
