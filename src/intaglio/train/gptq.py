"""A better start than rounding to nearest: the student's codes by GPTQ, from the training text itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intaglio.errors import InputError
from intaglio.numerics.fit import fit_mse
from intaglio.numerics.gptq import gptq_latents
from intaglio.train.fakequant import WeightQuantizer
from intaglio.train.modules import QuantLinear


@torch.no_grad()
def start_from_gptq(model: nn.Module, input_ids: Tensor, positions: Tensor) -> None:
    """Move the latents of every linear with learned scales to codes that GPTQ chooses.

    One forward of the prepared `model` over input_ids, int64 [B, T]: each linear sees its inputs,
    moves its latents, and goes on with them, so that the layers behind make up for what the ones
    before lost. Scales of blocks stay as fitted; those of channels are fitted again, with each column weighed by
    its mean square. Raises InputError if inputs are not finite.
    """
    linears = [m for m in model.modules() if isinstance(m, QuantLinear) and m.quantizer.scale_latent is not None]
    names = {id(module): name for name, module in model.named_modules()}
    done: set[int] = set()

    def move(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        latent: Tensor = module._parameters["weight"]  # type: ignore[assignment]
        if id(latent) in done:
            return
        done.add(id(latent))
        x = inputs[0].flatten(0, -2).float()
        with torch.autocast(x.device.type, enabled=False):  # which would round the products to eight bits
            moments = x.T @ x
        if not bool(torch.isfinite(moments).all()):
            raise InputError(f"{names[id(module)]}: its inputs are NaN or Inf on the text: check the checkpoint")
        quantizer: WeightQuantizer = module.quantizer  # type: ignore[assignment]
        if quantizer.grid.positive:  # few steps of many columns: which columns matter decides them
            quantizer.set_steps(fit_mse(latent, quantizer.grid, moments.diagonal() / len(x)).step)
        _, step = quantizer.compute(latent)
        step = step.view(*latent.shape[:-1], -1)
        latent.copy_(gptq_latents(latent.float(), step, moments, quantizer.grid))

    hooks = [linear.register_forward_pre_hook(move) for linear in linears]
    try:
        model.model(input_ids=input_ids, position_ids=positions, use_cache=False)  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
