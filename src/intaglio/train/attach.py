"""Attach a plan to a model: swap classes in place, add quantizers, and pack what was trained.

`prepare` changes the class of each planned module, so that state-dict keys, `isinstance` checks,
hooks and wrappers of other libraries go on working. `pack_model` reads codes and scales back out of
the forward. Between the two, anyone's trainer may run.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.errors import InputError, RecipeError, WeightError
from intaglio.numerics.fit import check_finite
from intaglio.numerics.grid import BlockGrid, FloatGrid, Quantized
from intaglio.packed.model import write_packed
from intaglio.plan.plan import Plan, PlannedTensor
from intaglio.train.fakequant import (
    FakeQuantizeGroup,
    FakeQuantLinear,
    RoundStraightThrough,
    WeightQuantizer,
    compute_dtype,
    decode_group,
)
from intaglio.train.kv import use_static_attention
from intaglio.train.quantize import FITS
from intaglio.train.static import StaticLinear, StaticScales, bare_path, latent_of, modules_by_name, read_scales, static

Fit = Callable[[Tensor, BlockGrid], Quantized]


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


def is_frozen_table(tensor: PlannedTensor) -> bool:
    """Whether `prepare(compact=True)` keeps it as codes: a table that no head is tied to and no gradient reaches."""
    grid, rule = tensor.grid, tensor.rule
    return tensor.spec.role == "ple_embedding" and isinstance(grid, BlockGrid) and not rule.trainable


def _scaled(embedding: nn.Module, rows: Tensor) -> Tensor:
    scale = getattr(embedding, "embed_scale", None)  # Gemma scales by sqrt(width), after the lookup
    return rows if scale is None else rows * scale.to(rows.dtype)


class RoundedWeight:
    """Mixin for a module with a float leftover: `weight` reads as the rounded value.

    rounded: that value, once for the optimizer step; see `cache_values`.
    """

    float_grid: FloatGrid
    rounded: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        latent: Tensor = self._parameters["weight"]  # type: ignore[attr-defined]
        return RoundStraightThrough.apply(latent, self.float_grid, self.rounded)


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


@functools.cache
def _mixed(mixin: type, base: type) -> type:
    return type(f"{mixin.__name__}[{base.__name__}]", (mixin, base), {})


def swap_class(module: nn.Module, mixin: type) -> None:
    """Give `module` a subclass of its own class that behaves as `mixin`.

    One subclass serves all modules of a class: torch.compile would compile each type anew.
    """
    module.__class__ = _mixed(mixin, type(module))  # type: ignore[arg-type]


def prepare(
    model: nn.Module, plan: Plan, *, fit: Fit | None = None, compiled: bool = False, compact: bool = False
) -> nn.Module:
    """Put every planned tensor of `model` on its grid, in place, and return the model.

    model: the transformers text model of the plan's config, or a PEFT LoRA model around it, with
        plain LoRA on linears that the recipe trains. Adapters come first, `prepare` after them.
        Latents should be float32; gradients flow to latents, scales and float leftovers.
    fit: first scales; the recipe's own fit by default.
    compiled: run the quantizer through torch.compile.
    compact: keep the table of per-layer embeddings, if the recipe does not train it, as codes. The
        state dict then lacks it, and the floats are left as they are: another model may share them.

    Tensors that the recipe does not train are decoded once and need no further work. Static scales of
    activations and KV cache stay off until `calibrate` finds them. Raises
    RecipeError if the model lacks a planned tensor, WeightError for NaN or Inf, and InputError for a
    model that is prepared already or has adapters that no quantized weight can hold.
    """
    if any(isinstance(m, QuantLinear | QuantEmbedding | RoundedWeight) for m in model.modules()):
        raise InputError("this model is prepared already: prepare a new copy of the original")
    fit = fit or FITS[plan.recipe.fit]
    owners = _owners(model)
    for tensor in plan:
        if tensor.name not in owners:
            raise RecipeError(f"{tensor.name}: planned, but not in this model: was the plan made for another one?")
        module, attribute = owners[tensor.name]
        shape = tuple(getattr(module, attribute).shape)
        if shape != tensor.spec.shape:
            planned = list(tensor.spec.shape)
            raise RecipeError(f"{tensor.name}: planned as {planned}, but {list(shape)} in this model: plan this model")
        check_finite(getattr(module, attribute), tensor.name)
        try:
            _attach(module, attribute, tensor, fit, compiled, compact)
        except WeightError as error:
            raise WeightError(f"{tensor.name}: {error}") from error
    _share_with_tied_head(model)
    attach_static(model, plan)
    for module in model.modules():
        if is_adapter(module) and isinstance(module.base_layer, QuantLinear):
            swap_class(module, QuantLoraLinear)
    check_adapters(model)
    model.register_forward_pre_hook(check_adapters)  # some may still be added
    return model


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's layers around another."""
    return hasattr(type(module), "get_delta_weight")


def check_adapters(model: nn.Module, arguments: Any = None) -> None:
    """Raise InputError for an adapter that would be added to a quantized weight, not merged into it."""
    if torch.compiler.is_compiling():
        return
    for path, module in model.named_modules():
        if not is_adapter(module):
            continue
        base: Any = module.get_base_layer()  # type: ignore[operator]
        if isinstance(base, QuantLinear) and not isinstance(module, QuantLoraLinear):
            raise InputError(f"{path}: adapted after prepare(): call get_peft_model() first, then prepare()")
        if not isinstance(module, QuantLoraLinear) and hasattr(base, "weight"):
            raise InputError(
                f"{path}: cannot be adapted, since it is no linear whose grid the recipe trains: "
                "leave it out of target_modules, for example by exclude_modules"
            )
        lora: Any = module
        extras = [name for name in lora.lora_variant if name in lora.active_adapters]
        extras += [name for name, has_bias in lora.lora_bias.items() if has_bias]
        extras += [name for name, dropout in lora.lora_dropout.items() if not isinstance(dropout, nn.Identity)]
        if extras:
            raise InputError(
                f"{path}: adapter {extras[0]!r} is more than W + BA: expected LoRA without dropout, bias or DoRA, "
                "since the adapter is merged into the weight before it is quantized"
            )


def attach_static(model: Any, plan: Plan) -> None:
    """Give every module of the plan's static scales its place for them; no scale is known yet."""
    modules = modules_by_name(model)
    for scale in plan.static_scales:
        module = modules[scale.module]
        if not isinstance(getattr(module, "static", None), StaticScales):
            module.static = StaticScales()
        if scale.kind == "input" and not isinstance(module, QuantLinear):
            swap_class(module, StaticLinear)
    if plan.recipe.kv_cache is not None:
        use_static_attention(model)


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Tensor name of the bare model -> the module that holds it. PEFT's wrappers are looked through."""
    owners: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        path = bare_path(path)
        names = [n for n, p in module._parameters.items() if p is not None]
        names += [n for n in module._buffers if n == "layer_scalar"]
        names += ["weight"] if isinstance(module, FrozenEmbedding) else []
        for name in names:
            owners.setdefault(f"{path}.{name}" if path else name, (module, name))
    return owners


def _attach(module: nn.Module, attribute: str, tensor: PlannedTensor, fit: Fit, compiled: bool, compact: bool) -> None:
    latent: Tensor = getattr(module, attribute)
    grid, trainable = tensor.grid, tensor.rule.trainable and isinstance(latent, nn.Parameter)
    if isinstance(grid, FloatGrid):
        if trainable:
            module.float_grid = grid  # type: ignore[assignment]
            swap_class(module, RoundedEmbedding if isinstance(module, nn.Embedding) else RoundedWeight)
        else:
            latent.data.copy_(grid.round(latent.data))
            latent.requires_grad_(False)
        return
    fitted = fit(latent.detach(), grid)
    if compact and is_frozen_table(tensor):
        del module._parameters["weight"]
        module.frozen = FrozenCodes(fitted, latent.dtype)
        swap_class(module, FrozenEmbedding)
        return
    learned = trainable and (grid.positive or grid.ggml_type == "Q4_0")
    quantizer = WeightQuantizer(grid, latent, fitted, learned=learned, compiled=compiled)
    module.quantizer = quantizer
    if not trainable:
        latent.data.copy_(fitted.decode())
        latent.requires_grad_(False)
    elif isinstance(module, nn.Embedding):
        swap_class(module, QuantEmbedding)
    else:
        module.__class__ = QuantLinear


def _share_with_tied_head(model: nn.Module) -> None:
    """A head tied to a trained embedding decodes as the embedding does."""
    trained = (m for m in model.modules() if isinstance(m, QuantEmbedding | RoundedEmbedding))
    owners: dict[int, Any] = {id(m._parameters["weight"]): m for m in trained}
    for module in model.modules():
        owner = owners.get(id(module._parameters.get("weight")))
        if owner is None or type(module) is not nn.Linear:
            continue
        if isinstance(owner, RoundedEmbedding):
            module.float_grid = owner.float_grid  # type: ignore[assignment]
            swap_class(module, RoundedWeight)
        else:
            # not as a submodule: one name in the state dict, or save_pretrained finds tensors that are shared
            object.__setattr__(module, "quantizer", owner.quantizer)
            module.__class__ = QuantLinear


def _quantized(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if isinstance(getattr(m, "quantizer", None), WeightQuantizer))


def quantized_linears(model: nn.Module) -> dict[WeightQuantizer, nn.Module]:
    """Each quantizer that a linear decodes as a whole, with one module that owns its latent."""
    return {m.quantizer: m for m in model.modules() if isinstance(m, QuantLinear)}  # type: ignore[misc]


def _layer(path: str) -> str:
    """The decoder layer that a module is in; the module itself outside of all layers."""
    layer = re.match(r"(.*?\.\d+)\.", path)
    return layer[1] if layer else path


def weight_groups(model: nn.Module) -> list[tuple[list[WeightQuantizer], list[Tensor]]]:
    """Quantizers that linears decode as a whole, with their latents, by decoder layer."""
    groups: dict[str, dict[WeightQuantizer, Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear) and not path.endswith(".base_layer"):  # an adapter changes the weight
            group = groups.setdefault(_layer(path), {})
            group[module.quantizer] = module._parameters["weight"]  # type: ignore[assignment]
    return [(list(group), list(group.values())) for group in groups.values()]


@torch.no_grad()
def cache_values(model: nn.Module, dtype: torch.dtype) -> None:
    """Decode every weight once; forwards and recomputations until `drop_values` share it."""
    for quantizers, latents in weight_groups(model):
        for quantizer, decoded in zip(quantizers, decode_group(quantizers, latents, dtype), strict=True):
            quantizer.values, quantizer.steps = decoded
    if not any(quantizer.compiled for quantizer in quantized_linears(model)):  # a compiler merges the rounding in
        _cache_rounded(model)


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
            module.rounded = values.view(latent.shape).to(latent.dtype)


def drop_values(model: nn.Module) -> None:
    """Forget cached weights; must follow every change of a latent."""
    for quantizer in quantized_linears(model):
        quantizer.values = quantizer.steps = quantizer.decoded = None
    for module in _rounded_weights(model):
        module.rounded = None


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
    for module in _quantized(model):
        quantizer: WeightQuantizer = module.quantizer  # type: ignore[assignment]
        if quantizer.scale_latent is not None and quantizer.mode != "frozen":
            latent: nn.Parameter = module._parameters["weight"]  # type: ignore[assignment]
            quantizer.freeze(latent)
            latent.requires_grad_(False)


@torch.no_grad()
def packed_value(model_owner: tuple[nn.Module, str], tensor: PlannedTensor, merged: Tensor | None = None) -> Any:
    """Quantized or float32 tensor, as the forward uses it."""
    module, attribute = model_owner
    if isinstance(module, FrozenEmbedding):
        return module.frozen.quantized()
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
    dtype: torch.dtype = torch.float32,
    provenance: dict[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Write the prepared model as a PackedModel folder; static scales that were never calibrated are off.

    assets: the source model's folder, for tokenizer and generation files. dtype: in which the
    training forward multiplied. LoRA adapters are merged into the latents, as the forward did.
    """
    check_adapters(model)
    owners = _owners(model)
    merged = _merged_latents(model)
    drop_values(model)
    if not merged:  # decode as the training loop does: a compiled kernel may round a tie its own way
        cache_values(model, dtype)
    record = provenance or {}
    try:
        with write_packed(Path(path), plan, assets=Path(assets), provenance=record, replace=replace) as writer:
            for tensor in plan:
                try:
                    value = packed_value(owners[tensor.name], tensor, merged.get(tensor.name))
                except WeightError as error:
                    raise WeightError(f"{tensor.name}: {error}") from error
                writer.add(tensor.name, value)
            scales = read_scales(model, plan)
            for scale in plan.static_scales:
                if scale.owned:
                    writer.add_static(scale.name, scales[scale.name])
    finally:
        drop_values(model)


@torch.no_grad()
def _merged_latents(model: nn.Module) -> dict[str, Tensor]:
    layers = ((path, module) for path, module in model.named_modules() if isinstance(module, QuantLoraLinear))
    return {path.removeprefix("base_model.model.") + ".weight": merged_latent(module) for path, module in layers}
