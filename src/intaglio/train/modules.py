"""Quantized modules: what takes the place of linears, embeddings and float leftovers by a change of class.

State-dict keys stay, and so do `isinstance` checks, hooks and wrappers of other libraries.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.errors import InputError
from intaglio.numerics.grid import FloatGrid, Quantized
from intaglio.train.fakequant import (
    FakeQuantLinear,
    RoundStraightThrough,
    WeightQuantizer,
    compute_dtype,
)
from intaglio.train.static import latent_of, static, with_gradients_of


class QuantLinear(nn.Linear):
    """nn.Linear whose weight lies on its quantizer's grid, and its input and output on their static scales."""

    quantizer: WeightQuantizer

    def forward(self, x: Tensor) -> Tensor:
        quantizer = self.quantizer
        if quantizer.decoded is not None:
            x = static(self, "input", x.to(quantizer.decoded.dtype))
            return static(self, "output", F.linear(x, quantizer.decoded, self.bias))
        scales = latent_of(self, "input"), latent_of(self, "output")
        return FakeQuantLinear.apply(x, self.weight, quantizer.scale_latent, self.bias, *scales, quantizer)


class QuantEmbedding(nn.Embedding):
    """nn.Embedding, scaled or not, whose rows are gathered first and decoded after."""

    quantizer: WeightQuantizer

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = F.embedding(input_ids, self.weight, self.padding_idx)
        return _scaled(self, self.quantizer.forward_rows(rows, input_ids, self.weight))


class QuantExperts:
    """Mixin for a module that holds the weights of experts [E, R, C] as parameters of its own.

    transformers indexes them expert by expert. So each is decoded once for a forward, and its name reads as the
    decoded weight while that lasts; outside of it, as the latent.
    """

    quantizers: nn.ModuleDict  # by the parameters' names
    float_grids: dict[str, FloatGrid]  # of those that stay floats

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        latents: dict[str, Tensor] = self._parameters  # type: ignore[attr-defined]
        decoded = {
            name: RoundStraightThrough.apply(latents[name], grid, None) for name, grid in self.float_grids.items()
        }
        for name, quantizer in self.quantizers.items():
            ready, dtype = quantizer.decoded, compute_dtype(hidden_states, latents[name])
            decoded[name] = ready if ready is not None else quantizer(latents[name], dtype)
        self.__dict__["decoded"] = decoded
        try:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__["decoded"] = {}

    def _weight(self, name: str) -> Tensor:
        return self.__dict__.get("decoded", {}).get(name, self._parameters[name])  # type: ignore[attr-defined]

    gate_up_proj = property(lambda self: self._weight("gate_up_proj"))
    down_proj = property(lambda self: self._weight("down_proj"))


class FrozenEmbedding:
    """Mixin for an embedding that is not trained and kept as codes: no table of floats, and no `weight`."""

    frozen: FrozenCodes

    def forward(self, input_ids: Tensor) -> Tensor:
        return _scaled(self, self.frozen.rows(input_ids))  # type: ignore[arg-type]


class FrozenCodes(nn.Module):
    """A Quantized as buffers, which no checkpoint holds: the original says what they are."""

    def __init__(self, quantized: Quantized, dtype: torch.dtype):
        super().__init__()
        self.grid, self.dtype = quantized.grid, dtype
        for name in ("codes", "scale", "super_scale"):
            self.register_buffer(name, getattr(quantized, name), persistent=False)

    def quantized(self) -> Quantized:
        """All of it, on the CPU."""
        parts = (self.codes, self.scale, self.super_scale)
        return Quantized(self.grid, *(None if part is None else part.cpu() for part in parts))  # type: ignore[arg-type, operator]

    def rows(self, index: Tensor) -> Tensor:
        """Decoded rows [..., C] of an int64 index [...]."""
        parts = (self.codes, self.scale, self.super_scale)
        return Quantized(self.grid, *(None if part is None else part[index] for part in parts)).decode(self.dtype)  # type: ignore[arg-type, index]


def _scaled(embedding: nn.Module, rows: Tensor) -> Tensor:
    scale = getattr(embedding, "embed_scale", None)  # Gemma scales by sqrt(width), after the lookup
    return rows if scale is None else rows * scale.to(rows.dtype)


class RoundedWeight:
    """Mixin for a module with a float leftover: `weight` reads as the rounded value.

    rounded: that value, once for the optimizer step; see `StepWeights`. decoded: the same with its place in
    the autograd graph.
    """

    float_grid: FloatGrid
    rounded: Tensor | None = None
    decoded: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The rounded value, with the latent's gradient."""
        if self.decoded is not None:
            return self.decoded
        latent: Tensor = self._parameters["weight"]  # type: ignore[attr-defined]
        if torch.compiler.is_compiling():  # see with_gradients_of
            return with_gradients_of(self.float_grid.round(latent.detach()).to(latent.dtype), latent)
        return RoundStraightThrough.apply(latent, self.float_grid, self.rounded)


class RoundedRouter:
    """Mixin for a router's vectors, which are parameters of its own: they read as the rounded values."""

    float_grid: FloatGrid

    def _rounded(self, name: str) -> Tensor:
        return RoundStraightThrough.apply(self._parameters[name], self.float_grid, None)  # type: ignore[attr-defined]

    scale = property(lambda self: self._rounded("scale"))
    per_expert_scale = property(lambda self: self._rounded("per_expert_scale"))


class RoundedEmbedding(RoundedWeight):
    """Mixin for an embedding kept float: rows are gathered first and rounded after."""

    def forward(self, input_ids: Tensor) -> Tensor:
        latent, padding = self._parameters["weight"], self.padding_idx  # type: ignore[attr-defined]
        rows = F.embedding(input_ids, latent, padding)
        return _scaled(self, RoundStraightThrough.apply(rows, self.float_grid, None))  # type: ignore[arg-type]


class QuantLoraLinear:
    """Mixin for PEFT's lora.Linear: the adapters are merged into the latent, then quantized."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise InputError("adapter_names: one quantized weight cannot serve several adapters in a batch")
        base, latent = self.base_layer, merged_latent(self)  # type: ignore[attr-defined, arg-type]
        weight = base.quantizer(latent, compute_dtype(x, latent))
        return static(base, "output", F.linear(static(base, "input", x.to(weight.dtype)), weight, base.bias))


def merged_latent(lora: Any) -> Tensor:
    """The latent [R, C] that PEFT's lora.Linear stands for: its base and the adapters that are active."""
    if lora.disable_adapters and lora.merged:
        lora.unmerge()  # as PEFT's own forward does
    latent = lora.base_layer.weight
    if lora.disable_adapters or lora.merged:
        return latent
    for name in lora.active_adapters:
        if name in lora.lora_A:
            latent = latent + lora.get_delta_weight(name)
    return latent


def quantizers_of(module: Any) -> dict[str, WeightQuantizer]:
    """The quantizers of a module by the names of its parameters that they decode."""
    several = getattr(module, "quantizers", None)
    if isinstance(several, nn.ModuleDict):
        return dict(several.items())  # type: ignore[arg-type]
    quantizer = getattr(module, "quantizer", None)
    return {"weight": quantizer} if isinstance(quantizer, WeightQuantizer) else {}


@functools.cache
def _mixed(mixin: type, base: type) -> type:
    return type(f"{mixin.__name__}[{base.__name__}]", (mixin, base), {})


def swap_class(module: nn.Module, mixin: type) -> None:
    """Give `module` a subclass of its own class that behaves as `mixin`.

    One subclass serves all modules of a class: torch.compile would compile each type anew.
    """
    module.__class__ = _mixed(mixin, type(module))  # type: ignore[arg-type]
