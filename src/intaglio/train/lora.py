"""LoRA on the grid: what is quantized is W + BA, so adapters are merged into the latent before it is decoded.

The forward multiplies by the decoded weight alone, as what ships does. The gradient of that weight, pulled through the
grid, is then the gradient of W + BA, and A and B get theirs from it by the chain rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from intaglio.errors import InputError
from intaglio.plan.plan import Plan
from intaglio.train.latent import BlockLatent
from intaglio.train.sharding import own_slice, sum_over_processes
from intaglio.train.static import bare_path, swap_class

ALPHA_PER_RANK = 2  # so that the learning rate need not follow the rank


def add_lora(model: nn.Module, plan: Plan, rank: int) -> None:
    """Put PEFT's adapters of this rank around every linear whose grid is trained, in place, before it is prepared.

    The weights themselves stand still from here on; the scales that `prepare` adds do not. Raises InputError
    without PEFT, and for a plan that trains no linear.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError(
            "schedule.lora_rank needs PEFT, which is not installed: pip install 'intaglio[lora]'"
        ) from None
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    planned = [t.name.removesuffix(".weight") for t in plan if t.quantized_linear and t.rule.trainable]
    targets = [name for name in planned if name in names]
    if not targets:
        raise InputError(f"recipe {plan.recipe.name} trains no linear on a grid: nothing for adapters to adapt")
    config = LoraConfig(r=rank, lora_alpha=ALPHA_PER_RANK * rank, target_modules=targets, lora_dropout=0.0)
    inject_adapter_in_model(config, model)


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's layers around another."""
    from_peft = type(module).__module__.startswith("peft.tuners")
    return from_peft and hasattr(module, "base_layer")


def check_adapters(model: nn.Module) -> None:
    """Raise InputError for everything of PEFT's that is not W + BA around a linear: no quantized weight can hold it."""
    for path, module in model.named_modules():
        path = bare_path(path)
        if any(base.__name__ == "AuxiliaryTrainingWrapper" for base in type(module).__mro__):
            raise InputError(
                f"{path}: wrapped by PEFT's {type(module).__name__} (modules_to_save or trainable_token_indices): it "
                "trains a copy beside the planned weight: leave it out of the adapter's config"
            )
        if hasattr(module, "prompt_encoder"):
            raise InputError("prompt tuning adds inputs that no packed model holds: expected plain LoRA on linears")
        if isinstance(module, LoraOnGrid):
            raise InputError(f"{path}: its adapters are prepared already: go on with the latents that prepare() gave")
        if not is_adapter(module):
            continue
        layer, kind = type(module), type(module).__module__.split(".")[2]
        if kind != "lora" or hasattr(module, "parameter_name"):
            raise InputError(
                f"{path}: {layer.__name__} of PEFT's {kind} adapters cannot be trained on a grid: expected plain LoRA "
                "on linears; or merge the adapter first and train what it gives"
            )
        if layer.__name__ != "Linear" or not isinstance(module.base_layer, nn.Linear):
            raise InputError(_elsewhere(path))
        _check_plain(module, path)


def _elsewhere(path: str) -> str:
    return (
        f"{path}: cannot be adapted, since it is no linear whose grid the recipe trains: leave it out of "
        "target_modules, for example by exclude_modules"
    )


def _check_plain(lora: Any, path: str) -> None:
    extras = [name for name in lora.lora_variant if name in lora.active_adapters]
    extras += [name for name, has_bias in lora.lora_bias.items() if has_bias]
    extras += [name for name, dropout in lora.lora_dropout.items() if not isinstance(dropout, nn.Identity)]
    if extras:
        raise InputError(
            f"{path}: adapter {extras[0]!r} is more than W + BA: expected LoRA without dropout, bias or DoRA, "
            "since the adapter is merged into the weight before it is quantized"
        )


class Adapter:
    """The adapters of one LoRA layer, as its `BlockLatent` sees them."""

    def __init__(self, lora: Any, path: str, weight: nn.Parameter):
        self.lora, self.path, self.weight = lora, path, weight

    @property
    def state(self) -> tuple[str, ...]:
        """Names of the adapters that are to be added to the latent."""
        lora = self.lora
        if lora.disable_adapters:
            return ()
        return tuple(n for n in lora.active_adapters if n in lora.lora_A and n not in lora.merged_adapters)

    def delta(self) -> Tensor | float:
        """The sum of their BA [R, C], float32; 0 for none."""
        rows = own_slice(self.weight)
        return sum((self.lora.get_delta_weight(name).float()[rows] for name in self.state), 0.0)

    def pull(self, grad: Tensor | None) -> None:
        """Add to the gradients of A and B for one of W + BA, of this process's rows; None once codes are frozen."""
        if grad is None:
            return
        if isinstance(self.weight, DTensor):  # the rows of all processes together
            own, grad = grad, torch.zeros(self.weight.shape, device=grad.device)
            grad[own_slice(self.weight)] = own
            sum_over_processes(grad)
        for name in self.state:  # W + s BA: dA = s B^T dW, dB = s dW A^T
            a, b = self.lora.lora_A[name].weight, self.lora.lora_B[name].weight
            scaled = self.lora.scaling[name] * grad
            for factor, part in ((a, b.detach().float().T @ scaled), (b, scaled @ a.detach().float().T)):
                if factor.requires_grad:
                    part = part.to(factor.dtype)
                    factor.grad = part if factor.grad is None else factor.grad + part

    def decode_if_switched(self) -> None:
        """Decode anew if other adapters are active than at the last decode."""
        if self.state != self.lora.decoded_for:
            self.lora.refresh()

    def freeze(self) -> None:
        """Keep the adapters as they are: they are part of the codes that stand still."""
        for name in self.lora.lora_A:
            self.lora.lora_A[name].requires_grad_(False)
            self.lora.lora_B[name].requires_grad_(False)


class LoraOnGrid:
    """Mixin for PEFT's lora.Linear: the base layer's decoded weight has the adapters in it already."""

    latent: BlockLatent

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise InputError("adapter_names: one quantized weight cannot serve several adapters in a batch")
        _check_plain(self, self.latent.adapter.path)
        self.latent.adapter.decode_if_switched()
        output: Tensor = self.base_layer(x)  # type: ignore[attr-defined]
        return output

    def refresh(self) -> None:
        """Decode for the adapters that are active now."""
        self.decoded_for = self.latent.adapter.state
        self.latent.decode()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Move adapters into the latent, for good or until `unmerge`, as PEFT does with a plain weight."""
        for name in adapter_names or self.active_adapters:  # type: ignore[attr-defined]
            if name in self.lora_A and name not in self.merged_adapters:  # type: ignore[attr-defined]
                self.latent.latent.data += self.get_delta_weight(name).float()  # type: ignore[attr-defined]
                self.merged_adapters.append(name)  # type: ignore[attr-defined]
        self.refresh()

    def unmerge(self) -> None:
        """Take merged adapters out of the latent again."""
        while self.merged_adapters:  # type: ignore[attr-defined]
            self.latent.latent.data -= self.get_delta_weight(self.merged_adapters.pop()).float()  # type: ignore[attr-defined]
        self.refresh()


def adapt(lora: Any, latent: Any, path: str) -> None:
    """Let a LoRA layer train the latent of its base layer's weight. InputError if the recipe trains no such weight."""
    if not isinstance(latent, BlockLatent) or (latent.scale_latent is None and latent.mode != "fixed"):
        raise InputError(_elsewhere(bare_path(path)))
    latent.adapter = Adapter(lora, bare_path(path), latent.weight)
    lora.latent = latent
    swap_class(lora, LoraOnGrid)
    lora.refresh()
    latent.weight.requires_grad_(True)  # its gradient is what A and B learn from
    if not isinstance(latent.weight, DTensor):  # else the gradient comes whole, and the optimizer's step pulls it
        latent.weight.register_post_accumulate_grad_hook(lambda _: latent.pull())
