"""All latents of a model: `prepare` makes them, an optimizer moves them, and the model holds what they decode to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from intaglio.errors import InputError, RecipeError, WeightError
from intaglio.numerics.fit import check_finite
from intaglio.numerics.grid import BlockGrid, FloatGrid, Quantized
from intaglio.packed.model import PackedModel
from intaglio.plan.memory import learns_scales
from intaglio.plan.plan import Plan, PlannedTensor
from intaglio.train.latent import BlockLatent, FloatLatent, check_unchanged
from intaglio.train.lora import adapt, check_adapters, is_adapter
from intaglio.train.quantize import FITS, fit_rows
from intaglio.train.sharding import (
    average_over_processes,
    local,
    own_rows,
    own_slice,
    rows_of,
    sum_over_processes,
    world_size,
)
from intaglio.train.start import check_begins
from intaglio.train.static import attach_static, bare_path, check_attention, put_scales

Fit = Callable[[Tensor, BlockGrid], Quantized]
ROWS_AT_ONCE = 1 << 14  # of a table that is compared with its codes
STORED_BUFFERS = ("layer_scalar", "token_ordering")  # buffers that a checkpoint holds beside parameters


class Latents:
    """The masters behind a model's weights while it is trained to a plan's grids; `prepare` makes one.

    model: the plain model; its weights hold decoded values. owners: the module and attribute that hold each tensor.
    trained: the masters of weights that are trained, by name, in the plan's order. still: codes of weights on a grid
    that are not trained, of this process's rows, on the CPU.
    """

    def __init__(self, model: Any, plan: Plan):
        self.model, self.plan = model, plan
        self.owners = owners_of(model)
        self.trained: dict[str, BlockLatent | FloatLatent] = {}
        self.still: dict[str, Quantized] = {}

    @property
    def blocks(self) -> dict[str, BlockLatent]:
        """The masters of weights on a BlockGrid, by name."""
        return {name: latent for name, latent in self.trained.items() if isinstance(latent, BlockLatent)}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that an optimizer trains, by name, in the order of the model's parameters.

        Masters and scale latents, and what the model trains beside its planned weights: static scales and adapters.
        """
        by_weight = {id(latent.weight): latent for latent in self.trained.values()}  # of a model at rest, not gathered
        for name, parameter in self.model.named_parameters():
            latent = by_weight.get(id(parameter))
            if latent is not None:
                yield from latent.named_parameters()
            elif parameter.requires_grad:
                yield bare_path(name), parameter

    def state(self) -> dict[str, Tensor]:
        """All that must be kept to go on with training, by name: masters, scales, and what else the model trains."""
        state = {key: value for latent in self.trained.values() for key, value in latent.state().items()}
        return state | {name: parameter for name, parameter in self.named_parameters() if name not in state}

    def decode(self) -> None:
        """Write decoded values into the model's weights; must follow every change of a latent."""
        for latent in self.trained.values():
            latent.decode()

    def pull(self) -> None:
        """Move the gradients of the model's weights to the latents, and average what FSDP2 has not averaged."""
        self.average_whole()
        for latent in self.trained.values():
            latent.pull()
        self.average_rest()

    def average_whole(self) -> None:
        """Average, over processes, gradients of weights that each of them has whole."""
        whole = [latent.weight for latent in self.trained.values() if not isinstance(latent.weight, DTensor)]
        average_over_processes([weight.grad for weight in whole if weight.grad is not None])

    def average_rest(self) -> None:
        """Average gradients of what is no latent, such as static scales; those of adapters are sums already."""
        if world_size() > 1:
            own = {id(parameter) for latent in self.trained.values() for _, parameter in latent.named_parameters()}
            rest = [p for name, p in self.named_parameters() if id(p) not in own and ".lora_" not in name]
            average_over_processes([p.grad for p in rest if p.grad is not None])

    def clip(self, largest: float) -> None:
        """Scale the gradients of all that is trained so that their norm, over all processes, is at most `largest`."""
        sharded, whole = self._by_sharding()
        if not sharded:
            nn.utils.clip_grad_norm_(whole, largest)
            return
        norms = [nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part in (sharded, whole)]
        total = (sum_over_processes(norms[0].square()) + norms[1].to(norms[0].device).square()).sqrt()
        nn.utils.clip_grads_with_norm_([*sharded, *whole], largest, total)

    def _by_sharding(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Trained parameters: rows of this process alone, and those that every process has alike."""
        latents = [latent for latent in self.trained.values() if isinstance(latent.weight, DTensor)]
        sharded = [parameter for latent in latents for _, parameter in latent.named_parameters()]
        own = set(map(id, sharded))
        return sharded, [parameter for _, parameter in self.named_parameters() if id(parameter) not in own]

    def freeze_codes(self) -> None:
        """Fix the codes of every weight whose scales are learned; only these go on: the start of the frozen tail.

        Embeddings on a finer grid keep learning: theirs are the codes that can still make up for the others'.
        """
        for latent in self.blocks.values():
            if latent.scale_latent is not None and latent.mode != "frozen":
                latent.freeze()
                if latent.adapter is not None:
                    latent.adapter.freeze()

    def leave_scales(self) -> None:
        """Fix all but scales that are learned, for good; of these weights no float masters are kept."""
        self.freeze_codes()
        for name, latent in list(self.trained.items()):
            if isinstance(latent, BlockLatent) and latent.mode == "frozen":
                assert latent.codes is not None
                latent.latent = nn.Parameter(latent.codes, requires_grad=False)
                continue
            if isinstance(latent, BlockLatent):
                self.still[name] = latent.pack()
            latent.weight.requires_grad_(False)
            del self.trained[name]

    def is_sharded(self, name: str) -> bool:
        """Whether each process owns only some rows of a planned tensor."""
        return isinstance(getattr(*self.owners[name]), DTensor)

    def first_rows(self) -> dict[str, int]:
        """The first of this process's rows of masters and their state, by name; of sharded ones only."""
        return {
            name: own_slice(latent.weight).start
            for latent in self.trained.values()
            if isinstance(latent.weight, DTensor)
            for name in latent.state()
        }

    def pack(self, tensor: PlannedTensor) -> Quantized | Tensor:
        """A planned tensor as the forward uses it, of this process's rows, on the CPU: codes and scales, or float32."""
        if tensor.name in self.trained:
            return self.trained[tensor.name].pack()
        module, attribute = self.owners[tensor.name]
        if tensor.name in self.still:
            still, weight = self.still[tensor.name], local(getattr(module, attribute).detach())
            for rows in torch.arange(len(weight)).split(ROWS_AT_ONCE):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                decoded = rows_of(still, part).decode(weight.dtype)
                check_unchanged(tensor.name, weight[part], decoded.to(weight.device))
            return still
        assert isinstance(tensor.grid, FloatGrid)
        return tensor.grid.round(local(getattr(module, attribute).detach()).cpu())


def prepare(
    model: Any,
    plan: Plan,
    *,
    fit: Fit | None = None,
    start: PackedModel | None = None,
    source: Mapping[str, Tensor] | None = None,
) -> Latents:
    """Put every planned tensor of `model` on its grid, in place, and return the latents behind them.

    model: the transformers text model of the plan's config, in the dtype that its forward is to compute in, or a
        PEFT LoRA model around it, with plain LoRA on linears that the recipe trains. Adapters come first, `prepare`
        after them. The model's weights are replaced by decoded values, and its own forward is left alone.
    fit: first scales; the recipe's own fit by default.
    start: a packed model whose codes, scales and static scales are where training begins, bit for bit; the
        model's own weights are then overwritten.
    source: tensors by name that masters begin with, for a model whose own are of a narrower dtype.

    From here on, train with `GridOptimizer` and write the result with `pack_model`. Tensors that the recipe does not
    train are decoded once. Static scales of activations and KV cache stay off until `calibrate` finds them. Raises
    RecipeError if the model lacks a planned tensor, WeightError for NaN or Inf, and InputError for a model with
    adapters or parameters that no quantized weight can hold.
    """
    check_adapters(model)
    check_attention(model, plan)
    owners = owners_of(model)
    _check_fits(owners, plan)
    check_inventory(model, plan)
    latents = Latents(model, plan)
    adapted = {f"{bare_path(path)}.weight" for path, module in model.named_modules() if is_adapter(module)}
    fit = fit or FITS[plan.recipe.fit]
    for tensor in plan:
        module, attribute = owners[tensor.name]
        try:
            value = getattr(module, attribute)
            values = local((value if source is None else source[tensor.name]).detach())
            _put_on_grid(latents, tensor, value, values, fit, start, adapted)
        except WeightError as error:
            raise error if tensor.name in str(error) else WeightError(f"{tensor.name}: {error}") from error
    attach_static(model, plan)
    if start is not None:
        stored = start.read_static()
        put_scales(model, plan, {scale.name: stored[scale.name] for scale in plan.static_scales if scale.owned})
    for path, module in model.named_modules():
        if is_adapter(module):
            adapt(module, latents.trained.get(f"{bare_path(path)}.weight"), path)
    return latents


def _check_fits(owners: dict[str, tuple[nn.Module, str]], plan: Plan) -> None:
    """Raise RecipeError for a planned tensor that the model lacks or has in another shape."""
    for tensor in plan:
        if tensor.name not in owners:
            raise RecipeError(f"{tensor.name}: planned, but not in this model: was the plan made for another one?")
        shape = tuple(getattr(*owners[tensor.name]).shape)
        if shape != tensor.spec.shape:
            planned = list(tensor.spec.shape)
            raise RecipeError(f"{tensor.name}: planned as {planned}, but {list(shape)} in this model: plan this model")


def check_inventory(model: nn.Module, plan: Plan) -> None:
    """Raise InputError for a parameter of the model that the plan does not hold: packing would leave it out."""
    owners = owners_of(model)
    held = {id(getattr(*owners[tensor.name])) for tensor in plan if tensor.name in owners}
    for name, (module, attribute) in owners.items():
        parameter = module._parameters.get(attribute)
        if parameter is not None and id(parameter) not in held and not name.endswith("_scale_latent"):
            raise InputError(
                f"{name}: a parameter that the plan does not hold, so it would be left out of what is packed: merge or "
                "remove it; of adapters, plain LoRA on planned linears can be trained"
            )


def owners_of(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Tensor name of the bare model -> the module that holds it, and the attribute; without LoRA's own weights."""
    owners: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        path = bare_path(path)
        if ".lora_" in path:
            continue
        names = [n for n, p in module._parameters.items() if p is not None]
        names += [n for n in module._buffers if n in STORED_BUFFERS]
        for name in names:
            owners.setdefault(f"{path}.{name}" if path else name, (module, name))
    return owners


def _put_on_grid(
    latents: Latents,
    tensor: PlannedTensor,
    value: Tensor,
    values: Tensor,
    fit: Fit,
    start: PackedModel | None,
    adapted: set[str],
) -> None:
    """Make the latent of one tensor of the model, or decode it for good.

    values: this process's rows of what it begins with. start: a packed model that it begins with instead. adapted:
    names of weights with adapters; where there are any, nothing else is trained but scales.
    """
    grid, trained = tensor.grid, tensor.rule.trainable and isinstance(value, nn.Parameter)
    learned = latents.plan.recipe.schedule.learn_scales and learns_scales(tensor)
    trained = trained and (not adapted or tensor.name in adapted or learned)
    own = local(value.detach())
    check_finite(values, tensor.name)
    if isinstance(value, nn.Parameter):
        value.requires_grad_(trained)
    stored = None if start is None else own_rows(start.read(tensor.name), value)
    if isinstance(grid, FloatGrid):
        values = stored if isinstance(stored, Tensor) else values
        if trained:
            latents.trained[tensor.name] = FloatLatent(tensor.name, value, grid, values)  # type: ignore[arg-type]
        else:
            own.copy_(grid.round(values))
        return
    if isinstance(stored, Quantized):
        fitted = Quantized(grid, stored.codes, stored.scale, stored.super_scale)
    else:
        fitted = fit_rows(fit, values.float(), grid)
    if trained:
        values = values if stored is None else fitted.decode()
        latent = BlockLatent(tensor.name, value, grid, values, fitted, learned=learned)  # type: ignore[arg-type]
        latent.learns_codes = not adapted
        latent.decode()
        if isinstance(stored, Quantized):
            check_begins(stored, latent, tensor)
        latents.trained[tensor.name] = latent
    else:
        own.copy_(fitted.decode(own.dtype))
        parts = (fitted.codes, fitted.scale, fitted.super_scale)
        latents.still[tensor.name] = Quantized(grid, *(None if p is None else p.cpu() for p in parts))  # type: ignore[arg-type]
