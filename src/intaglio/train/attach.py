"""Attach a plan to a model: swap classes in place, add quantizers, and pack what was trained.

`prepare` changes the class of each planned module, so that state-dict keys, `isinstance` checks,
hooks and wrappers of other libraries go on working. `pack_model` reads codes and scales back out of
the forward. Between the two, anyone's trainer may run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.errors import RecipeError
from intaglio.numerics.fit import check_finite
from intaglio.numerics.grid import BlockGrid, FloatGrid, Quantized
from intaglio.packed.model import write_packed
from intaglio.plan.plan import Plan, PlannedTensor
from intaglio.train.fakequant import FakeQuantLinear, RoundStraightThrough, WeightQuantizer, compute_dtype
from intaglio.train.quantize import FITS

Fit = Callable[[Tensor, BlockGrid], Quantized]


class QuantLinear(nn.Linear):
    """nn.Linear whose weight lies on its quantizer's grid."""

    quantizer: WeightQuantizer

    def forward(self, x: Tensor) -> Tensor:
        quantizer = self.quantizer
        if quantizer.decoded is not None:
            return F.linear(x, quantizer.decoded, self.bias)
        return FakeQuantLinear.apply(x, self.weight, quantizer.scale_latent, self.bias, quantizer)


class QuantEmbedding(nn.Embedding):
    """nn.Embedding, scaled or not, whose rows are gathered first and decoded after."""

    quantizer: WeightQuantizer

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = F.embedding(input_ids, self.weight, self.padding_idx)
        decoded = self.quantizer.forward_rows(rows, input_ids)
        scale = getattr(self, "embed_scale", None)  # Gemma scales by sqrt(width), after the lookup
        return decoded if scale is None else decoded * scale.to(decoded.dtype)


class RoundedWeight:
    """Mixin for a module with a float leftover: `weight` reads as the rounded value."""

    float_grid: FloatGrid

    @property
    def weight(self) -> Tensor:
        return RoundStraightThrough.apply(self._parameters["weight"], self.float_grid)  # type: ignore[attr-defined]


class QuantLoraLinear:
    """Mixin for PEFT's lora.Linear: the adapters are merged into the latent, then quantized."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer  # type: ignore[attr-defined]
        latent = base.weight
        for name in self.active_adapters:  # type: ignore[attr-defined]
            if name in self.lora_A:  # type: ignore[attr-defined]
                latent = latent + self.get_delta_weight(name)  # type: ignore[attr-defined]
        weight = base.quantizer(latent, compute_dtype(x, latent))
        return F.linear(x.to(weight.dtype), weight, base.bias)


@functools.cache
def _mixed(mixin: type, base: type) -> type:
    return type(f"{mixin.__name__}[{base.__name__}]", (mixin, base), {})


def swap_class(module: nn.Module, mixin: type) -> None:
    """Give `module` a subclass of its own class that behaves as `mixin`.

    One subclass serves all modules of a class: torch.compile would compile each type anew.
    """
    module.__class__ = _mixed(mixin, type(module))


def prepare(model: nn.Module, plan: Plan, *, fit: Fit | None = None, compiled: bool = False) -> nn.Module:
    """Put every planned tensor of `model` on its grid, in place, and return the model.

    model: the transformers text model of the plan's config, or a PEFT LoRA model around it.
        Latents should be float32; gradients flow to latents, scales and float leftovers.
    fit: first scales; the recipe's own fit by default.
    compiled: run the quantizer through torch.compile.

    Tensors that the recipe does not train are decoded once and need no further work. Raises
    RecipeError if the model lacks a planned tensor, WeightError for NaN or Inf.
    """
    fit = fit or FITS[plan.recipe.fit]
    owners = _owners(model)
    quantizers: dict[str, WeightQuantizer] = {}
    for tensor in plan:
        if tensor.name not in owners:
            raise RecipeError(f"{tensor.name}: planned, but not in this model: was the plan made for another one?")
        module, attribute = owners[tensor.name]
        check_finite(getattr(module, attribute), tensor.name)
        quantizer = _attach(module, attribute, tensor, fit, compiled)
        if quantizer is not None:
            quantizers[tensor.name] = quantizer
    _share_with_tied_head(model, quantizers)
    return model


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Tensor name of the bare model -> the module that holds it. PEFT's wrappers are looked through."""
    owners: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        path = path.removeprefix("base_model.model.").replace(".base_layer", "")
        names = [n for n, p in module._parameters.items() if p is not None]
        names += [n for n in module._buffers if n == "layer_scalar"]
        for name in names:
            owners.setdefault(f"{path}.{name}" if path else name, (module, name))
    return owners


def _attach(
    module: nn.Module, attribute: str, tensor: PlannedTensor, fit: Fit, compiled: bool
) -> WeightQuantizer | None:
    latent: Tensor = getattr(module, attribute)
    grid, trainable = tensor.grid, tensor.rule.trainable and isinstance(latent, nn.Parameter)
    if isinstance(grid, FloatGrid):
        if trainable:
            module.float_grid = grid  # type: ignore[assignment]
            swap_class(module, RoundedWeight)
        else:
            latent.data.copy_(grid.round(latent.data))
            latent.requires_grad_(False)
        return None
    fitted = fit(latent.detach().cpu(), grid)
    learned = trainable and grid.ggml_type == "Q4_0"
    quantizer = WeightQuantizer(grid, latent, fitted, learned=learned, compiled=compiled)
    module.quantizer = quantizer
    if not trainable:
        latent.data.copy_(fitted.decode())
        latent.requires_grad_(False)
    elif isinstance(module, nn.Embedding):
        swap_class(module, QuantEmbedding)
    else:
        module.__class__ = QuantLinear
    return quantizer


def _share_with_tied_head(model: nn.Module, quantizers: dict[str, WeightQuantizer]) -> None:
    """A head tied to a trained embedding decodes through the embedding's quantizer."""
    by_weight = {id(m._parameters["weight"]): m.quantizer for m in _quantized(model)}
    for module in model.modules():
        weight = module._parameters.get("weight")
        tied = type(module) is nn.Linear and weight is not None and weight.requires_grad
        if tied and id(weight) in by_weight:
            module.quantizer = by_weight[id(weight)]
            module.__class__ = QuantLinear
    for module in model.modules():
        if hasattr(module, "get_delta_weight") and isinstance(getattr(module, "base_layer", None), QuantLinear):
            swap_class(module, QuantLoraLinear)


def _quantized(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if isinstance(getattr(m, "quantizer", None), WeightQuantizer))


def quantized_linears(model: nn.Module) -> dict[WeightQuantizer, nn.Module]:
    """Each quantizer that a linear decodes as a whole, with one module that owns its latent."""
    return {m.quantizer: m for m in model.modules() if isinstance(m, QuantLinear)}  # type: ignore[misc]


@torch.no_grad()
def cache_values(model: nn.Module, dtype: torch.dtype) -> None:
    """Decode every weight once; forwards and recomputations until `drop_values` share it."""
    for quantizer, module in quantized_linears(model).items():
        quantizer.values = quantizer.compute(module.weight)[0].to(dtype)  # type: ignore[arg-type]


def drop_values(model: nn.Module) -> None:
    """Forget cached weights; must follow every change of a latent."""
    for quantizer in quantized_linears(model):
        quantizer.values = quantizer.decoded = None


@contextmanager
def decoded_in_graph(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """For the forward and backward inside, hand compiled layers plain tensors to multiply with."""
    linears = quantized_linears(model)
    for quantizer, module in linears.items():
        quantizer.decoded = quantizer(module.weight, dtype)
    try:
        yield
    finally:
        for quantizer in linears:
            quantizer.decoded = None


def freeze_codes(model: nn.Module) -> None:
    """Fix the codes of every learned weight: the start of the frozen tail."""
    for module in _quantized(model):
        quantizer: WeightQuantizer = module.quantizer  # type: ignore[assignment]
        if quantizer.scale_latent is not None and quantizer.mode != "frozen":
            quantizer.freeze(module._parameters["weight"])  # type: ignore[arg-type]


@torch.no_grad()
def packed_value(model_owner: tuple[nn.Module, str], tensor: PlannedTensor, merged: Tensor | None = None) -> Any:
    """Quantized or float32 tensor, as the forward uses it."""
    module, attribute = model_owner
    stored = module._parameters.get(attribute)
    latent = merged if merged is not None else stored if stored is not None else module._buffers[attribute]
    assert latent is not None
    if isinstance(tensor.grid, FloatGrid):
        return tensor.grid.round(latent.detach().cpu())
    return module.quantizer.pack(latent.detach())  # type: ignore[union-attr, operator]


def pack_model(
    model: nn.Module,
    plan: Plan,
    path: str | Path,
    *,
    assets: str | Path,
    provenance: dict[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Write the prepared model as a PackedModel folder.

    assets: the source model's folder, for tokenizer and generation files. LoRA adapters are merged
    into the latents, as the forward did.
    """
    owners = _owners(model)
    merged = _merged_latents(model)
    with write_packed(Path(path), plan, assets=Path(assets), provenance=provenance or {}, replace=replace) as writer:
        for tensor in plan:
            writer.add(tensor.name, packed_value(owners[tensor.name], tensor, merged.get(tensor.name)))


@torch.no_grad()
def _merged_latents(model: nn.Module) -> dict[str, Tensor]:
    merged = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantLoraLinear):
            base = module.base_layer  # type: ignore[attr-defined]
            latent = base.weight
            for name in module.active_adapters:  # type: ignore[attr-defined]
                latent = latent + module.get_delta_weight(name)  # type: ignore[attr-defined]
            merged[path.removeprefix("base_model.model.") + ".weight"] = latent
    return merged
