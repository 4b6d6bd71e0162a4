"""AdamW in less memory: moments kept in bfloat16, or in 8 bits by torchao.

`schedule.moments` chooses; see `make_optimizer`. Both compute in float32. On a GPU bfloat16 moments are part of the
fused step (see `fused`), which then leaves only adapters and static scales to the optimizer here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from intaglio.errors import InputError
from intaglio.train.grid_optimizer import GridOptimizer, check_trainable
from intaglio.train.latents import Latents
from intaglio.train.sharding import sum_over_processes

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW's state


class Bfloat16AdamW(torch.optim.AdamW):
    """torch's AdamW with moments in bfloat16 between steps; those of one parameter at a time are widened to float32."""

    moments = torch.bfloat16

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def _step_one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {key: torch.zeros_like(parameter, dtype=torch.bfloat16) for key in MOMENTS}
        mean, square = (state[key].float() for key in MOMENTS)
        beta1, beta2 = group["betas"]
        rates = {key: group[key] for key in ("lr", "weight_decay", "eps", "amsgrad", "maximize", "fused")}
        assert parameter.grad is not None
        adamw([parameter], [parameter.grad], [mean], [square], [], [state["step"]], beta1=beta1, beta2=beta2, **rates)
        for key, value in zip(MOMENTS, (mean, square), strict=True):
            state[key].copy_(value)


class GridAdamW8bit(GridOptimizer):
    """`GridOptimizer` over torchao's AdamW8bit, which steps one weight after the other.

    So float32 gradients of one latent exist at a time. If gradients are clipped, each is computed twice, once for the
    norm. On a CPU torchao's kernel runs uncompiled. Adapters accumulate in their pull, so models that have them take
    `GridOptimizer`'s own step. Raises InputError without torchao.
    """

    def __init__(self, latents: Latents, **kwargs: Any):
        super().__init__(latents, _adamw_8bit(), **kwargs)

    def new_moment(self, parameter: Tensor, key: str) -> Tensor:
        """A moment of zeros as torchao keeps it: in 8 bits where the parameter is made of whole blocks."""
        moment: Tensor = self.inner._new_buffer(parameter, key == "exp_avg")  # type: ignore[attr-defined]
        return moment

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Pull, clip, step and decode; as `GridOptimizer.step`."""
        on_cpu = all(parameter.device.type == "cpu" for _, parameter in self.latents.named_parameters())
        with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
            if any(latent.adapter is not None for latent in self.latents.blocks.values()):
                return super().step(closure)
            loss = None if closure is None else torch.enable_grad()(closure)()
            self._step_one_by_one()
        return loss

    def _step_one_by_one(self) -> None:
        if not self._checked:
            check_trainable(self.latents)
            self._checked = True
        self.latents.average_whole()
        self.latents.average_rest()
        factor = self._clip_factor() if self.clip else None
        self._step_scaled(factor)  # static scales; no latent has a gradient yet
        for latent in self.latents.trained.values():
            latent.pull()
            self._step_scaled(factor)
            latent.decode()

    def _step_scaled(self, factor: Tensor | None) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if factor is not None and grads:
            torch._foreach_mul_(grads, factor)
        self.inner.step()
        self.inner.zero_grad()

    def _clip_factor(self) -> Tensor:
        """Factor of all gradients, float32 scalar; the weights keep theirs."""
        rest = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        device = next(iter(self.latents.trained.values())).latent.device
        sharded, whole = torch.zeros((), device=device), _squared(rest, device)
        for latent in self.latents.trained.values():
            kept = latent.weight.grad
            if kept is None:
                continue
            latent.weight.grad = kept.clone()  # a pull may overwrite it
            latent.pull()
            parameters = [parameter for _, parameter in latent.named_parameters()]
            squared = _squared([p.grad for p in parameters if p.grad is not None], device)
            for parameter in parameters:
                parameter.grad = None
            latent.weight.grad = kept
            if isinstance(latent.weight, DTensor):
                sharded += squared
            else:
                whole += squared
        total = (sum_over_processes(sharded) + whole).sqrt()
        return (self.clip / (total + 1e-6)).clamp(max=1.0)


def _squared(grads: list[Tensor], device: torch.device) -> Tensor:
    """Squared norm of all these, float32 scalar."""
    return sum((grad.float().square().sum() for grad in grads), torch.zeros((), device=device))


def _adamw_8bit() -> Callable[..., torch.optim.Optimizer]:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            f"schedule.moments = 'int8' needs torchao ({error}): pip install 'intaglio[lean]', or choose bfloat16"
        ) from error
    optimizer: Callable[..., torch.optim.Optimizer] = AdamW8bit
    return optimizer


def plain(tensor: Tensor) -> Tensor:
    """Values of torchao's 8-bit moments in float32; any other tensor as it is."""
    return tensor.dequantize() if hasattr(tensor, "qmap") else tensor
