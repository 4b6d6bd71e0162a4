"""Parts of a model as modules by themselves, under the names that they have in the whole.

A part is copied from a model without memory and filled with values; what works on a model's latents works on it too.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from intaglio.plan.plan import Plan
from intaglio.train.latents import Latents


def merged(parts: list[Latents], plan: Plan) -> Latents:
    """The latents of several modules of a model as one."""
    if len(parts) == 1:
        return parts[0]
    paths = {f"model.layers.{number}": layer for p in parts for number, layer in p.model.model.layers.named_children()}
    latents = Latents(rooted(paths), plan)
    for part in parts:
        latents.trained |= part.trained
        latents.still |= part.still
    return latents


def rooted(modules: dict[str, nn.Module]) -> nn.Module:
    """A module that has these under their paths, as the whole model has."""
    root = nn.Module()
    for path, module in modules.items():
        *parents, name = path.split(".")
        at = root
        for parent in parents:
            if parent not in at._modules:
                at.add_module(parent, nn.Module())
            at = at.get_submodule(parent)
        at.add_module(name, module)
    return root


def filled(template: nn.Module, path: str, values: dict[str, Tensor], dtype: torch.dtype | None) -> nn.Module:
    """A copy of a module without memory, with values of its own; of floats in `dtype`, or in their own."""
    module = copy.deepcopy(template)
    state = {
        name: values[f"{path}.{name}"].to(dtype if value.is_floating_point() else None, copy=True)
        for name, value in module.state_dict().items()
    }
    module.load_state_dict(state, assign=True)
    return module
