"""Static int8 activations and KV cache in training: learned scales, straight-through gradients.

A scale is one float32 parameter, its logarithm. Linears that read the same tensor, and layers that share
keys and values, share it. The forward is the runtime's (see `numerics.activation`); the backward passes
gradients through what is not clipped, and what clipping stops reaches the scale, as in LSQ (Esser et
al. 2020, arXiv:1902.08153). Quantized activations are computed again in the backward, not kept.

Attention: transformers hands every attention function the rotated keys and normed values, those of a donor layer to
the layers that share them. So this is where they are quantized: with the donor's scale each time, to the same codes.

The parameter appears once calibration has found its first value (`calibrate`); until then, and where it
is switched off, activations pass as they are.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from intaglio.errors import InputError
from intaglio.numerics.activation import (
    CODE_MAX,
    CODE_MIN,
    LARGEST_LOG_SCALE,
    SMALLEST_LOG_SCALE,
    fake_quantize,
    position,
    round_scale,
)
from intaglio.plan.plan import Plan

ATTENTION = "intaglio_static_kv"  # as transformers' registry of attention functions knows it


class StaticScales(nn.Module):
    """The scales that belong to one module, by kind: "input" and "output", or "k_cache" and "v_cache".

    Parameters are called KIND_scale_latent; `fixed` holds scales that are not learned, as they are
    stored. on: whether any are used. observer: called with kind and
    keys or values [B, T, ...] during calibration.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on = True
        self.observer: Callable[[str, Tensor], None] | None = None
        self.latents: dict[str, nn.Parameter] = {}
        self.fixed: dict[str, Tensor] = {}

    def put(self, kind: str, latent: nn.Parameter, owned: bool) -> None:
        """Use this parameter for `kind`; only its owner registers it, so that state dicts name it once."""
        self.latents[kind] = latent
        if owned:
            self.register_parameter(f"{kind}_scale_latent", latent)

    def latent(self, kind: str) -> nn.Parameter | None:
        """The parameter of a kind, if it is calibrated and in use."""
        return self.latents.get(kind) if self.on else None


def scale_of(latent: Tensor) -> Tensor:
    """The stored scale of a latent: float32, no dimensions."""
    return round_scale(latent.detach().clamp(SMALLEST_LOG_SCALE, LARGEST_LOG_SCALE).exp())


def quantize_static(x: Tensor, latent: Tensor | None) -> Tensor:
    """x as the runtime rounds it, without gradients; x itself where there is no scale."""
    return x if latent is None else fake_quantize(x, scale_of(latent))


def static_gradients(grad: Tensor, x: Tensor, latent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of the latent for a gradient of `quantize_static(x, latent)`."""
    if latent is None:
        return grad, None
    scale = scale_of(latent)
    inside, change = _slopes(x.detach(), scale)
    grad_latent = (change.float() * grad.float()).sum() * scale
    return grad * inside, grad_latent.to(latent.dtype)


def _slopes(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Whether x is not clipped, and how fast the rounded x changes with the scale."""
    where = position(x, scale)
    inside = (where >= CODE_MIN - 0.5) & (where <= CODE_MAX + 0.5)
    return inside, where.round().clamp_(CODE_MIN, CODE_MAX).sub_(where * inside)


class StaticQuantize(torch.autograd.Function):
    """`quantize_static` with gradients; keeps x, which whoever made it keeps as a rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, latent: Tensor) -> Tensor:
        ctx.save_for_backward(x, latent)
        return quantize_static(x, latent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, latent = ctx.saved_tensors
        return static_gradients(grad, x, latent)


class StaticLinearFunction(torch.autograd.Function):
    """y = x W^T, with x and y on their static scales.

    Saves x and W, as a plain linear does; the quantized x and y are computed again in the backward. Scales are None
    where they are not learned or off.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, input_z: Tensor | None, output_z: Tensor | None
    ) -> Tensor:
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, None if output_z is None else bias, input_z, output_z)
        return quantize_static(F.linear(quantize_static(x, input_z), weight, bias), output_z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, input_z, output_z = ctx.saved_tensors
        needs = ctx.needs_input_grad
        quantized_x = quantize_static(x, input_z)
        grad_output_z = grad_input_z = grad_x = grad_weight = None
        if output_z is not None:
            grad, grad_output_z = static_gradients(grad, F.linear(quantized_x, weight, bias), output_z)
        if needs[0] or needs[3]:
            grad_x, grad_input_z = static_gradients(grad @ weight, x, input_z)
        flat = grad.flatten(0, -2)
        if needs[1]:
            grad_weight = flat.T @ quantized_x.flatten(0, -2)
        return grad_x, grad_weight, flat.sum(0) if ctx.has_bias else None, grad_input_z, grad_output_z


class StaticLinear:
    """Mixin for a linear whose input and output are quantized by static scales."""

    def forward(self, x: Tensor) -> Tensor:
        scales = self._modules["static"]  # type: ignore[attr-defined]
        weight, bias = self.weight, self.bias  # type: ignore[attr-defined]
        learned = scales.on and not scales.fixed and scales.latents
        if learned and not torch.compiler.is_compiling():
            given = (x, weight, bias, scales.latent("input"), scales.latent("output"))
            output: Tensor = StaticLinearFunction.apply(*given)  # type: ignore[no-untyped-call]
            return output
        return static(self, "output", F.linear(static(self, "input", x), weight, bias))


@functools.cache
def _mixed(mixin: Any, base: Any) -> Any:
    return type(f"{mixin.__name__}[{base.__name__}]", (mixin, base), {})


def swap_class(module: Any, mixin: Any) -> None:
    """Give `module` a subclass of its own class that behaves as `mixin`.

    One subclass serves all modules of a class: torch.compile would compile each type anew.
    """
    module.__class__ = _mixed(mixin, type(module))  # type: ignore[arg-type]


def attach_static(model: Any, plan: Plan) -> None:
    """Give every module of the plan's static scales its place for them; no scale is known yet."""
    modules = modules_by_name(model)
    for scale in plan.static_scales:
        module = modules[scale.module]
        if not isinstance(getattr(module, "static", None), StaticScales):
            module.static = StaticScales()
        if scale.kind == "input" and not isinstance(module, StaticLinear):
            swap_class(module, StaticLinear)
    if plan.recipe.kv_cache is not None:
        use_static_attention(model)


def static(module: Any, kind: str, x: Tensor) -> Tensor:
    """x as this module quantizes it, with gradients where the scale is learned."""
    scales = module._modules.get("static")
    if scales is None or not scales.on:
        return x
    if kind in scales.latents:
        quantized: Tensor = StaticQuantize.apply(x, scales.latents[kind])  # type: ignore[no-untyped-call]
        return quantized
    return fake_quantize(x, scales.fixed[kind]) if kind in scales.fixed else x


def bare_path(path: str) -> str:
    """A module's name in the bare model: wrappers of PEFT, torch.compile, checkpointing and DDP are looked through."""
    parts = [part for part in path.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module", "base_layer")]
    return re.sub(r"^(module\.|base_model\.model\.)+", "", ".".join(parts))


def modules_by_name(model: nn.Module) -> dict[str, Any]:
    """Modules by their names in the bare model; of an adapted linear, the linear itself."""
    return {bare_path(path): module for path, module in model.named_modules()}


def put_scales(model: Any, plan: Plan, values: dict[str, float]) -> None:
    """Make learned parameters of these first values, by the names of the scales that own them; 0 stays off."""
    modules, device = modules_by_name(model), next(model.parameters()).device
    latents = {
        name: nn.Parameter(torch.tensor(math.log(value), dtype=torch.float32, device=device))
        for name, value in values.items()
        if value
    }
    for scale in plan.static_scales:
        if scale.owner in latents:
            modules[scale.module].static.put(scale.kind, latents[scale.owner], scale.owned)


def fix_scales(model: Any, plan: Plan, values: dict[str, float]) -> None:
    """Compute with these values as they are, by the names of all static scales; 0 is off."""
    modules, device = modules_by_name(model), next(model.parameters()).device
    for scale in plan.static_scales:
        if values[scale.name]:
            modules[scale.module].static.fixed[scale.kind] = torch.tensor(values[scale.name], device=device)


def read_scales(model: Any, plan: Plan) -> dict[str, float]:
    """The value of every static scale as the forward uses it, by name; 0 where there is none."""
    modules = modules_by_name(model)
    values = {}
    for scale in plan.static_scales:
        static = getattr(modules[scale.module], "static", None)
        latent = None if static is None else static.latents.get(scale.kind)
        values[scale.name] = 0.0 if latent is None else float(scale_of(latent))
    return values


def switch_static(model: nn.Module, *, activations: bool, kv_cache: bool) -> None:
    """Turn quantization of activations, and of keys and values, on or off."""
    for module in model.modules():
        if isinstance(module, StaticScales):
            kinds = module.latents.keys() | module.fixed.keys()
            module.on = kv_cache if any("cache" in kind for kind in kinds) else activations


def static_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    attend: Callable[..., Any] = sdpa_attention_forward,
    **kwargs: Any,
) -> Any:
    """Attention by `attend`; key and value [B, heads, T, width] are quantized by the module's scales."""
    scales = getattr(module, "static", None)
    if scales is not None and scales.observer is not None:
        scales.observer("k_cache", key.transpose(1, 2))
        scales.observer("v_cache", value.transpose(1, 2))
    key, value = static(module, "k_cache", key), static(module, "v_cache", value)
    return attend(module, query, key, value, *args, **kwargs)


def check_attention(model: Any, plan: Plan) -> None:
    """Raise InputError for a model that attends without the soft cap of its config.

    transformers before 5.23 lets Gemma 2 attend by torch's fused kernels, which have no cap, and says nothing.
    """
    if plan.model.family.eager and model.config._attn_implementation == "sdpa":
        raise InputError(
            "the model attends by 'sdpa', expected 'eager': torch's kernels leave out the soft cap of attention "
            "scores: call model.set_attn_implementation('eager') first"
        )


def use_static_attention(model: Any) -> None:
    """Let all layers of a transformers model attend through `static_attention`.

    Raises InputError for a model with another attention than sdpa: its numbers would change.
    """
    kind = model.config._attn_implementation
    if kind == ATTENTION:
        return
    if kind != "sdpa":
        raise InputError(
            f"[kv_cache]: the model attends by {kind!r}, expected 'sdpa': load it with attn_implementation='sdpa'"
        )
    AttentionInterface.register(ATTENTION, static_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
