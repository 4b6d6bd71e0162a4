"""Attach a plan to a model: swap classes in place and add quantizers. Then anyone's trainer may run.

`pack.pack_model` reads codes and scales back out of the forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.errors import InputError, RecipeError, WeightError
from intaglio.numerics.fit import check_finite
from intaglio.numerics.grid import BlockGrid, FloatGrid, Quantized
from intaglio.packed.model import PackedModel
from intaglio.plan.memory import is_frozen_table, learns_scales
from intaglio.plan.plan import Plan, PlannedTensor
from intaglio.train.fakequant import (
    WeightQuantizer,
)
from intaglio.train.kv import use_static_attention
from intaglio.train.modules import (
    FrozenCodes,
    FrozenEmbedding,
    QuantEmbedding,
    QuantExperts,
    QuantLinear,
    QuantLoraLinear,
    RoundedEmbedding,
    RoundedRouter,
    RoundedWeight,
    swap_class,
)
from intaglio.train.quantize import FITS, fit_rows
from intaglio.train.start import begin_with, check_begins
from intaglio.train.static import StaticLinear, StaticScales, bare_path, modules_by_name, put_scales

Fit = Callable[[Tensor, BlockGrid], Quantized]
STORED_BUFFERS = ("layer_scalar", "token_ordering")  # what a checkpoint holds beside parameters


def prepare(
    model: nn.Module,
    plan: Plan,
    *,
    fit: Fit | None = None,
    start: PackedModel | None = None,
    compiled: bool = False,
    compact: bool = False,
) -> nn.Module:
    """Put every planned tensor of `model` on its grid, in place, and return the model.

    model: the transformers text model of the plan's config, or a PEFT LoRA model around it, with
        plain LoRA on linears that the recipe trains. Adapters come first, `prepare` after them.
        Latents should be float32; gradients flow to latents, scales and float leftovers.
    fit: first scales; the recipe's own fit by default.
    start: a packed model whose codes, scales and static scales are where training begins, bit for bit; the
        model's own weights are then overwritten.
    compiled: run the quantizer through torch.compile.
    compact: keep the table of per-layer embeddings, if the recipe does not train it, as codes. The
        state dict then lacks it, and the floats are left as they are: another model may share them.

    Tensors that the recipe does not train are decoded once and need no further work. Static scales of
    activations and KV cache stay off until `calibrate` finds them. Raises
    RecipeError if the model lacks a planned tensor, WeightError for NaN or Inf, and InputError for a
    model that is prepared already or has adapters that no quantized weight can hold.
    """
    if any(isinstance(m, QuantLinear | QuantEmbedding | QuantExperts | RoundedWeight) for m in model.modules()):
        raise InputError("this model is prepared already: prepare a new copy of the original")
    fit = fit or FITS[plan.recipe.fit]
    owners = owners_of(model)
    for tensor in plan:
        if tensor.name not in owners:
            raise RecipeError(f"{tensor.name}: planned, but not in this model: was the plan made for another one?")
        module, attribute = owners[tensor.name]
        shape = tuple(getattr(module, attribute).shape)
        if shape != tensor.spec.shape:
            planned = list(tensor.spec.shape)
            raise RecipeError(f"{tensor.name}: planned as {planned}, but {list(shape)} in this model: plan this model")
        first = fit if start is None else begin_with(start, tensor, getattr(module, attribute))
        check_finite(getattr(module, attribute), tensor.name)
        learned = plan.recipe.schedule.learn_scales and learns_scales(tensor)
        try:
            _attach(module, attribute, tensor, first, learned, compiled, compact)
            if start is not None:
                check_begins(start, tensor, module, attribute)
        except WeightError as error:
            raise WeightError(f"{tensor.name}: {error}") from error
    _share_with_tied_head(model)
    attach_static(model, plan)
    if start is not None:
        stored = start.read_static()
        put_scales(model, plan, {scale.name: stored[scale.name] for scale in plan.static_scales if scale.owned})
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


def owners_of(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Tensor name of the bare model -> the module that holds it. PEFT's wrappers are looked through."""
    owners: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        path = bare_path(path)
        names = [n for n, p in module._parameters.items() if p is not None]
        names += [n for n in module._buffers if n in STORED_BUFFERS]
        names += ["weight"] if isinstance(module, FrozenEmbedding) else []
        for name in names:
            owners.setdefault(f"{path}.{name}" if path else name, (module, name))
    return owners


def _attach(
    module: nn.Module, attribute: str, tensor: PlannedTensor, fit: Fit, learned: bool, compiled: bool, compact: bool
) -> None:
    stored = module._parameters.get(attribute)
    latent: Tensor = stored if stored is not None else getattr(module, attribute)
    grid, trainable = tensor.grid, tensor.rule.trainable and isinstance(latent, nn.Parameter)
    if isinstance(grid, FloatGrid):
        if trainable:
            if tensor.spec.role == "expert":
                _experts(module).float_grids[attribute] = grid
                return
            module.float_grid = grid  # type: ignore[assignment]
            vector = attribute != "weight"  # of a router
            mixin = RoundedEmbedding if isinstance(module, nn.Embedding) else RoundedRouter if vector else RoundedWeight
            if not isinstance(module, mixin):
                swap_class(module, mixin)
        else:
            latent.data.copy_(grid.round(latent.data))
            latent.requires_grad_(False)
        return
    fitted = fit_rows(fit, latent.detach(), grid)
    if compact and is_frozen_table(tensor):
        del module._parameters["weight"]
        module.frozen = FrozenCodes(fitted, latent.dtype)
        swap_class(module, FrozenEmbedding)
        return
    quantizer = WeightQuantizer(grid, latent, fitted, learned=learned and trainable, compiled=compiled)
    if tensor.spec.role == "expert":
        _experts(module).quantizers[attribute] = quantizer
    else:
        module.quantizer = quantizer
    if not trainable:
        latent.data.copy_(fitted.decode())
        latent.requires_grad_(False)
    elif isinstance(module, nn.Embedding):
        swap_class(module, QuantEmbedding)
    elif tensor.spec.role != "expert":
        module.__class__ = QuantLinear


def _experts(module: nn.Module) -> Any:
    """The module of a layer's experts, ready for their quantizers."""
    if not isinstance(module, QuantExperts):
        module.quantizers, module.float_grids = nn.ModuleDict(), {}  # type: ignore[assignment]
        swap_class(module, QuantExperts)
    return module


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
