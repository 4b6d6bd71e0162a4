"""A better start than rounding to nearest: the student's codes by GPTQ, from the training text itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
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
from intaglio.train.latents import Latents
from intaglio.train.sharding import final_hidden, settle, sum_over_processes, world_size

NOTHING_LEARNED = "schedule.gptq_tokens: GPTQ chooses codes under learned scales, and this recipe has none"


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
    moved = gptq_linears(latents)
    if not moved:
        raise InputError(NOTHING_LEARNED)
    hooks = first_half_by(latents, original) + _gathered_beside(latents.model, original)
    try:
        _move_in_one(moved, lambda: final_hidden(latents.model, input_ids.repeat(2, 1), positions.repeat(2, 1)))
    finally:
        for hook in hooks:
            hook.remove()
        settle(latents.model)
        settle(original)


def _move_in_one(moved: dict[nn.Module, BlockLatent], forward: Callable[[], Any]) -> None:
    """Move each linear in one forward, as it is reached."""
    hooks = [module.register_forward_pre_hook(_mover(latent)) for module, latent in moved.items()]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()


def gptq_linears(latents: Latents) -> dict[nn.Module, BlockLatent]:
    """The linears whose codes GPTQ chooses, with their latents: those with learned scales."""
    modules = {latents.owners[name][0]: latent for name, latent in latents.blocks.items()}
    return {m: found for m, found in modules.items() if found.scale_latent is not None and isinstance(m, nn.Linear)}


def first_half_by(latents: Latents, original: nn.Module) -> list[Any]:
    """Hooks by which the original's modules answer for the quantized ones, in the first half of each batch."""
    paths = {module: path for path, module in latents.model.named_modules()}
    quantized = {latents.owners[t.name][0] for t in latents.plan if isinstance(t.grid, BlockGrid)}
    return [m.register_forward_hook(_first_half_by(original.get_submodule(paths[m]))) for m in quantized]


@torch.no_grad()
def move_in_passes(latents: Latents, forwards: list[Callable[[], Any]]) -> None:
    """Move linears as `start_from_gptq` does, on a text that passes in several batches.

    forwards: of each batch, twice side by side, under the hooks of `first_half_by`; they run again and again. Linears
    that read one tensor are moved together, once it was seen of every batch; then the next ones are looked for.
    """
    waiting = gptq_linears(latents)
    if len(forwards) == 1:  # all is seen at once, as in `start_from_gptq`
        _move_in_one(waiting, forwards[0])
        return
    while waiting:
        group = _Readers()
        hooks = [module.register_forward_pre_hook(group.see) for module in waiting]
        try:
            for forward in forwards:
                group.read = None
                with suppress(_Seen):
                    forward()
        finally:
            for hook in hooks:
                hook.remove()
        if not group.modules:  # the text reaches none of the rest
            return
        for module in group.modules:
            _move(waiting.pop(module), group.moments, group.cross, group.tokens)


class _Seen(Exception):
    """The forward need not go on."""


class _Readers:
    """The next linears of a forward that read one tensor, and the second moments of that: float32 [C, C]."""

    def __init__(self) -> None:
        self.modules: dict[nn.Module, None] = {}
        self.read: Tensor | None = None
        self.tokens = 0
        self.moments: Any = 0.0
        self.cross: Any = 0.0

    def see(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.read is None:
            moments, cross, tokens = _moments_of(inputs[0])
            self.moments, self.cross, self.tokens = self.moments + moments, self.cross + cross, self.tokens + tokens
            self.read = inputs[0]
        if inputs[0] is not self.read:
            raise _Seen
        self.modules[module] = None


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
        moments, cross, tokens = _moments_of(inputs[0])
        _move(latent, sum_over_processes(moments), sum_over_processes(cross), tokens * world_size())
        if isinstance(latent.weight, DTensor):  # this forward multiplies by the gathered weight
            module._parameters["weight"].data.copy_(latent.weight.full_tensor())  # type: ignore[union-attr]

    return move


def _moments_of(inputs: Tensor) -> tuple[Tensor, Tensor, int]:
    """X^T X and X^T Y, float32 [C, C], and the number of tokens, of a linear's inputs: the original's Y, then X."""
    floats, x = (half.flatten(0, -2).float() for half in inputs.chunk(2))
    with torch.autocast(x.device.type, enabled=False):  # which would round the products to eight bits
        return x.T @ x, x.T @ floats, len(x)


def _move(latent: BlockLatent, moments: Tensor, cross: Tensor, tokens: int) -> None:
    """Move a linear's latents by the second moments of its inputs, and decode them."""
    if not bool(torch.isfinite(moments).all() and torch.isfinite(cross).all()):
        raise InputError(f"{latent.name}: its inputs are NaN or Inf on the text: check the checkpoint")
    master, grid = latent.latent, latent.grid
    wanted = corrected_weight(master, cross, moments, tokens)
    if grid.positive:  # few steps of many columns: which columns matter decides them
        latent.set_steps(fit_mse(wanted, grid, moments.diagonal() / tokens).step)
    _, step = latent.compute()
    master.copy_(gptq_latents(master, wanted, step, moments, grid))
    latent.decode()
