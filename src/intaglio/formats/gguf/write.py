"""GGUF for llama.cpp: a PackedModel's codes and scales laid out as blocks, in one pass.

The file is complete: weights, hyperparameters and tokenizer. Nothing is fitted or rounded here, so
nothing can differ from what was trained; `verify` reads the file back with another reader.

Keys and tensor names are those of llama.cpp's `convert_hf_to_gguf.py`; what it computes with them is
in its `src/models/gemma{3,4,4-assistant}.cpp`. What llama.cpp hard-codes is checked against the config, and a
model it would compute differently is refused.
"""

from __future__ import annotations

import errno
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, size_label
from gguf.constants import RopeScalingType
from torch import Tensor

from intaglio.errors import ConfigError, RecipeError
from intaglio.formats.gguf.names import GGUF_ROPE_FACTORS, check_llamacpp_rope, gguf_name, gguf_rope_factors, in_gguf
from intaglio.formats.gguf.types import FILE_TYPES, GgmlType, stored_grid, stored_value, type_of
from intaglio.formats.gguf.write_tokenizer import add_tokenizer
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.numerics.layout import map_chunks, to_blocks
from intaglio.numerics.rounding import HALF_SIGNIFICANT_BITS
from intaglio.packed.model import PackedModel
from intaglio.packed.store import new_path
from intaglio.plan.family import ModelSpec, check_setting, check_settings
from intaglio.plan.plan import Plan, PlannedTensor
from intaglio.plan.rope import KINDS, rope_parameters

RUNTIME = "llama.cpp"


def export_gguf(
    packed: PackedModel,
    path: str | Path,
    *,
    replace: bool = False,
    on_progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> None:
    """Write `path`, a GGUF file that llama.cpp loads without any other file.

    on_progress is called after each tensor with the bytes of tensor data written and to be written.
    Raises RecipeError for grids that GGUF does not have, ConfigError for a folder without a tokenizer
    that llama.cpp can run and for a model that llama.cpp would compute differently; OutputError if the
    file cannot be written.
    """
    spec = packed.plan.model
    check_grids(packed.plan)
    check_supported(spec)
    with new_path(Path(path), replace=replace) as temporary:
        writer = GGUFWriter(temporary, spec.family.gguf_architecture)
        try:
            _announce_tensors(writer, packed.plan)
            _add_general(writer, packed)
            _add_architecture(writer, spec)
            add_tokenizer(writer, packed.path, spec)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            _write_tensors(writer, packed, on_progress)
        finally:
            writer.close()


def check_exportable(spec: ModelSpec, folder: str | Path) -> None:
    """Raise ConfigError where `export_gguf` would for this model, to know before it is trained.

    folder: the source model's, with its tokenizer.
    """
    check_supported(spec)
    add_tokenizer(GGUFWriter(None, spec.family.gguf_architecture), Path(folder), spec)


def check_grids(plan: Plan) -> None:
    """Raise RecipeError for a plan with grids that GGUF has no type for."""
    for tensor in filter(in_gguf, plan):
        if stored_grid(tensor) is None:
            lacks, instead = _lacking(tensor)
            raise RecipeError(
                f"{tensor.name}: recipe {plan.recipe.name} puts it on grid {tensor.grid.name}, {lacks}: "
                f"export to another format, or {instead}"
            )


def _lacking(tensor: PlannedTensor) -> tuple[str, str]:
    """The reason why GGUF has no type for a planned tensor, and what to do."""
    grid, rule = tensor.grid, f"weights.{tensor.rule.name}"
    if not isinstance(grid, BlockGrid):
        return "which GGUF does not have", "choose a recipe for GGUF, for example q4_0"
    if grid.step_bits > HALF_SIGNIFICANT_BITS:
        return "whose scales are float32, and GGUF's are float16", "quantize or train with --set channel_scales=bf16"
    return (
        f"with a scale for {grid.block_size} columns, which are no whole blocks of GGUF",
        f"choose another grid, for example --set {rule}.grid=q8_0",
    )


def check_supported(spec: ModelSpec) -> None:
    """Raise ConfigError where llama.cpp's code for this architecture does something else."""
    config, family = spec.layer_config, spec.family
    check_settings(spec, RUNTIME)
    if family.drafter:
        _check_drafter(spec)
    else:
        _check_kv_donors(config)
    if getattr(config, "hidden_size_per_layer_input", None):
        check_setting(spec, "vocab_size_per_layer_input", (config.vocab_size,), RUNTIME)
    if family.gguf_wide_scale is not None:
        wide = config.num_hidden_layers == family.gguf_wide_scale
        scalar = config.hidden_size // config.num_attention_heads if wide else _head_size(config, "full_attention")
        check_setting(spec, "query_pre_attn_scalar", (scalar,), RUNTIME)
    check_llamacpp_rope(spec)


def _check_drafter(spec: ModelSpec) -> None:
    """Raise ConfigError for a drafter that llama.cpp refuses, or whose target it would misread."""
    config = spec.layer_config
    if config.hidden_size == target_width(spec):
        raise ConfigError(
            f"hidden_size = {config.hidden_size} is the target's too (backbone_hidden_size): llama.cpp takes only a "
            "drafter of another width"
        )
    kinds = {"sliding_attention", "full_attention"}
    if set(config.layer_types) != kinds:
        raise ConfigError(
            f"layer_types {config.layer_types}: llama.cpp needs layers of both kinds in a drafter, {sorted(kinds)}"
        )


def target_width(spec: ModelSpec) -> int:
    """Width of the hidden states that a drafter reads and hands on: the width of the model that it drafts for."""
    return spec.tensor("post_projection.weight").shape[0]


def _check_kv_donors(config: Any) -> None:
    """llama.cpp takes KV of shared layers from the last two unshared ones: sliding, then full."""
    first_shared = config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0)
    unshared = config.layer_types[:first_shared]
    for kind in set(config.layer_types[first_shared:]):
        donor = first_shared - (2 if kind == "sliding_attention" else 1)
        if donor < 0 or unshared[donor] != kind or kind in unshared[donor + 1 :]:
            raise ConfigError(
                f"layer_types ends its unshared layers with {unshared[-2:]}: llama.cpp shares KV correctly only "
                "if they end with ['sliding_attention', 'full_attention']"
            )


def _announce_tensors(writer: GGUFWriter, plan: Plan) -> None:
    factors = gguf_rope_factors(plan.model)
    if factors is not None:
        writer.add_tensor_info(GGUF_ROPE_FACTORS, [len(factors)], np.dtype(np.float32), 4 * len(factors))
    for tensor in filter(in_gguf, plan):
        # gguf-py has no name for newer types, but only writes the number; of uint8 it would take the shape for bytes
        kind, shape, size = cast(Any, type_of(tensor)), tensor.spec.shape, _stored_bytes(tensor)
        writer.add_tensor_info(gguf_name(tensor.name), shape, np.dtype(np.int8), size, raw_dtype=kind)


def _stored_bytes(tensor: PlannedTensor) -> int:
    grid = stored_grid(tensor)
    assert grid is not None
    return grid.size_bytes(tensor.spec.shape)


def _add_general(writer: GGUFWriter, packed: PackedModel) -> None:
    matrices = Counter(type_of(tensor).name for tensor in filter(in_gguf, packed.plan) if len(tensor.spec.shape) > 1)
    writer.add_type(GGUFType.MODEL)
    name = str(packed.provenance.get("name") or packed.path.resolve().name)
    writer.add_name(name.encode("utf-8", "replace").decode("utf-8"))  # a folder's name may hold stray bytes
    writer.add_size_label(size_label(*writer.get_total_parameter_count()))
    writer.add_file_type(FILE_TYPES[matrices.most_common(1)[0][0]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_string("intaglio.plan", packed.plan.digest)
    writer.add_string("intaglio.recipe", packed.plan.recipe.name)
    if packed.lossy_blocks:
        writer.add_uint64("intaglio.lossy_blocks", packed.lossy_blocks)


def _add_architecture(writer: GGUFWriter, spec: ModelSpec) -> None:
    config, family = spec.layer_config, spec.family
    rope_full, rope_sliding = (rope_parameters(config)[kind] for kind in KINDS)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    widths = [tensor.shape[0] for tensor in spec.tensors if tensor.name.endswith(".mlp.gate_proj.weight")]
    writer.add_feed_forward_length(_same_or_each(widths))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_same_or_each([layer.num_key_value_heads for layer in config.per_layer_config]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(_head_size(config, "full_attention"))
    writer.add_value_length(_head_size(config, "full_attention"))
    writer.add_rope_freq_base(rope_full["rope_theta"])
    writer.add_rope_freq_base_swa(rope_sliding["rope_theta"])
    writer.add_sliding_window(config.sliding_window)
    for name in family.gguf_caps:  # also where there is none: without the key llama.cpp caps at a value of its own
        writer.add_float32(f"{family.gguf_architecture}.{name}", getattr(config, name) or 0.0)
    kinds = config.layer_types
    own = sliding_period(kinds) if family.gguf_period else [kind == "sliding_attention" for kind in kinds]
    writer.add_sliding_window_pattern(own)
    if family.full_heads:
        _add_full_heads(writer, config)
    if not family.gguf_rope_factors and rope_full["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope_full["factor"])
    if hasattr(config, "num_kv_shared_layers"):
        writer.add_shared_kv_layers(config.num_kv_shared_layers)
    if hasattr(config, "hidden_size_per_layer_input"):
        writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input or 0)
    if getattr(config, "enable_moe_block", False):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if family.drafter:
        writer.add_embedding_length_out(target_width(spec))
        writer.add_nextn_predict_layers(config.num_hidden_layers)


def _add_full_heads(writer: GGUFWriter, config: Any) -> None:
    full, sliding = _head_size(config, "full_attention"), _head_size(config, "sliding_attention")
    writer.add_key_length_swa(sliding)
    writer.add_value_length_swa(sliding)
    writer.add_rope_dimension_count(full)  # all of the head; the rope factors leave most of it unrotated
    writer.add_rope_dimension_count_swa(sliding)


def sliding_period(layer_types: list[str]) -> int:
    """The p of llama.cpp's pattern: in each p layers the last is full; with 0 none is."""
    for period in range(len(layer_types) + 1):
        pattern = [period == 0 or i % period < period - 1 for i in range(len(layer_types))]
        if pattern == [kind == "sliding_attention" for kind in layer_types]:
            return period
    raise ConfigError(f"layer_types {layer_types}: llama.cpp needs full attention in every n-th layer and nowhere else")


def _head_size(config: Any, layer_type: str) -> int:
    """Channels of an attention head in layers of this type, or in all where no layer has it."""
    index = config.layer_types.index(layer_type) if layer_type in config.layer_types else 0
    return int(config.per_layer_config[index].head_dim)


def _same_or_each(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _write_tensors(writer: GGUFWriter, packed: PackedModel, on_progress: Callable[[int, int], None]) -> None:
    total = sum(info.nbytes for info in writer.tensors[0].values())
    done = 0
    factors = gguf_rope_factors(packed.plan.model)
    if factors is not None:
        done += _write(writer, np.array(factors, dtype=np.float32))
    for tensor, value in packed:
        if in_gguf(tensor):
            done += _write(writer, _stored(tensor, value, packed.plan.model.family.norm_offset))
            on_progress(done, total)


def _stored(tensor: PlannedTensor, value: Quantized | Tensor, norm_offset: float) -> np.ndarray:
    """A planned tensor as its bytes: blocks of uint8 [R, bytes of a row], float32, or 16 bits of another float."""
    value = stored_value(tensor, value)
    if isinstance(value, Quantized):
        lead = value.codes.shape[:-1]
        blocks = np.empty((*lead, _stored_bytes(tensor) // lead.numel()), dtype=np.uint8)

        def fill(rows: slice, part: Quantized) -> None:
            blocks[rows] = to_blocks(part)

        deque(map_chunks(fill, value), maxlen=0)
        return blocks
    if tensor.spec.role == "norm" and norm_offset:  # adding zero would turn -0.0 into 0.0
        return (value.float() + norm_offset).numpy()  # in float32, as the model's own forward adds it
    kind = type_of(tensor)
    if kind is GgmlType.BF16:  # which numpy does not know
        return value.to(torch.bfloat16).view(torch.int16).numpy()
    return value.to(torch.float16 if kind is GgmlType.F16 else torch.float32).numpy()


def _write(writer: GGUFWriter, data: np.ndarray) -> int:
    try:
        writer.write_tensor_data(data)
    except OSError as error:  # numpy names no errno for a short write, which means a full disk
        raise OSError(error.errno or errno.ENOSPC, str(error)) from error
    return data.nbytes
