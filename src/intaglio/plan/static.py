"""Static scales, of the activations of linears and of the KV cache. Recipe tables and names.

Such a scale is one float32 number for all tokens, found by training or calibration and stored beside
the weights. 0 stands for a scale that is not known: there nothing is quantized.

Names are those of the Gemma mobile format (transformers: integrations/gemma_quant.py), in the state
dict of the text model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from intaglio.plan.checks import Rule, names_among
from intaglio.plan.family import ModelSpec, TensorSpec

LINEAR_ROLES = ("attention", "mlp", "ple_linear")
FORMAT_BITS = 8  # the only width of activations and KV that the format knows
# Linears of one layer that read the same tensor share its scale: the first that a model has owns it.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Linears of these roles get a static scale for their input and one for their output.

    dropout: share of the training steps in which activations and KV cache stay floats, so that the
        weights serve runtimes of either kind.
    """

    bits: int = FORMAT_BITS
    roles: tuple[str, ...] = LINEAR_ROLES
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class KvCache:
    """Keys (rotated) and values (normed) of every layer get a static scale each."""

    bits: int = FORMAT_BITS


@dataclass(frozen=True)
class StaticScale:
    """One stored scalar.

    name: of the scalar. kind: of what it scales. module: whose input, output, keys or values these
    are. owner: name of the scale whose value this one has; its own name where it has its own.
    """

    name: str
    kind: Literal["input", "output", "k_cache", "v_cache"]
    module: str
    owner: str

    @property
    def owned(self) -> bool:
        return self.name == self.owner


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


_BITS = Rule(
    lambda value: type(value) is int and value == FORMAT_BITS,
    f"{FORMAT_BITS}, the only width that the format has",
    any_type=True,
)
ACTIVATION_RULES = {
    "bits": _BITS,
    "roles": names_among(LINEAR_ROLES, empty=False),
    "dropout": Rule(_is_share, "a share of the steps in [0, 1]", any_type=True),
}
KV_CACHE_RULES = {"bits": _BITS}


def activation_scales(linears: list[TensorSpec]) -> list[StaticScale]:
    """Input and output scale of each of these linears, whose tensors are named `MODULE.weight`."""
    modules = [linear.name.removesuffix(".weight") for linear in linears]
    scales = []
    for module in modules:
        first = _first_reader(module, modules)
        scales.append(
            StaticScale(f"{module}.input_activation_scale", "input", module, f"{first}.input_activation_scale")
        )
        name = f"{module}.output_activation_scale"
        scales.append(StaticScale(name, "output", module, name))
    return scales


def _first_reader(module: str, modules: list[str]) -> str:
    parent, _, own = module.rpartition(".")
    group = next((group for group in SAME_INPUT if own in group), (own,))
    return next(name for name in (f"{parent}.{reader}" for reader in group) if name in modules)


def kv_scales(model: ModelSpec) -> list[StaticScale]:
    """Scale of keys and of values of each layer; a KV-shared layer has those of its donor."""
    scales = []
    for layer, donor in enumerate(model.kv_donors):
        for kind in ("k_cache", "v_cache"):
            module, owner = (f"model.layers.{number}.self_attn" for number in (layer, donor))
            scales.append(StaticScale(f"{module}.{kind}_scale", kind, module, f"{owner}.{kind}_scale"))
    return scales
