"""Decoded weights shared by all forwards of an optimizer step, and codes that stand still in the tail."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.numerics.grid import FloatGrid
from intaglio.train.fakequant import (
    FakeQuantizeGroup,
    WeightQuantizer,
    decode_group,
    find_scales,
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


def whole_weights(model: nn.Module) -> dict[WeightQuantizer, nn.Parameter]:
    """Each quantizer whose weight is decoded as a whole, of linears and of experts, with its latent."""
    owners = (m for m in model.modules() if isinstance(m, QuantLinear | QuantExperts))
    return {q: m._parameters[name] for m in owners for name, q in quantizers_of(m).items()}  # type: ignore[misc]


def _layer(path: str) -> str:
    """The decoder layer that a module is in; the module itself outside of all layers."""
    layer = re.match(r"(.*?\.\d+)\.", path)
    return layer[1] if layer else path


def weight_groups(model: nn.Module) -> list[tuple[list[WeightQuantizer], list[Tensor]]]:
    """Quantizers that linears decode as a whole, with their latents, by decoder layer."""
    groups: dict[str, dict[WeightQuantizer, Tensor]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, QuantLinear | QuantExperts) or path.endswith(".base_layer"):
            continue  # an adapter changes the weight
        for name, quantizer in quantizers_of(module).items():
            groups.setdefault(_layer(path), {})[quantizer] = module._parameters[name]  # type: ignore
    return [(list(group), list(group.values())) for group in groups.values()]


@torch.no_grad()
def cache_values(model: nn.Module, dtype: torch.dtype) -> None:
    """Decode every weight once; forwards and recomputations until `drop_values` share it."""
    groups = weight_groups(model)
    compiled = any(quantizer.compiled for quantizers, _ in groups for quantizer in quantizers)
    if not compiled:
        _cache_scales([pair for group in groups for pair in zip(*group, strict=True)])
    for quantizers, latents in groups:
        for quantizer, decoded in zip(quantizers, decode_group(quantizers, latents, dtype), strict=True):
            vars(quantizer).update(values=decoded[0], steps=decoded[1])  # a module's own way takes ten times as long
    _cache_rounded(model)


def _cache_scales(pairs: list[tuple[WeightQuantizer, Tensor]]) -> None:
    alike: dict[Any, list[tuple[WeightQuantizer, Tensor]]] = {}
    for pair in pairs:
        alike.setdefault((pair[0].mode, pair[0].grid, pair[1].device), []).append(pair)
    for same in alike.values():
        quantizers, latents = map(list, zip(*same, strict=True))
        for quantizer, scales in zip(quantizers, find_scales(quantizers, latents), strict=True):
            vars(quantizer).update(scales=scales)


def _rounded_weights(model: nn.Module) -> list[Any]:
    """Modules that use a rounded weight as a whole."""
    return [m for m in model.modules() if isinstance(m, RoundedWeight) and not isinstance(m, RoundedEmbedding)]


def _cache_rounded(model: nn.Module) -> None:
    """All float leftovers of a grid at once, since one by one these many small vectors take their time."""
    by_grid: dict[FloatGrid, list[Any]] = {}
    for module in _rounded_weights(model):
        by_grid.setdefault(module.float_grid, []).append(module)
    for grid, modules in by_grid.items():
        latents = [module._parameters["weight"] for module in modules]
        rounded = grid.round(torch.cat([latent.flatten() for latent in latents]))
        for module, latent, values in zip(modules, latents, rounded.split([w.numel() for w in latents]), strict=True):
            vars(module).update(rounded=values.view(latent.shape).to(latent.dtype))


def drop_values(model: nn.Module) -> None:
    """Forget cached weights; must follow every change of a latent."""
    for quantizer in whole_weights(model):
        _forget(quantizer)
    for module in _rounded_weights(model):
        vars(module).update(rounded=None)


def _forget(quantizer: WeightQuantizer) -> None:
    vars(quantizer).update(values=None, steps=None, scales=None, decoded=None)


@contextmanager
def dropped_by_backward(model: nn.Module) -> Iterator[None]:
    """For a step's last forward and backward inside: forget each cached weight once its gradient is there.

    So decoded weights make room for the gradients, and the two never lie in memory as a whole together.
    """
    handles = []
    for quantizer, latent in whole_weights(model).items():
        learned = latent if latent.requires_grad else quantizer.scale_latent
        if learned is not None and learned.requires_grad:
            handles.append(learned.register_post_accumulate_grad_hook(lambda _, q=quantizer: _forget(q)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def decoded_in_graph(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """For the forward and backward inside, hand compiled layers plain tensors to multiply with."""
    groups = weight_groups(model)
    for quantizers, latents in groups:
        scales = [q.scale_latent for q in quantizers]
        decoded = FakeQuantizeGroup.apply(quantizers, dtype, *latents, *scales)
        for quantizer, weight in zip(quantizers, decoded, strict=True):
            quantizer.decoded = weight
    try:
        yield
    finally:
        for quantizers, _ in groups:
            for quantizer in quantizers:
                quantizer.decoded = None


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
