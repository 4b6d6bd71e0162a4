"""The model families: a row says all that is not the same in every one of them.

A new family is a new row in `FAMILIES` and, where its modules have new names, new rows in `ROLES`. No other file
compares a model_type: it asks the row (tests/unit/test_architecture.py). What llama.cpp computes is in its
`src/models/gemma{2,3,4,4-assistant}.cpp`; what mlx-lm and vLLM do, in their `models/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from intaglio.errors import ConfigError, RecipeError

# Names are those of the text model's state dict; each has one role. `expert` tensors have three dimensions, the
# first of which counts experts: gate_up_proj [E, 2I, H] and down_proj [E, H, I].
ROLES: tuple[tuple[str, str], ...] = (
    (r"\.layer_scalar$", "layer_scalar"),
    (r"norm\w*\.weight$", "norm"),
    (r"embed_tokens_per_layer\.weight$", "ple_embedding"),
    (r"embed_tokens\.weight$", "token_embedding"),
    (r"^lm_head\.weight$", "head"),
    (r"per_layer_model_projection\.weight$", "ple_model_projection"),
    (r"\.per_layer_(input_gate|projection)\.weight$", "ple_linear"),
    (r"\.self_attn\.[qkvo]_proj\.weight$", "attention"),
    (r"\.mlp\.(gate|up|down)_proj\.weight$", "mlp"),
    (r"\.experts\.(gate_up|down)_proj$", "expert"),
    (r"\.router\.(proj\.weight|scale|per_expert_scale)$", "router"),
    # of drafters
    (r"^(pre|post)_projection\.weight$", "drafter_projection"),
    (r"^masked_embedding\.centroids\.weight$", "centroids"),
    (r"^masked_embedding\.token_ordering$", "token_ordering"),
)


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """The way llama.cpp runs a byte-fallback BPE.

    model, pre: `tokenizer.ggml.model` and `tokenizer.ggml.pre`. by_scores: whether it merges by a score for each token,
    as SentencePiece does, and finds added tokens where a space is still a space; otherwise by the merges themselves.
    visible: tokens that are special to transformers, but that a chat parser has to see in the output.
    """

    model: str
    pre: str | None = None
    by_scores: bool = False
    visible: frozenset[str] = frozenset()


BY_SCORES = GgufTokenizer(model="llama", pre="default", by_scores=True)
BY_MERGES = GgufTokenizer(
    model="gemma4",
    visible=frozenset(
        {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}
    ),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A text architecture.

    model_type: as in config.json.
    whole: model_type of the multimodal model which nests it.
    carries_towers: whether the towers or embedders beside it there are carried along.
    stored_names: what files call modules of the whole, by transformers' names.
    drafts_for: model_type of the family whose hidden states, keys and values a drafter reads.
    exports: of `intaglio export`, the names which not every family has and this one has.

    rotary: transformers' class of its rotary embedding, as module and name.
    eager: whether transformers attends by plain matrix products, and keeps the squares of all heads: torch's fused
        kernels have no soft cap.
    value_norm: whether values are normed.
    norm_offset: what the forward adds to norm gains, and llama.cpp to stored ones (Gemma 3 computes with 1 + w).
    full_heads: whether full layers may have heads of another size and number, `global_head_dim` and
        `num_global_key_value_heads`.
    older_names: whether mlx-lm reads the rope and the period of layers as older configs have them.
    fixed: by runtime, fields of the text config that its code does not ask, and the values that it computes with; an
        empty tuple stands for any number but 0.
    plain_in: runtimes that give each layer the whole text and a rotary embedding without scaling.

    gguf_architecture: `general.architecture` of its GGUF.
    gguf_tokenizer: how llama.cpp runs its tokenizer.
    gguf_caps: the soft caps that llama.cpp applies, and each one's value where the file has none.
    gguf_period: whether the file says by a period which layers slide; otherwise one by one.
    gguf_rope_factors: whether llama.cpp divides each angle of full layers by a factor from the file.
    gguf_wide_scale: number of layers of the model whose attention scores llama.cpp scales by hidden size / heads, and
        those of others by head size; None where it scales none.
    ollama_code: what Ollama calls its own code for prompts, if it does not use the file's template.
    """

    model_type: str
    whole: str | None = None
    carries_towers: bool = False
    stored_names: Mapping[str, str] = field(default_factory=dict)
    drafts_for: str | None = None
    exports: tuple[str, ...] = ("mlx",)

    rotary: tuple[str, str]
    eager: bool = False
    value_norm: bool = False
    norm_offset: float = 0.0
    full_heads: bool = False
    older_names: bool = False
    fixed: Mapping[str, Mapping[str, tuple[Any, ...]]]
    plain_in: tuple[str, ...] = ()

    gguf_architecture: str
    gguf_tokenizer: GgufTokenizer
    gguf_caps: Mapping[str, float] = field(default_factory=dict)
    gguf_period: bool = False
    gguf_rope_factors: bool = False
    gguf_wide_scale: int | None = None
    ollama_code: str | None = None

    @property
    def drafter(self) -> bool:
        """Whether it drafts for another model."""
        return self.drafts_for is not None


GELU = {"hidden_activation": ("gelu_pytorch_tanh",)}
UNCAPPED_SCORES = {"attn_logit_softcapping": (None,)}
UNCAPPED_LOGITS = {"final_logit_softcapping": (None,)}
CAPPED: dict[str, tuple[Any, ...]] = {"attn_logit_softcapping": (), "final_logit_softcapping": ()}
TIED = {"tie_word_embeddings": (True,)}

_GEMMA4_LAYERS: dict[str, Any] = {
    "rotary": ("gemma4.modeling_gemma4", "Gemma4TextRotaryEmbedding"),
    "full_heads": True,
    "gguf_tokenizer": BY_MERGES,
    "gguf_rope_factors": True,
}
_GEMMA4: dict[str, Any] = _GEMMA4_LAYERS | {
    "carries_towers": True,
    "value_norm": True,
    "fixed": {"llama.cpp": GELU, "mlx-lm": GELU},
    "gguf_architecture": "gemma4",
    "gguf_caps": {"final_logit_softcapping": 30.0},
    "ollama_code": "gemma4",
}
_ASSISTANT: dict[str, Any] = _GEMMA4_LAYERS | {
    "exports": (),
    "fixed": {"llama.cpp": GELU | UNCAPPED_LOGITS},
    "gguf_architecture": "gemma4-assistant",
}

FAMILIES: dict[str, Family] = {
    f.model_type: f
    for f in (
        Family(
            model_type="gemma4_text",
            whole="gemma4",
            exports=("mlx", "onnx", "litert", "gemma-mobile"),
            **_GEMMA4,
        ),
        Family(
            model_type="gemma4_unified_text",
            whole="gemma4_unified",
            # transformers: conversion_mapping, "gemma4_unified"
            stored_names={
                "model.embed_vision.multimodal_embedder.": "model.embed_vision.",
                "model.embed_vision.": "model.vision_embedder.",
            },
            **_GEMMA4,
        ),
        Family(model_type="gemma4_assistant", drafts_for="gemma4_text", **_ASSISTANT),
        Family(model_type="gemma4_unified_assistant", drafts_for="gemma4_unified_text", **_ASSISTANT),
        Family(
            model_type="gemma3_text",
            whole="gemma3",
            rotary=("gemma3.modeling_gemma3", "Gemma3RotaryEmbedding"),
            norm_offset=1.0,
            older_names=True,
            fixed={
                "llama.cpp": GELU | UNCAPPED_SCORES,
                "mlx-lm": GELU | UNCAPPED_SCORES | UNCAPPED_LOGITS,
                "vLLM": UNCAPPED_SCORES,
            },
            gguf_architecture="gemma3",
            gguf_tokenizer=BY_SCORES,
            gguf_caps={"final_logit_softcapping": 0.0},
            gguf_period=True,
            gguf_wide_scale=62,
        ),
        Family(
            model_type="gemma2",
            rotary=("gemma2.modeling_gemma2", "Gemma2RotaryEmbedding"),
            eager=True,
            norm_offset=1.0,
            older_names=True,
            fixed={
                "llama.cpp": GELU | CAPPED | TIED,
                "mlx-lm": GELU | CAPPED | TIED,
                "vLLM": GELU | TIED,
            },
            plain_in=("mlx-lm",),
            gguf_architecture="gemma2",
            gguf_tokenizer=BY_SCORES,
            gguf_caps={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            gguf_period=True,
            gguf_wide_scale=46,
        ),
    )
}

# Multimodal models, by the model_type of the whole: towers or embedders beside a nested text model are carried.
WHOLES = tuple(f.whole for f in FAMILIES.values() if f.whole and f.carries_towers)
# The same and those whose text model alone is taken.
MULTIMODAL = tuple(f.whole for f in FAMILIES.values() if f.whole)


def drafter_of(model_type: str) -> Family | None:
    """The family that drafts for models of this type."""
    return next((family for family in FAMILIES.values() if family.drafts_for == model_type), None)


def check_export(family: Family, name: str, title: str) -> None:
    """Raise RecipeError for a family that an export of `Family.exports`, which people know as `title`, is not for."""
    if name not in family.exports:
        known = ", ".join(other.model_type for other in FAMILIES.values() if name in other.exports)
        raise RecipeError(f"{title} is for {known}, this model is {family.model_type}: export it to gguf or hf")


def role_of(tensor_name: str) -> str:
    """The role of a tensor. ConfigError for a name that no row of ROLES knows."""
    for pattern, role in ROLES:
        if re.search(pattern, tensor_name):
            return role
    raise ConfigError(f"{tensor_name}: a tensor of unknown role; intaglio does not know this architecture")
