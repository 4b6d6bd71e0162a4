"""A better start than rounding to nearest: the student's codes by GPTQ, from the training text itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.errors import InputError
from intaglio.numerics.fit import fit_mse
from intaglio.numerics.gptq import corrected_weight, gptq_latents
from intaglio.train.fakequant import WeightQuantizer
from intaglio.train.modules import FrozenEmbedding, QuantEmbedding, QuantExperts, QuantLinear

QUANTIZED: tuple[Any, ...] = (QuantLinear, QuantEmbedding, QuantExperts, FrozenEmbedding)


@torch.no_grad()
def start_from_gptq(student: nn.Module, original: nn.Module, input_ids: Tensor, positions: Tensor) -> None:
    """Move the latents of every linear with learned scales to codes that GPTQ chooses.

    student: a prepared copy of `original`. One forward of it over input_ids, int64 [B, T], twice side by side:
    in the first half of the batch the original's modules answer in place of the quantized ones. So each
    linear sees what it would be given without quantization and what it is given, moves its latents to
    make up for the difference and for its own rounding, and goes on with them. Scales of blocks stay as fitted; those
    of channels are fitted again, with each column weighed by its mean square. Raises InputError if inputs
    are not finite, or if no linear has learned scales.
    """
    modules = dict(student.named_modules())
    linears = {n: m for n, m in modules.items() if isinstance(m, QuantLinear) and m.quantizer.scale_latent is not None}
    if not linears:
        raise InputError("schedule.gptq_tokens: GPTQ chooses codes under learned scales, and this recipe has none")
    done: set[int] = set()
    hooks = [linear.register_forward_pre_hook(_mover(name, done)) for name, linear in linears.items()]
    for name, module in modules.items():
        if isinstance(module, QUANTIZED):
            hooks.append(module.register_forward_hook(_first_half_by(original.get_submodule(name))))
    try:
        student.model(  # type: ignore[operator]
            input_ids=input_ids.repeat(2, 1), position_ids=positions.repeat(2, 1), use_cache=False
        )
    finally:
        for hook in hooks:
            hook.remove()


def _first_half_by(original: nn.Module) -> Callable[..., Tensor]:
    def answer(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        floats = original(*(x.chunk(2)[0] for x in inputs))
        return torch.cat((floats.to(output.dtype), output.chunk(2)[1]))

    return answer


def _mover(name: str, done: set[int]) -> Callable[[Any, tuple[Tensor, ...]], None]:
    """name: of the module, for messages. done: latents that were moved, by identity."""

    def move(module: QuantLinear, inputs: tuple[Tensor, ...]) -> None:
        latent: Tensor = module._parameters["weight"]  # type: ignore[assignment]
        if id(latent) in done:
            return
        done.add(id(latent))
        floats, x = (half.flatten(0, -2).float() for half in inputs[0].chunk(2))
        with torch.autocast(x.device.type, enabled=False):  # which would round the products to eight bits
            moments, cross = x.T @ x, x.T @ floats
        if not bool(torch.isfinite(moments).all() and torch.isfinite(cross).all()):
            raise InputError(f"{name}: its inputs are NaN or Inf on the text: check the checkpoint")
        quantizer: WeightQuantizer = module.quantizer
        wanted = corrected_weight(latent.float(), cross, moments, len(x))
        if quantizer.grid.positive:  # few steps of many columns: which columns matter decides them
            quantizer.set_steps(fit_mse(wanted, quantizer.grid, moments.diagonal() / len(x)).step)
        _, step = quantizer.compute(latent)
        step = step.view(*latent.shape[:-1], -1)
        latent.copy_(gptq_latents(latent.float(), wanted, step, moments, quantizer.grid))

    return move
