"""The optimizer of a prepared model: any torch optimizer over its latents, with pull before the step and decode after.

For training loops of others, give `GridOptimizer` in the place of the torch optimizer that it wraps:

    latents = prepare(model, plan)
    Trainer(model=model, optimizers=(GridOptimizer(latents, torch.optim.AdamW, lr=1e-5), None), ...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from intaglio.errors import InputError
from intaglio.train.latents import Latents, check_inventory
from intaglio.train.lora import LoraOnGrid, is_adapter
from intaglio.train.static import bare_path

Groups = Iterable[dict[str, Any]]


class GridOptimizer(torch.optim.Optimizer):
    """Any torch optimizer, over the latents of a prepared model instead of its weights.

    A step moves the gradients of the model's weights to the latents, lets the wrapped optimizer step, and writes
    what the latents decode to into the weights. Gradients of several backwards are summed in the weights before.

    latents: as `prepare` returned them. optimizer_class: of the wrapped optimizer. groups: parameter groups of its
    own, of `latents.named_parameters()`; by default one for weights and one without weight decay for scales, whose
    latents are logarithms. scale_lr: rate of the scales in that default. clip: largest norm of the latents' gradient; 0
    for none. defaults: for the wrapped optimizer.
    """

    def __init__(
        self,
        latents: Latents,
        optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        groups: Groups | None = None,
        scale_lr: float = 3e-3,
        clip: float = 0.0,
        **defaults: Any,
    ):
        self.latents, self.clip = latents, clip
        self.inner = optimizer_class(groups if groups is not None else _groups(latents, scale_lr), **defaults)
        self.moments: torch.dtype = getattr(self.inner, "moments", torch.float32)  # of AdamW's, in checkpoints
        self.defaults, self._checked = self.inner.defaults, False
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    # Schedulers and trainers read and write these; they are the wrapped optimizer's own.
    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Pull, step, decode. closure: evaluates the loss again, as torch optimizers take it."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        if not self._checked:
            check_trainable(self.latents)
            self._checked = True
        self.latents.pull()  # first: its rules need codes and scales as the forward had them
        if self.clip:  # after the pull: the norm is that of the gradients that are stepped with
            self.latents.clip(self.clip)
        self.inner.step()
        self.inner.zero_grad()
        self.latents.decode()
        return loss

    def new_moment(self, parameter: torch.Tensor, key: str) -> torch.Tensor:
        """Zeros that a checkpoint's moment of this name, such as "exp_avg", is copied into."""
        return torch.zeros_like(parameter, dtype=self.moments)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of weights and latents."""
        self.inner.zero_grad(set_to_none)
        for latent in self.latents.trained.values():
            latent.weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, with the latents: a model's weights alone do not say what they are."""
        return self.inner.state_dict() | {"latents": {name: t.detach() for name, t in self.latents.state().items()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the wrapped optimizer and the latents, and decode them into the model's weights."""
        state = dict(state_dict)
        stored, own = state.pop("latents"), self.latents.state()
        if stored.keys() != own.keys():
            raise InputError(
                f"optimizer state: holds other latents than this model, for example "
                f"{min(stored.keys() ^ own.keys())}: resume with the recipe and in the phase that it was saved in"
            )
        for name, tensor in own.items():
            tensor.copy_(stored[name])
        self.inner.load_state_dict(state)
        self.latents.decode()


def check_trainable(latents: Latents) -> None:
    """Raise InputError for what was put around a model or into it after `prepare`: it would not be quantized."""
    for path, module in latents.model.named_modules():
        if is_adapter(module) and not isinstance(module, LoraOnGrid):
            raise InputError(f"{bare_path(path)}: adapted after prepare(): call get_peft_model() first, then prepare()")
    check_inventory(latents.model, latents.plan)
    for name, latent in latents.trained.items():
        if not latent.weight.requires_grad:
            raise InputError(
                f"{name}: does not require a gradient any more, so its latent cannot learn: was the model wrapped or "
                "frozen after prepare()? Adapters come first, prepare() after them"
            )


def _groups(latents: Latents, scale_lr: float) -> list[dict[str, Any]]:
    named = list(latents.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [parameter for name, parameter in named if not is_scale(name)]},
        {"params": [parameter for name, parameter in named if is_scale(name)], "lr": scale_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def is_scale(name: str) -> bool:
    """Whether a parameter of `Latents.named_parameters` is the logarithm of a scale."""
    return name.endswith("scale_latent")
