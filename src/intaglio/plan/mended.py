"""Faults of one release of transformers, mended in one place. To be removed with that release.

5.23 (and no other: 5.22 has no such property, 5.24 is right) computes which layers share keys and values
by `kv_sharing_modes` of the text configs of Gemma 4. It raises where all layers share, as those of every
drafter do, so that no drafter can be built; and where none does, no layer stores its keys and values,
which a drafter of the larger models then looks for in vain.
"""

from __future__ import annotations

import functools
from typing import Any

NEEDED_BY = "5.23."  # releases that begin so


@functools.cache
def mend_kv_sharing() -> bool:
    """Give both text configs a right `kv_sharing_modes`, if transformers needs it; returns whether it does.

    Called before any config is read. For models that share some of their layers nothing changes; where
    none is shared, the last layer of each type hands its keys and values out, as in every other release.
    """
    import transformers
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedTextConfig

    needed = transformers.__version__.startswith(NEEDED_BY)
    classes: tuple[Any, ...] = (Gemma4TextConfig, Gemma4UnifiedTextConfig)
    for config_class in classes if needed else ():
        config_class.kv_sharing_modes = property(kv_sharing_modes)
    return needed


def kv_sharing_modes(config: Any) -> list[str | None]:
    """One word a layer: "reuse" if it attends to another's keys and values, "store" if others may, else None."""
    own = config.num_hidden_layers - config.num_kv_shared_layers
    if own < 0:
        raise ValueError(f"{config.num_kv_shared_layers} of {config.num_hidden_layers} layers share keys and values")
    kinds = config.layer_types
    last = {max(i for i in range(own) if kinds[i] == kind) for kind in set(kinds[:own])}
    return ["reuse" if i >= own else "store" if i in last else None for i in range(config.num_hidden_layers)]
