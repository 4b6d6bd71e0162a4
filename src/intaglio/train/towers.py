"""Static activation scales of vision and audio towers: one pass over images and recordings, of its own.

Towers are not trained. transformers' modules are filled with the weights as they are packed, so that
scales are found for what ships, and observed with float activations; padding is left out. A linear
behind a clip sees what the clip leaves, as the runtime's does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.errors import InputError
from intaglio.numerics.fit_static import BINS, fit_static_scale, magnitude_counts
from intaglio.numerics.grid import Quantized
from intaglio.plan.carried import tower_kind
from intaglio.plan.family import transformers_config
from intaglio.plan.plan import Plan
from intaglio.progress import Progress
from intaglio.train.media import Inputs, Samples, counted
from intaglio.train.static import StaticLinear, StaticScales, swap_class


class Towers:
    """The towers of a plan that there are samples for, in float32; `put` fills them, `calibrate` observes them.

    samples: at most one of each kind. errors: what quantized activations change in the output of a kind's
    tower, by its root mean square, once calibrated. Raises InputError for samples of a tower that the model
    lacks, or whose linears the recipe leaves in floats.
    """

    def __init__(self, plan: Plan, samples: list[Samples], progress: Progress | None = None):
        self.samples, self.progress = samples, progress or Progress()
        self.errors: dict[str, float] = {}
        kinds = [given.kind for given in samples]
        self.scales = [name for name in plan.carried_scales if tower_kind(name) in kinds]
        for kind in kinds:
            if not any(tower_kind(name) == kind for name in self.scales):
                raise InputError(
                    f"recipe {plan.recipe.name} quantizes no linear of a {kind} tower of this model: leave out its "
                    "samples, or choose a recipe that does, for example mobile-e2b"
                )
        self.model = _build(plan, kinds)
        self.tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        self.linears = {f"model.{name}": m for name, m in self.model.named_modules() if isinstance(m, nn.Linear)}

    def put(self, name: str, value: Quantized | Tensor, rows: slice | None = None) -> None:
        """Take over a tensor, or some of its rows, as packed; those of other modules are passed over."""
        if name in self.tensors:
            values = value.decode() if isinstance(value, Quantized) else value.float()
            self.tensors[name][rows if rows is not None else ...] = values

    @torch.no_grad()
    def calibrate(self) -> dict[str, float]:
        """Every activation scale by its name, in use from here on.

        Samples are read twice: to find the scales, and to see what they change. WeightError for
        activations that are not finite, or all zero.
        """
        counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in self.scales}
        floats = {given.kind: list(self._outputs(given, counts)) for given in self.samples}
        values = {name: fit_static_scale(histogram, name) for name, histogram in counts.items()}
        self.fix(values)
        for given in self.samples:
            off = changed = 0.0
            for before, after in zip(floats[given.kind], self._outputs(given), strict=True):
                off, changed = off + float(before.square().sum()), changed + float((after - before).square().sum())
            self.errors[given.kind] = (changed / off) ** 0.5 if off else 0.0
        return values

    def _outputs(self, given: Samples, counts: dict[str, Tensor] | None = None) -> Iterator[Tensor]:
        """`features` of every sample; counts: histograms to add its activations to."""
        what = given.what if counts is not None else f"{given.what}, quantized"
        self.progress.stage(f"Calibrating towers on {what}")
        for number, inputs in enumerate(given, 1):
            with self._watching(counts or {}, counted(inputs)):
                yield self.features(given.kind, inputs)
            self.progress.part(number, len(given))

    def features(self, kind: str, inputs: Inputs) -> Tensor:
        """Output of the tower for the text model: [soft tokens, width] of an image, [1, T, width] of a recording."""
        hidden = self.model[f"{kind}_tower"](**inputs, return_dict=True).last_hidden_state
        embedded: Tensor = self.model[f"embed_{kind}"](inputs_embeds=hidden)
        return embedded

    def fix(self, values: dict[str, float]) -> None:
        """Compute with these scales from here on, by their names; 0 is off."""
        for name, value in values.items():
            module, _, scale = name.rpartition(".")
            linear: Any = self.linears[module]
            if not isinstance(linear, StaticLinear):
                swap_class(linear, StaticLinear)
                linear.static = StaticScales()
            if value:
                linear.static.fixed[scale.removesuffix("_activation_scale")] = torch.tensor(value)

    @contextmanager
    def _watching(self, counts: dict[str, Tensor], positions: Tensor) -> Iterator[None]:
        def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                for kind, x in (("input", inputs[0]), ("output", output)):
                    seen = x[positions] if x.shape[:2] == positions.shape else x  # behind a pooler nothing is padding
                    counts[f"{name}.{kind}_activation_scale"] += magnitude_counts(seen)

            return hook

        watched = {name.rpartition(".")[0] for name in counts}
        handles = [self.linears[name].register_forward_hook(hook_of(name)) for name in watched]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _build(plan: Plan, kinds: list[str]) -> nn.ModuleDict:
    """transformers' own modules, by the names that the whole model gives them."""
    from transformers import AutoModel
    from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder

    assert plan.model.whole is not None
    config = transformers_config(plan.model.whole)
    modules: dict[str, nn.Module] = {}
    for kind in kinds:
        own = getattr(config, f"{kind}_config")
        modules[f"{kind}_tower"] = AutoModel.from_config(own, dtype=torch.float32, trust_remote_code=False)
        modules[f"embed_{kind}"] = Gemma4MultimodalEmbedder(own, config.text_config)
    return nn.ModuleDict(modules).eval().requires_grad_(False)
