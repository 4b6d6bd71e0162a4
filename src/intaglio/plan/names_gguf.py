"""What llama.cpp calls each tensor, and the one that it wants beside them."""

from __future__ import annotations

import re

from intaglio.errors import ConfigError
from intaglio.plan.family import ModelSpec
from intaglio.plan.plan import PlannedTensor

# What llama.cpp calls the tensors of these families (gguf-py: TENSOR_NAMES).
GGUF_MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "pre_projection.weight": "nextn.pre_projection.weight",
    "post_projection.weight": "nextn.post_projection.weight",
}
GGUF_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
}
GGUF_ROPE_FACTORS = "rope_freqs.weight"
# A drafter's clustered head: llama.cpp's converter leaves it out, and its graph computes the tied head over the
# whole vocabulary instead.
NOT_IN_GGUF = ("centroids", "token_ordering")


def in_gguf(tensor: PlannedTensor) -> bool:
    """Whether a GGUF holds this tensor of a text model or drafter."""
    return tensor.spec.role not in NOT_IN_GGUF


def gguf_name(tensor_name: str) -> str:
    """What llama.cpp calls a tensor of the state dict. ConfigError where it has no name for it."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", tensor_name)
    name = GGUF_LAYER_NAMES.get(layer[2]) if layer else GGUF_MODEL_NAMES.get(tensor_name)
    if name is None:
        raise ConfigError(f"{tensor_name}: llama.cpp has no tensor of this kind")
    return f"blk.{layer[1]}.{name}" if layer else name


def gguf_rope_factors(spec: ModelSpec) -> list[float] | None:
    """Values of the tensor `GGUF_ROPE_FACTORS`; None for a family whose GGUF has no such tensor.

    Gemma 4 rotates only the first share of a full-attention head. llama.cpp divides each angle by
    its factor, so 1e30 makes it zero. Half as many values as the head has channels.
    """
    if not spec.family.gguf_architecture.startswith("gemma4"):
        return None
    config = spec.layer_config
    width = config.per_layer_config[config.layer_types.index("full_attention")].head_dim
    share = config.rope_parameters["full_attention"].get("partial_rotary_factor", 1.0)
    rotated = int(share * width // 2)
    return [1.0] * rotated + [1e30] * (width // 2 - rotated)
