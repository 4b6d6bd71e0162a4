"""Names of tensors in llama.cpp, and the one tensor that it wants beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from intaglio.errors import ConfigError
from intaglio.plan.family import ModelSpec
from intaglio.plan.plan import PlannedTensor
from intaglio.plan.rope import RELATIVE, plain_rope, refusal, rope_parameters, ropes

# llama.cpp's names of the tensors of these families (gguf-py: TENSOR_NAMES).
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
# Gemma's placeholders are control tokens even where tokenizer.json does not call them special.
PLACEHOLDER = re.compile(r"<unused\d+>|<mask>")
# llama.cpp ends an answer at these by their text (llama-vocab.cpp: special_eog_ids), and at two more ids that a file
# may name beside the end token.
END_TEXTS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~[", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>"),
    *("<REPO>", "<reponame>", "<|file_sep|>"),
}
END_KEYS = ("eot", "eom")
# Sampling settings of generation_config.json, and the keys under `general.sampling` that llama.cpp reads.
SAMPLING_KEYS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
SUPPRESSED = "tokenizer.ggml.suppress_tokens"
# A drafter's clustered head: llama.cpp's converter leaves it out, and its graph computes the tied head over the
# whole vocabulary instead.
NOT_IN_GGUF = ("centroids", "token_ordering")


def in_gguf(tensor: PlannedTensor) -> bool:
    """Whether a GGUF holds this tensor of a text model or drafter."""
    return tensor.spec.role not in NOT_IN_GGUF


def gguf_name(tensor_name: str) -> str:
    """llama.cpp's name of a tensor of the state dict. Raises ConfigError where it has none."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", tensor_name)
    name = GGUF_LAYER_NAMES.get(layer[2]) if layer else GGUF_MODEL_NAMES.get(tensor_name)
    if name is None:
        raise ConfigError(f"{tensor_name}: llama.cpp has no tensor of this kind")
    return f"blk.{layer[1]}.{name}" if layer else name


def gguf_rope_factors(spec: ModelSpec) -> list[float] | None:
    """Values of the tensor `GGUF_ROPE_FACTORS`; None for a family whose GGUF has no such tensor.

    llama.cpp divides each angle of a full-attention head by its factor. Gemma 4 rotates only the first share of
    a head: 1e30 makes an angle zero. Any scaling that is no more than slower angles is written in the same way.
    Half as many values as the head has channels.
    """
    if not spec.family.gguf_rope_factors:
        return None
    config = spec.layer_config
    said = config.rope_parameters["full_attention"]
    rope = ropes(config)["full_attention"]
    plain = plain_rope(said["rope_theta"], len(rope.angles))
    factors = [own / angle if angle > 0 else 1e30 for own, angle in zip(plain.angles, rope.angles, strict=True)]
    # transformers computes angles in float32, whose rounding is not a factor
    scale = said.get("factor") or 1.0
    return [next((exact for exact in (1.0, scale) if abs(f / exact - 1) < RELATIVE), f) for f in factors]


def check_llamacpp_rope(spec: ModelSpec) -> None:
    """Raise ConfigError for a rotary embedding that llama.cpp computes otherwise than transformers.

    It takes factors of the angles for Gemma 4's full layers alone, and for Gemma 3's only one for all angles.
    """
    for layer_type, rope in ropes(spec.layer_config).items():
        said = rope_parameters(spec.layer_config)[layer_type]
        factor = 1.0
        if layer_type == "full_attention" and said["rope_type"] == "linear":
            factor = said["factor"]
        plain = plain_rope(said["rope_theta"], len(rope.angles), factor)
        free = layer_type == "full_attention" and spec.family.gguf_rope_factors
        if rope.by_length or rope.scaling != 1.0 or not (free or rope.same(plain)):
            raise ConfigError(refusal(layer_type, said, "llama.cpp"))


def gguf_end_keys(end_ids: Iterable[int], ids: dict[str, int], end_id: int | None) -> dict[str, int]:
    """Ids that END_KEYS have to name, so that llama.cpp ends at as many of `end_ids` as it can.

    ids: of every token by its text. end_id: that of the end token itself.
    """
    known = {index for text, index in ids.items() if text in END_TEXTS} | {end_id}
    return dict(zip(END_KEYS, [index for index in end_ids if index not in known], strict=False))


def gguf_template_name(name: str) -> str:
    """llama.cpp's key of a chat template that is not the default."""
    return re.sub(r"[^a-zA-Z0-9]", "_", name)
