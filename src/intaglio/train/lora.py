"""LoRA in our own loop: PEFT's layers around every linear whose grid is trained."""

from __future__ import annotations

from torch import nn

from intaglio.errors import InputError
from intaglio.plan.plan import Plan

ALPHA_PER_RANK = 2  # so that the learning rate need not follow the rank


def add_lora(model: nn.Module, plan: Plan, rank: int) -> None:
    """Put adapters of this rank around the planned linears of a model, in place, before it is prepared.

    Its own weights stand still from here on; the scales that `prepare` adds do not. Raises InputError
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
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=ALPHA_PER_RANK * rank, target_modules=targets, lora_dropout=0.0)
    inject_adapter_in_model(config, model)
