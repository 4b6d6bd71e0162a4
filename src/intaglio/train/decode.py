"""Decoded weights shared by all forwards of an optimizer step, and codes that stand still in the tail."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.numerics.grid import FloatGrid
from intaglio.train.fakequant import WeightQuantizer
from intaglio.train.group import (
    FakeQuantizeGroup,
    RoundStraightThroughGroup,
    WeightGroup,
    find_scales,
    round_together,
)
from intaglio.train.modules import (
    QuantExperts,
    QuantLinear,
    QuantLoraLinear,
    RoundedEmbedding,
    RoundedWeight,
    merged_latent,
    quantizers_of,
)


class StepWeights:
    """The weights of a prepared model, decoded once for an optimizer step.

    Looks through the modules once, since to do so at each step would take a good part of its time. So make
    another after modules were replaced or codes were frozen. Where quantizers are compiled, the weights of a layer
    share memory until `close`.
    """

    def __init__(self, model: nn.Module):
        self.groups = _weight_groups(model)
        self.rounded = _rounded_modules(model)
        self.compiled = any(quantizer.compiled for quantizer in self.quantizers)

    @property
    def quantizers(self) -> list[WeightQuantizer]:
        return [quantizer for group in self.groups for quantizer in group.quantizers]

    @torch.no_grad()
    def decode(self, dtype: torch.dtype) -> None:
        """Decode every weight; forwards and recomputations until `drop` share it."""
        if not self.compiled:
            _cache_scales([pair for group in self.groups for pair in zip(group.quantizers, group.latents, strict=True)])
        for group in self.groups:
            group.cache(dtype)
        for grid, modules in self.rounded.items():
            for module, values in zip(modules, round_together(grid, _latents(modules)), strict=True):
                vars(module).update(rounded=values)

    def drop(self) -> None:
        """Forget the decoded weights; must follow every change of a latent."""
        for group in self.groups:
            group.drop()
        for modules in self.rounded.values():
            for module in modules:
                vars(module).update(rounded=None)

    def close(self) -> None:
        """Forget the decoded weights, and leave latents in memory of their own."""
        self.drop()
        for group in self.groups:
            group.close()

    @contextmanager
    def dropped_by_backward(self) -> Iterator[None]:
        """For a step's last forward and backward inside: forget each decoded weight once its gradient is there.

        So decoded weights make room for the gradients, and the two never lie in memory as a whole together.
        """
        handles = []
        for group in self.groups:
            for quantizer, latent in zip(group.quantizers, group.latents, strict=True):
                learned = latent if latent.requires_grad else quantizer.scale_latent
                if learned is not None and learned.requires_grad:
                    handles.append(learned.register_post_accumulate_grad_hook(lambda _, q=quantizer: q.drop()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def in_graph(self, dtype: torch.dtype) -> Iterator[None]:
        """For the forward and backward inside, give modules plain tensors to compute with, which have gradients.

        Compiled layers need them; others save the call of an autograd function for each weight.
        """
        for group in self.groups:
            scales = [q.scale_latent for q in group.quantizers]
            decoded = FakeQuantizeGroup.apply(group, dtype, *group.latents, *scales)
            for quantizer, weight in zip(group.quantizers, decoded, strict=True):
                vars(quantizer).update(decoded=weight)
        for grid, modules in self.rounded.items():
            cached = [module.rounded for module in modules]
            decoded = RoundStraightThroughGroup.apply(grid, cached, *_latents(modules))
            for module, weight in zip(modules, decoded, strict=True):
                vars(module).update(decoded=weight)
        try:
            yield
        finally:
            for quantizer in self.quantizers:
                vars(quantizer).update(decoded=None)
            for modules in self.rounded.values():
                for module in modules:
                    vars(module).update(decoded=None)


def _layer(path: str) -> str:
    """The decoder layer that a module is in; the module itself outside of all layers."""
    layer = re.match(r"(.*?\.\d+)\.", path)
    return layer[1] if layer else path


def _weight_groups(model: nn.Module) -> list[WeightGroup]:
    """Weights of linears and of experts that are decoded as a whole, by decoder layer."""
    groups: dict[str, dict[WeightQuantizer, Tensor]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, QuantLinear | QuantExperts) or path.endswith(".base_layer"):
            continue  # an adapter changes the weight
        for name, quantizer in quantizers_of(module).items():
            groups.setdefault(_layer(path), {})[quantizer] = module._parameters[name]  # type: ignore
    return [WeightGroup(list(group), list(group.values())) for group in groups.values()]


def _rounded_modules(model: nn.Module) -> dict[FloatGrid, list[Any]]:
    """Modules that use a rounded weight as a whole, by its grid."""
    by_grid: dict[FloatGrid, list[Any]] = {}
    for module in model.modules():
        if isinstance(module, RoundedWeight) and not isinstance(module, RoundedEmbedding):
            by_grid.setdefault(module.float_grid, []).append(module)
    return by_grid


def _latents(modules: list[Any]) -> list[Tensor]:
    return [module._parameters["weight"] for module in modules]


def _cache_scales(pairs: list[tuple[WeightQuantizer, Tensor]]) -> None:
    alike: dict[Any, list[tuple[WeightQuantizer, Tensor]]] = {}
    for pair in pairs:
        alike.setdefault((pair[0].mode, pair[0].grid, pair[1].device), []).append(pair)
    for same in alike.values():
        quantizers, latents = map(list, zip(*same, strict=True))
        for quantizer, scales in zip(quantizers, find_scales(quantizers, latents), strict=True):
            vars(quantizer).update(scales=scales)


def freeze_codes(model: nn.Module) -> None:
    """Fix the codes of every weight whose scales are learned; only these go on: the start of the frozen tail.

    Embeddings on a finer grid keep learning: theirs are the codes that can still make up for the others'.
    """
    adapted = {m.base_layer: m for m in model.modules() if isinstance(m, QuantLoraLinear)}  # type: ignore[attr-defined]
    slots = [(module, name, q) for module in model.modules() for name, q in quantizers_of(module).items()]
    for module, name, quantizer in slots:
        if quantizer.scale_latent is None or quantizer.mode == "frozen":
            continue
        lora: Any = adapted.get(module)
        latent: Tensor = module._parameters[name] if lora is None else merged_latent(lora)  # type: ignore[assignment]
        quantizer.freeze(latent.detach())
        for parameter in (module._parameters[name], *(lora.parameters() if lora is not None else ())):
            if parameter is not quantizer.scale_latent:
                parameter.requires_grad_(False)  # type: ignore[union-attr]
