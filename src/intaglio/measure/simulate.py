"""A packed model, simulated: transformers computes with what the artifact decodes to."""

from __future__ import annotations

import copy

from intaglio.packed.checkpoint import TextModel
from intaglio.packed.decoded import decode_into, load_packed
from intaglio.packed.model import PackedModel
from intaglio.plan.static import StaticScale
from intaglio.train.static import StaticScales, attach_static, fix_scales, switch_static


class Simulation:
    """One model in memory that computes as one packed model after another does.

    It is a copy of the original, in its dtype and on its device. `load` changes weights and static scales in place.
    """

    def __init__(self, original: TextModel):
        self.original = original
        self.model: TextModel | None = None
        self.scales: tuple[StaticScale, ...] = ()  # that the model has places for

    def load(self, packed: PackedModel) -> TextModel:
        """The model, from now on that of `packed`: decoded weights, static scales switched on."""
        plan = packed.plan
        if self.model is None or plan.static_scales != self.scales:
            self.model = None  # one copy at a time
            self.model, self.scales = copy.deepcopy(self.original), plan.static_scales
            attach_static(self.model, plan)
        decode_into(self.model, packed)
        for module in self.model.modules():
            if isinstance(module, StaticScales):
                module.fixed.clear()  # of the packed model before
        return _switched_on(self.model, packed)


def load_simulated(packed: PackedModel) -> TextModel:
    """The text model of a packed model, float32, that computes as it does: decoded weights, static scales."""
    packed = packed.text_only()
    model = load_packed(packed)
    attach_static(model, packed.plan)
    return _switched_on(model, packed)


def _switched_on(model: TextModel, packed: PackedModel) -> TextModel:
    fix_scales(model, packed.plan, packed.read_static())
    switch_static(model, activations=True, kv_cache=True)
    return model


def decoded_model(original: TextModel, packed: PackedModel) -> TextModel:
    """A copy of the original that computes as the packed model does: decoded weights, static scales."""
    return Simulation(original).load(packed)
