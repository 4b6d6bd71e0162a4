"""First values of static scales: one pass over training text, of its own, before any step.

Observers are there for this pass alone, so no recomputed forward ever reaches them, and what they
count is summed over processes, so that a process without data changes nothing. The first token of a
sequence is left out: Gemma parks activations there that no other token has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.numerics.fit_static import BINS, fit_static_scale, magnitude_counts
from intaglio.plan.plan import Plan
from intaglio.progress import Progress
from intaglio.train.sharding import final_hidden, settle
from intaglio.train.static import modules_by_name, put_scales, switch_static

Batch = tuple[Tensor, Tensor]  # input_ids and positions, int64 [B, T]


class Observers:
    """Histograms of what each owner of a scale sees, of the tokens that `counted` marks; of none where it is None."""

    def __init__(self, model: nn.Module, plan: Plan):
        device = next(model.parameters()).device
        owned = [scale for scale in plan.static_scales if scale.owned]
        self.names: dict[tuple[str, str], str] = {(scale.module, scale.kind): scale.name for scale in owned}
        # float64: float32 would lose single counts beyond 2^24
        self.counts = {scale.name: torch.zeros(BINS, dtype=torch.float64, device=device) for scale in owned}
        self.modules = {name: module for name, module in modules_by_name(model).items() if hasattr(module, "static")}
        self.counted: Tensor | None = None  # bool [B, T]

    def see(self, module: str, kind: str, x_BT: Tensor) -> None:
        name = self.names.get((module, kind))
        if name is not None and self.counted is not None:
            self.counts[name] += magnitude_counts(x_BT[self.counted])

    def fitted(self, reduce: Callable[[Tensor], Tensor] = lambda counts: counts) -> dict[str, float]:
        """The owners' scales by name, of least squared error. WeightError as `calibrate` raises it."""
        return {name: fit_static_scale(reduce(counts), name) for name, counts in self.counts.items()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe all forwards inside."""
        linears = {name: module for name, module in self.modules.items() if isinstance(module, nn.Linear)}
        handles = [module.register_forward_hook(self._hook(name)) for name, module in linears.items()]
        for name, module in self.modules.items():
            module.static.observer = lambda kind, x, name=name: self.see(name, kind, x)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in self.modules.values():
                module.static.observer = None

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.see(name, "input", inputs[0])
            self.see(name, "output", output)

        return hook


@torch.no_grad()
def calibrate(
    model: Any,
    plan: Plan,
    batches: list[Batch],
    *,
    reduce: Callable[[Tensor], Tensor] = lambda counts: counts,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Find and set every static scale of a prepared model, and return the owners' values by name.

    batches: full sequences of training text; a position of 0 marks the token to leave out. reduce: sums
    a tensor over processes. progress: shows the tokens that are done. Raises WeightError for activations
    that are not finite, and for a scale whose tensor the text never reached.
    """
    observers = Observers(model, plan)
    total, done = sum(ids.numel() for ids, _ in batches), 0
    switch_static(model, activations=False, kv_cache=False)  # a scale is found for the floats that it will round
    with observers.watching():
        for input_ids, positions in batches:
            observers.counted = positions > 0
            final_hidden(model, input_ids, positions)
            done += input_ids.numel()
            if progress is not None:
                progress.part(done, total, "tokens calibrated")
    settle(model)  # no backward follows, which would free gathered weights
    switch_static(model, activations=True, kv_cache=True)
    values = observers.fitted(reduce)
    put_scales(model, plan, values)
    return values
