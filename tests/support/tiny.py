"""Tiny random Gemma models: small enough to make anew in every test session.

Their shapes keep what is odd about the real ones: two head sizes, KV-shared layers with a double-wide
MLP, per-layer embeddings, a tied head.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from intaglio.packed.model import PackedModel
from intaglio.plan.families import FAMILIES
from intaglio.plan.family import build_meta_model
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.quantize import quantize

TOKENIZER = Path(__file__).parents[2] / "src/intaglio/tiny/model"
VOCABULARY = 4096  # of the bundled tokenizer

GEMMA4 = {
    "model_type": "gemma4_text",
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "global_head_dim": 128,
    "hidden_size_per_layer_input": 64,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    # llama.cpp takes the KV of shared layers from the last two unshared ones: sliding, then full
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 32,
    "max_position_embeddings": 2048,
    "final_logit_softcapping": 30.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

# Keys equal to values, no per-layer embeddings and no KV sharing, as in the larger models.
GEMMA4_DENSE = GEMMA4 | {
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}

# Experts beside the MLP: 16, since llama.cpp reads some counts as other models'.
GEMMA4_MOE = GEMMA4_DENSE | {
    "enable_moe_block": True,
    "num_experts": 16,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
}

GEMMA4_UNIFIED_TEXT = GEMMA4_DENSE | {"model_type": "gemma4_unified_text"}

GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

# A cap of attention scores so low that it changes those of random weights.
GEMMA2 = {
    "model_type": "gemma2",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 32,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 2048,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

# A text model between a vision and an audio tower, clipped linears and all.
MULTIMODAL = {
    "model_type": "gemma4",
    "text_config": GEMMA4,
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "position_embedding_size": 64,
        "use_clipped_linears": True,
    },
    "audio_config": {
        "model_type": "gemma4_audio",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "subsampling_conv_channels": [128, 4],
        "output_proj_dims": 96,
        "use_clipped_linears": True,
    },
    "image_token_id": 4090,
    "video_token_id": 4091,
    "audio_token_id": 4092,
    "boi_token_id": 4093,
    "eoi_token_id": 4094,
    "boa_token_id": 4095,
    "eoa_token_index": 4089,
}

# The same round a text model without encoders: patches and frames are embedded by linears.
UNIFIED = {key: value for key, value in MULTIMODAL.items() if key.endswith(("_id", "_index"))} | {
    "model_type": "gemma4_unified",
    "text_config": GEMMA4_UNIFIED_TEXT,
    "vision_config": {
        "model_type": "gemma4_unified_vision",
        "mm_embed_dim": 256,
        "mm_posemb_size": 16,
        "model_patch_size": 12,
        "num_soft_tokens": 16,
        "output_proj_dims": 256,
        "patch_size": 4,
        "pooling_kernel_size": 3,
    },
    "audio_config": {
        "model_type": "gemma4_unified_audio",
        "audio_embed_dim": 64,
        "audio_samples_per_token": 64,
        "hidden_size": 64,
        "output_proj_dims": 64,
    },
}

# Drafters: of GEMMA4 with a clustered head, and of GEMMA4_UNIFIED_TEXT with a plain one.
ASSISTANT = {
    "model_type": "gemma4_assistant",
    "backbone_hidden_size": 256,
    "use_ordered_embeddings": True,
    "num_centroids": 64,
    "centroid_intermediate_top_k": 4,
    "text_config": GEMMA4
    | {
        "hidden_size": 512,  # llama.cpp takes no drafter of its target's width
        "num_kv_shared_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "final_logit_softcapping": None,
    },
}
UNIFIED_ASSISTANT = ASSISTANT | {
    "model_type": "gemma4_unified_assistant",
    "use_ordered_embeddings": False,
    "text_config": ASSISTANT["text_config"]
    | {"model_type": "gemma4_unified_text", "attention_k_eq_v": True, "num_global_key_value_heads": 1},
}

# Changes of GEMMA4's rotary embeddings: of full and of sliding layers.
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "partial_rotary_factor": 1.0}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "half a share": ({"partial_rotary_factor": 0.5}, {}),
    "proportional, factor 8": ({"factor": 8.0}, {}),
    "linear, full layers": ({"rope_type": "linear", "factor": 8.0, "partial_rotary_factor": 1.0}, {}),
    "linear, sliding layers": ({}, {"rope_type": "linear", "factor": 2.0}),
    "llama3": ({"rope_type": "llama3", "factor": 8.0, "partial_rotary_factor": 1.0} | _LLAMA3, {}),
    "yarn": (_YARN, {}),
    "yarn without its factor on attention": (_YARN | {"attention_factor": 1.0}, {}),
    "dynamic": ({"rope_type": "dynamic", "factor": 8.0, "partial_rotary_factor": 1.0}, {}),
}


def with_rope(config: dict[str, Any], change: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """A Gemma 4 config with one of ROPES."""
    full = {"rope_theta": 1e6, "rope_type": "proportional", "partial_rotary_factor": 0.25} | change[0]
    sliding = {"rope_theta": 1e4, "rope_type": "default"} | change[1]
    return config | {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


# One of each kind that the family table knows.
FAMILY = {
    "gemma4": GEMMA4,
    "dense": GEMMA4_DENSE,
    "moe": GEMMA4_MOE,
    "unified-text": GEMMA4_UNIFIED_TEXT,
    "multimodal": MULTIMODAL,
    "unified": UNIFIED,
    "assistant": ASSISTANT,
    "unified-assistant": UNIFIED_ASSISTANT,
    "gemma3": GEMMA3,
    "gemma2": GEMMA2,
}


def build(config: dict[str, Any]) -> Any:
    """transformers' model of a config, with weights that are not set."""
    model = build_meta_model(config)
    return type(model)(model.config)


def make_checkpoint(folder: Path, config: dict[str, Any] = GEMMA4, *, seed: int = 0) -> Path:
    """Save a random bfloat16 model of this config, with the bundled tokenizer; return the folder."""
    model = build(config).to(torch.bfloat16)
    fill(model, seed)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    family = FAMILIES.get(config["model_type"])
    if family is not None and family.gguf_tokenizer.by_scores:
        complete_merges(folder / "tokenizer.json")
    return folder


def add_unused(folder: Path) -> list[str]:
    """Give the KV-shared layers of a saved GEMMA4 the tensors that published checkpoints keep.

    Returns the names of those that are carried along: not the norm.
    """
    path = folder / "model.safetensors"
    tensors = load_file(path)
    prefix = "model.language_model." if any("language_model" in name for name in tensors) else "model."
    unused = []
    for layer, donor in ((2, 0), (3, 1)):
        for name in ("k_proj", "v_proj", "k_norm"):
            source = tensors[f"{prefix}layers.{donor}.self_attn.{name}.weight"]
            tensors[f"{prefix}layers.{layer}.self_attn.{name}.weight"] = source.flip(0).contiguous()
            unused += [f"model.layers.{layer}.self_attn.{name}.weight"] if name != "k_norm" else []
    save_file(tensors, path, {"format": "pt"})
    return unused


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Random weights in a range where the model is not chaotic: small norms after each block."""
    generator = torch.Generator().manual_seed(seed)
    offset = FAMILIES[model.config.get_text_config().model_type].norm_offset
    # Gemma 3 divides attention scores by the root of the head size; so that heads attend to something:
    query_gain = 4.0 if hasattr(model.config, "query_pre_attn_scalar") else 1.0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("layer_scalar"):
            tensor.copy_(1 + 0.1 * noise)
        elif "norm" in name:
            gain = 0.15 if "post_" in name else query_gain if "q_norm" in name else 1.0
            tensor.copy_((1 + 0.1 * noise) * gain - offset)
        elif tensor.ndim == 2:
            tensor.copy_(noise * 0.06)
        elif name.endswith("token_ordering"):
            tensor.copy_(torch.randperm(len(tensor), generator=generator))


def complete_merges(tokenizer_json: Path) -> None:
    """List every split of every merged token, as tokenizers that come from SentencePiece do."""
    tokenizer = json.loads(tokenizer_json.read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    merged = dict.fromkeys(left + right for left, right in tokenizer["model"]["merges"])
    tokenizer["model"]["merges"] = [
        [token[:i], token[i:]]
        for token in merged
        for i in range(1, len(token))
        if token[:i] in vocabulary and token[i:] in vocabulary
    ]
    tokenizer_json.write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")


def pack(checkpoint: Path, target: Path, recipe: Recipe | str = "q4_0") -> PackedModel:
    """Quantize a checkpoint by its recipe's fit, without training."""
    return quantize(checkpoint, make_plan(checkpoint, recipe), target)
