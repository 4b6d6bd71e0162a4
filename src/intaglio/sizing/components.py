"""Parts of a model as a person counts them: parameters of each, and bytes of the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from intaglio.plan.family import TOWER_ROLES, ModelSpec, TensorSpec

# In the order in which tables show them. Roles with names of their own in the family table, or the tower's.
LABELS = {
    "token_embedding": "token embedding",
    "head": "output head",
    "ple_embedding": "per-layer embeddings",
    "attention": "attention",
    "mlp": "MLP",
    "expert": "experts",
    "router": "routers",
    "ple_linear": "per-layer linears",
    "ple_model_projection": "per-layer projection",
    "drafter_projection": "drafter projections",
    "centroids": "centroids",
    "token_ordering": "token ordering",
    "norm": "norms",
    "layer_scalar": "layer scalars",
    "static": "static scales",
    "unused": "unused keys, values",
    "vision": "vision tower",
    "embed_vision": "vision embedder",
    "audio": "audio tower",
    "embed_audio": "audio embedder",
}
TOWERS = ("vision", "embed_vision", "audio", "embed_audio")  # left out by a text-only file


def component_of(tensor: TensorSpec, *, carried: bool = False) -> str:
    """A key of LABELS."""
    if tensor.role in TOWER_ROLES:
        return tensor.name.split(".")[1].removesuffix("_tower").replace("vision_embedder", "embed_vision")
    return "unused" if carried else tensor.role


def parameters(model: ModelSpec) -> dict[str, int]:
    """Parameters of each component, in the order of LABELS. Buffers, such as clip bounds, are none."""
    counts = dict.fromkeys(LABELS, 0)
    for carried, tensors in ((False, model.tensors), (True, model.carried)):
        for tensor in tensors:
            counts[component_of(tensor, carried=carried)] += 0 if tensor.buffer else tensor.numel
    return {component: count for component, count in counts.items() if count}


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer that has its own.

    values_per_token: numbers that a token adds, keys and values together; where they come from one projection
        too, since keys are rotated and normed otherwise than values. window: tokens that are kept; None for all.
    """

    layer: int
    values_per_token: int
    window: int | None

    def size_bytes(self, context_tokens: int, bits: int) -> int:
        kept = context_tokens if self.window is None else min(context_tokens, self.window)
        return kept * self.values_per_token * bits // 8


def kv_layers(model: ModelSpec) -> list[LayerCache]:
    """Layers that fill a cache: neither the KV-shared ones nor those of a drafter, which read others'."""
    config = model.layer_config
    caches = []
    for layer, donor in enumerate(model.kv_donors):
        own = config.per_layer_config[layer]
        sliding = config.layer_types[layer] == "sliding_attention"
        if donor == layer:
            numbers = 2 * own.num_key_value_heads * own.head_dim
            caches.append(LayerCache(layer, numbers, config.sliding_window if sliding else None))
    return caches


def kv_cache_bytes(model: ModelSpec, context_tokens: int, batch: int = 1, bits: int = 16) -> dict[str, int]:
    """Bytes of the keys and values of `batch` sequences: of sliding layers, of full ones, and together."""
    sizes = {"sliding": 0, "full": 0}
    for cache in kv_layers(model):
        kind = "full" if cache.window is None else "sliding"
        sizes[kind] += batch * cache.size_bytes(context_tokens, bits)
    return sizes | {"total": sizes["sliding"] + sizes["full"]}
