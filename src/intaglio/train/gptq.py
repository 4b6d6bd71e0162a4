"""A better start than rounding to nearest: the student's codes by GPTQ, from the training text itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from intaglio.errors import InputError
from intaglio.numerics.fit import fit_mse
from intaglio.numerics.gptq import corrected_weight, gptq_latents
from intaglio.numerics.grid import BlockGrid
from intaglio.train.latent import BlockLatent
from intaglio.train.latents import Latents, owners_of
from intaglio.train.sharding import final_hidden, settle, sum_over_processes, world_size


@torch.no_grad()
def start_from_gptq(latents: Latents, original: nn.Module, input_ids: Tensor, positions: Tensor) -> None:
    """Move the latents of every linear with learned scales to codes that GPTQ chooses.

    latents: of a prepared copy of `original`. One forward of it over input_ids, int64 [B, T], twice side by side:
    in the first half of the batch the original's modules answer in place of the quantized ones. So each
    linear sees what it would be given without quantization and what it is given, moves its latents to
    make up for the difference and for its own rounding, and goes on with them. Scales of blocks stay as fitted; those
    of channels are fitted again, with each column weighed by its mean square. Raises InputError if inputs
    are not finite, or if no linear has learned scales.
    """
    owners = owners_of(latents.model)
    moved = {
        owners[name][0]: latent
        for name, latent in latents.blocks.items()
        if latent.scale_latent is not None and isinstance(owners[name][0], nn.Linear)
    }
    if not moved:
        raise InputError("schedule.gptq_tokens: GPTQ chooses codes under learned scales, and this recipe has none")
    hooks: list[Any] = [module.register_forward_pre_hook(_mover(latent)) for module, latent in moved.items()]
    paths = {module: path for path, module in latents.model.named_modules()}
    for module in {owners[t.name][0] for t in latents.plan if isinstance(t.grid, BlockGrid)}:
        hooks.append(module.register_forward_hook(_first_half_by(original.get_submodule(paths[module]))))
    hooks += _gathered_beside(latents.model, original)
    try:
        final_hidden(latents.model, input_ids.repeat(2, 1), positions.repeat(2, 1))
    finally:
        for hook in hooks:
            hook.remove()
        settle(latents.model)
        settle(original)


def _gathered_beside(student: Any, original: Any) -> list[Any]:
    """Hooks that gather a sharded original's weights for as long as the student's same layer runs."""
    if not isinstance(original, FSDPModule):
        return []
    layers: Any = original.model.layers  # type: ignore[attr-defined]
    original.unshard()
    hooks = []
    for layer, beside in zip(student.model.layers, layers, strict=True):
        hooks.append(layer.register_forward_pre_hook(lambda *_, beside=beside: beside.unshard() and None))
        hooks.append(layer.register_forward_hook(lambda *_, beside=beside: beside.reshard()))
    return hooks


def _first_half_by(original: nn.Module) -> Callable[..., Tensor]:
    dtype = next(original.parameters()).dtype

    def answer(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        halves = (x.chunk(2)[0] for x in inputs)
        floats = original(*(x.to(dtype) if x.is_floating_point() else x for x in halves))
        return torch.cat((floats.to(output.dtype), output.chunk(2)[1]))

    return answer


def _mover(latent: BlockLatent) -> Callable[[Any, tuple[Tensor, ...]], None]:
    def move(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        floats, x = (half.flatten(0, -2).float() for half in inputs[0].chunk(2))
        with torch.autocast(x.device.type, enabled=False):  # which would round the products to eight bits
            moments, cross = sum_over_processes(x.T @ x), sum_over_processes(x.T @ floats)
        if not bool(torch.isfinite(moments).all() and torch.isfinite(cross).all()):
            raise InputError(f"{latent.name}: its inputs are NaN or Inf on the text: check the checkpoint")
        master, grid = latent.latent, latent.grid
        tokens = len(x) * world_size()
        wanted = corrected_weight(master, cross, moments, tokens)
        if grid.positive:  # few steps of many columns: which columns matter decides them
            latent.set_steps(fit_mse(wanted, grid, moments.diagonal() / tokens).step)
        _, step = latent.compute()
        master.copy_(gptq_latents(master, wanted, step, moments, grid))
        latent.decode()
        if isinstance(latent.weight, DTensor):  # this forward multiplies by the gathered weight
            module._parameters["weight"].data.copy_(latent.weight.full_tensor())  # type: ignore[union-attr]

    return move
