"""The static output scales that vLLM computes with: of a fused linear one, that of the shard which is loaded last."""

from __future__ import annotations

from intaglio.packed.checkpoint import TextModel
from intaglio.packed.model import PackedModel
from intaglio.train.static import fix_scales

LOADED_LAST = {"q_proj": "v_proj", "k_proj": "v_proj", "gate_proj": "up_proj"}


def fuse_scales(model: TextModel, packed: PackedModel) -> int:
    """Let the simulated packed model compute with these; returns how many differ from the packed ones."""
    packed_values = packed.read_static()
    values = dict(packed_values)
    for scale in packed.plan.static_scales:
        own = scale.module.rpartition(".")[2]
        if scale.kind == "output" and own in LOADED_LAST:
            last = scale.name.replace(own, LOADED_LAST[own])
            values[scale.name] = values.get(last, values[scale.name])  # a KV-shared layer has q alone
    fix_scales(model, packed.plan, values)
    return sum(values[name] != packed_values[name] for name in values)
