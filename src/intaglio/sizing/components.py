"""Parts of a model as a person counts them: parameters of each, and bytes of the KV cache."""

from __future__ import annotations

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


def kv_cache_bytes(model: ModelSpec, context_tokens: int, batch: int = 1, bits: int = 16) -> dict[str, int]:
    """Bytes of the keys and values of `batch` sequences: of sliding layers, of full ones, and together.

    KV-shared layers and those of a drafter fill no cache: they read that of another layer. Where keys and values come
    from one projection, both are stored all the same, since keys are rotated and normed otherwise than values.
    """
    config, sizes = model.layer_config, {"sliding": 0, "full": 0}
    for layer, donor in enumerate(model.kv_donors):
        if donor == layer:
            own, sliding = config.per_layer_config[layer], config.layer_types[layer] == "sliding_attention"
            numbers = 2 * own.num_key_value_heads * own.head_dim  # of a token, keys and values together
            kept = min(context_tokens, config.sliding_window) if sliding else context_tokens
            sizes["sliding" if sliding else "full"] += batch * (kept * numbers * bits // 8)
    return sizes | {"total": sizes["sliding"] + sizes["full"]}
