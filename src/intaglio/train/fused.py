"""AdamW over latents in one pass on a GPU: pull, clip, step and decode of many weights by two compiled kernels.

Weights of one mode, grid and rate share flat buffers. By its bytes a step is bound by the card's memory: gradients are
read twice, since the norm that clips them must be known first; masters and moments are read and written once. The plain
path, `GridOptimizer` over torch's AdamW, computes the same and is what a CPU uses.

Shape suffixes: N blocks of K neighbouring columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from intaglio.plan.memory import BUCKET_VALUES
from intaglio.train.fused_kernels import block_squares, block_step, float_step
from intaglio.train.grid_optimizer import GridOptimizer, check_trainable
from intaglio.train.kernels import expect_compilations
from intaglio.train.latent import BlockLatent, FloatLatent, take_gradient
from intaglio.train.latents import Latents
from intaglio.train.lean import Bfloat16AdamW
from intaglio.train.sharding import local, sum_over_processes

T = TypeVar("T")

LARGEST_FIXED_BLOCK = 32  # of the GGUF grids; a larger block is a whole row


_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def _kernel(function: Callable[..., T], *tensors: Tensor) -> Callable[..., T]:
    """The compiled function; the first dimension of these tensors may be another one at the next call.

    So may the width of a block that is a whole row: the widths of a model's rows share one compilation. All else is
    constant, above all what a grid's arithmetic shifts by, which torch would otherwise make symbolic.
    """
    for tensor in tensors:
        if tensor.numel():
            torch._dynamo.mark_dynamic(tensor, 0)
            if tensor.ndim == 2 and tensor.shape[1] > LARGEST_FIXED_BLOCK:
                torch._dynamo.mark_dynamic(tensor, 1)
    if function not in _compiled:
        expect_compilations(32)
        _compiled[function] = torch.compile(function, dynamic=False)
    return _compiled[function]


def _flat(parts: Sequence[Tensor], width: int) -> Tensor:
    """One tensor [N, width] of several; width 0: [N]."""
    shape = (-1, width) if width else (-1,)
    return torch.cat([part.detach().reshape(shape) for part in parts])


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [
        part.view(tensor.shape)
        for part, tensor in zip(flat.view(-1).split([t.numel() for t in like]), like, strict=True)
    ]


class Bucket:
    """Latents of one mode, grid and rate in flat buffers: each latent's own tensors become views of these.

    dtype_of_moments, offload: as `FusedGridAdamW` takes them.
    """

    def __init__(self, latents: list[Any], optimizer: FusedGridAdamW):
        self.latents = latents
        self.dtype_of_moments, self.offload = optimizer.moments, optimizer.offload
        self.sharded = isinstance(latents[0].weight, DTensor)
        self.weights = [local(latent.weight.detach()) for latent in latents]
        self.dtype = self.weights[0].dtype
        self.groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.state = optimizer.state
        self.steps_done = torch.zeros((), device=self.weights[0].device)
        self.grad: Tensor | None = None
        self.moments: list[Tensor] = []
        self.latent = torch.empty(0, device=self.weights[0].device)
        if getattr(latents[0], "mode", "") != "frozen":  # else only scales go on
            self.latent = self._adopt([latent.latent for latent in latents], self.width)
            self._learn([latent.latent for latent in latents], self.width)

    width = 0  # of a block; 0 for floats

    def _adopt(self, parameters: list[Any], width: int) -> Tensor:
        """Move parameters into a flat buffer."""
        flat = _flat(parameters, width)
        for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
            parameter.data = view
        return flat

    def _learn(self, parameters: list[nn.Parameter], width: int) -> None:
        """Moments of parameters in flat buffers, with what they have already."""
        for key in ("exp_avg", "exp_avg_sq"):
            before = [self.state[p].get(key) if p in self.state else None for p in parameters]
            device, dtype = torch.device("cpu") if self.offload else self.steps_done.device, self.dtype_of_moments
            first = [torch.zeros_like(p, dtype=dtype, device=device) for p in parameters]
            flat = _flat([zeros if b is None else b for zeros, b in zip(first, before, strict=True)], width)
            flat = flat.pin_memory() if self.offload else flat
            self.moments.append(flat)
            for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
                self.state[parameter][key] = view
        for parameter in parameters:
            self.steps_done.fill_(float(self.state[parameter].get("step", 0.0)))
            self.state[parameter]["step"] = self.steps_done

    @property
    def has_gradients(self) -> bool:
        """Whether any weight of the bucket has a gradient."""
        return any(latent.weight.grad is not None for latent in self.latents)

    def gather(self) -> None:
        """Move the gradients of the bucket's weights into one tensor, and take them away from the weights."""
        grads = [take_gradient(latent.weight) for latent in self.latents]
        parts = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, self.weights, strict=True)]
        self.grad = _flat(parts, self.width)

    def norm(self) -> Tensor:
        """Squared norm of the latents' gradients, float32 scalar; after `gather`."""
        assert self.grad is not None
        return self.grad.float().square().sum()

    def _hyper(self, parameter: nn.Parameter, clip: Tensor) -> Tensor:
        group, step = self.groups[id(parameter)], self.steps_done
        beta1, beta2 = group["betas"]
        fixed = [group["lr"], beta1, beta2, group["eps"], group["weight_decay"]]
        known = torch.tensor(fixed, dtype=torch.float32).to(step.device, non_blocking=True)
        return torch.stack([*known.unbind(), 1 - known[1] ** step, 1 - known[2] ** step, clip])

    def step(self, clip: Tensor) -> None:
        """Step and decode into the model's weights; after `gather`. clip: factor of the gradients, float32 scalar."""
        self.steps_done += 1
        kept = self.moments
        if self.offload:
            self.moments = [moment.to(clip.device, non_blocking=True) for moment in kept]
        values = self._step(clip)
        if self.offload:
            torch._foreach_copy_(kept, self.moments)
            self.moments = kept
        self.grad = None
        torch._foreach_copy_(self.weights, _views(values, self.weights))

    def _step(self, clip: Tensor) -> Tensor:
        hyper = self._hyper(self.latents[0].latent, clip)
        kernel = _kernel(float_step, self.grad, self.latent, *self.moments)  # type: ignore[arg-type]
        return kernel(self.latents[0].grid, self.dtype, self.grad, self.latent, self.moments, hyper)


class BlockBucket(Bucket):
    """A bucket of weights on a BlockGrid, with their scales."""

    def __init__(self, latents: list[BlockLatent], optimizer: FusedGridAdamW):
        first = latents[0]
        self.width, self.mode, self.grid = first.grid.block_size, first.mode, first.grid
        none = torch.empty(0, device=first.latent.device)
        super().__init__(latents, optimizer)
        scales = [latent.scale_latent for latent in latents if latent.scale_latent is not None]
        self.z = self._adopt(scales, 0) if scales else none
        if scales:
            self._learn(scales, 0)
        self.codes = _flat([latent.codes for latent in latents], self.width) if self.mode == "frozen" else none  # type: ignore[misc]
        self.given = none if self.mode == "canonical" else _flat([latent.z_and_given()[1] for latent in latents], 0)
        self.codes_views = _views(self.codes, [latent.codes for latent in latents]) if self.mode == "frozen" else []  # type: ignore[misc]
        for latent, view in zip(latents, self.codes_views, strict=False):
            latent.codes = view
            if not latent.latent.is_floating_point():  # its codes are all that it is
                latent.latent.data = view

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        assert self.grad is not None
        return self.grad, self.latent, self.codes, self.z, self.given

    def norm(self) -> Tensor:
        return _kernel(block_squares, *self._tensors)(self.mode, self.grid, *self._tensors).sum()

    def _step(self, clip: Tensor) -> Tensor:
        first = self.latents[0]
        hyper = [self._hyper(first.latent, clip)] if self.mode != "frozen" else [self._hyper(first.scale_latent, clip)]
        hyper.append(hyper[0] if first.scale_latent is None else self._hyper(first.scale_latent, clip))
        moments = self.moments if self.mode != "frozen" else [*self.moments, *self.moments]
        kernel = _kernel(block_step, *self._tensors, *moments)
        values, steps = kernel(self.mode, self.grid, self.dtype, self._tensors, moments, hyper)
        for latent, step in zip(self.latents, _views(steps, [latent.step for latent in self.latents]), strict=True):
            latent.step = step
        return values


def make_buckets(latents: Latents, optimizer: FusedGridAdamW) -> list[Bucket]:
    """Buckets of all trained weights but those with adapters, whose latents are more than a buffer."""
    groups = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    alike: dict[Any, list[Any]] = {}
    for latent in latents.trained.values():
        if isinstance(latent, BlockLatent) and latent.adapter is not None:
            continue
        kinds = (latent.grid, getattr(latent, "mode", "float"), isinstance(latent.weight, DTensor), latent.weight.dtype)
        rates = tuple(groups.get(id(parameter)) for _, parameter in latent.named_parameters())
        found = alike.setdefault((*kinds, rates), [[]])
        if sum(other.latent.numel() for other in found[-1]) + latent.latent.numel() > BUCKET_VALUES and found[-1]:
            found.append([])
        found[-1].append(latent)
    return [
        (Bucket if isinstance(part[0], FloatLatent) else BlockBucket)(part, optimizer)
        for parts in alike.values()
        for part in parts
    ]


class FusedGridAdamW(GridOptimizer):
    """`GridOptimizer` over AdamW whose step is fused; for GPUs.

    moments: dtype of the moments between steps, float32 or bfloat16. offload: keep those of buckets in pinned host
    memory; one bucket's are on the GPU at a time.
    """

    def __init__(self, latents: Latents, *, moments: torch.dtype = torch.float32, offload: bool = False, **kwargs: Any):
        super().__init__(latents, Bfloat16AdamW if moments == torch.bfloat16 else torch.optim.AdamW, **kwargs)
        self.offload = offload
        self.buckets: list[Bucket] = []

    def new_moment(self, parameter: Tensor, key: str) -> Tensor:
        """A moment of zeros beside a parameter, in host memory if moments are offloaded."""
        return torch.zeros_like(parameter, dtype=self.moments, device="cpu" if self.offload else None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Pull, clip, step and decode; as `GridOptimizer.step`."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        if not self.buckets:
            self.make_buckets()
        self.latents.average_whole()
        for latent in self.rest:
            latent.pull()
        self.latents.average_rest()
        learning = [bucket for bucket in self.buckets if bucket.has_gradients]
        for bucket in learning:
            bucket.gather()
        clip = self._clip_factor(learning)  # of all gradients, so before the first bucket steps
        for bucket in learning:
            bucket.step(clip)
        self.inner.step()
        self.inner.zero_grad()
        for latent in self.rest:
            latent.decode()
        return loss

    def make_buckets(self) -> None:
        """Move latents and moments into flat buffers."""
        check_trainable(self.latents)
        self.buckets = make_buckets(self.latents, self)
        bucketed = {id(latent) for bucket in self.buckets for latent in bucket.latents}
        self.rest = [latent for latent in self.latents.trained.values() if id(latent) not in bucketed]
        own = {id(p) for bucket in self.buckets for latent in bucket.latents for _, p in latent.named_parameters()}
        for parameter, state in self.state.items():
            if id(parameter) not in own:  # a checkpoint's moments of adapters and static scales stay on the GPU
                state.update({key: value.to(parameter.device) for key, value in state.items()})

    def _clip_factor(self, learning: list[Bucket]) -> Tensor:
        """Factor of all gradients, float32 scalar; those outside of buckets are scaled here."""
        zero = torch.zeros((), device=self.buckets[0].latent.device)
        if not self.clip:
            return zero + 1
        rest = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        sharded = sum((bucket.norm() for bucket in learning if bucket.sharded), zero)
        whole = sum((bucket.norm() for bucket in learning if not bucket.sharded), zero)
        if rest:
            whole = whole + nn.utils.get_total_norm(rest).square()
        total = (sum_over_processes(sharded + zero) + whole).sqrt()  # each process has the whole ones alike
        factor = (self.clip / (total + 1e-6)).clamp(max=1.0)
        if rest:
            torch._foreach_mul_(rest, factor)
        return factor
