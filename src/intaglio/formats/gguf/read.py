"""Compares a GGUF file with a packed model: tensors by their bits, keys by their meaning to llama.cpp.

The keys are turned back into the facts of a transformers config. The tokenizer is compared in `verify_gguf_text`.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.gguf_reader import ReaderField, ReaderTensor
from torch import Tensor

from intaglio.errors import ConfigError
from intaglio.formats.facts import CONFIG, Facts, compare_facts, config_facts
from intaglio.formats.gguf.names import GGUF_ROPE_FACTORS, gguf_name, gguf_rope_factors, in_gguf
from intaglio.formats.gguf.read_text import compare_text
from intaglio.formats.gguf.types import GgmlType, stored_grid, type_of
from intaglio.formats.speech import read_speech
from intaglio.formats.tally import Tally
from intaglio.numerics.grid import GGUF_GRIDS, Quantized
from intaglio.numerics.layout import from_blocks, map_chunks
from intaglio.packed.model import PackedModel
from intaglio.plan.family import ModelSpec
from intaglio.plan.rope import Rope

NO_ANGLE = 1e29  # a factor beyond it stops a pair of channels
KNOWN = {int(kind) for kind in GGMLQuantizationType}
NEWER = {int(kind): kind for kind in GgmlType if kind not in KNOWN}  # types of ours that this gguf-py has no name for


def compare_gguf(packed: PackedModel, path: Path, tally: Tally) -> None:
    """Count into `tally` what the file holds and what of it differs from the packed model's text model."""
    reader = read_gguf(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    _compare_tensors(packed, found, tally)
    if packed.plan.static_scales:
        tally.unsaid.append("scales of activations and KV cache")
    try:
        keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path}: not a valid GGUF file ({error}): download or export it again") from error
    spec = packed.plan.model.text_only()
    architecture = spec.family.gguf_architecture
    _compare_identity(packed, keys, tally)
    config = {
        name.removeprefix(f"{architecture}."): keys.pop(name)
        for name in list(keys)
        if name.startswith(f"{architecture}.")
    }
    factors = np.asarray(found[GGUF_ROPE_FACTORS].data).tolist() if GGUF_ROPE_FACTORS in found else None
    compare_facts(CONFIG, model_facts(spec), _config_facts(config, factors, spec), tally)
    tally.unlike_facts += [
        f"{CONFIG}: {architecture}.{name} = {value}, which the model does not have" for name, value in config.items()
    ]
    speech = read_speech(packed.path, spec.layer_config.to_dict())
    if speech is not None:
        compare_text(speech, spec, keys, path, tally)


def _compare_identity(packed: PackedModel, keys: dict[str, Any], tally: Tally) -> None:
    """Architecture, plan, recipe and lossy blocks; a file of the text model alone has that model's plan."""
    plans = (packed.plan.digest, packed.plan.text_only().digest)
    expected = {
        "general.architecture": packed.plan.model.family.gguf_architecture,
        "intaglio.plan": plans[keys.get("intaglio.plan") == plans[1]],
        "intaglio.recipe": packed.plan.recipe.name,
        "intaglio.lossy_blocks": packed.lossy_blocks or None,
    }
    compare_facts(CONFIG, expected, {name: keys.pop(name, None) for name in expected}, tally)


def _compare_tensors(packed: PackedModel, found: dict[str, ReaderTensor], tally: Tally) -> None:
    factors = gguf_rope_factors(packed.plan.model)
    named = {gguf_name(tensor.name) for tensor in packed.plan if in_gguf(tensor)}
    expected = named | ({GGUF_ROPE_FACTORS} if factors else set())
    tally.missing += sorted(expected - set(found))
    tally.extra += sorted(set(found) - expected)
    if factors and _is_like(GgmlType.F32, (len(factors),), found.get(GGUF_ROPE_FACTORS), tally):
        _compare_floats(torch.tensor(factors), found[GGUF_ROPE_FACTORS], tally)
    for tensor, value in packed:  # one tensor in memory at a time
        stored = found.get(gguf_name(tensor.name)) if in_gguf(tensor) else None
        kind = type_of(tensor) if stored_grid(tensor) else None
        if stored is None or not _is_like(kind, tensor.spec.shape, stored, tally):
            continue
        if isinstance(value, Quantized):
            _compare_blocks(value, stored, tally)
        else:
            offset = packed.plan.model.family.norm_offset
            shifted = tensor.spec.role == "norm" and offset != 0  # adding zero would turn -0.0 into 0.0
            _compare_floats(value.float() + offset if shifted else value.float(), stored, tally)


def _is_like(kind: GgmlType | None, shape: tuple[int, ...], stored: ReaderTensor | None, tally: Tally) -> bool:
    """Whether the tensor is there, of this type and shape. It is counted; one that is unlike them is noted."""
    if stored is None:
        return False
    tally.counts["tensors"] += 1
    if int(stored.tensor_type) != kind or tuple(reversed(stored.shape)) != shape:
        tally.unlike.append(stored.name)
        return False
    return True


def _compare_blocks(value: Quantized, stored: ReaderTensor, tally: Tally) -> None:
    """Codes and scales by their bits. A row's only scale must stand in each of its blocks."""
    _, blocks = GGUF_GRIDS[stored.tensor_type.name]

    def read(rows: slice, part: Quantized) -> tuple[Quantized, Quantized]:
        return part, from_blocks(blocks, np.asarray(stored.data[rows]))

    for part, found in map_chunks(read, value):
        tally.compare("codes", part.codes, found.codes)
        repeat = found.scale.shape[-1] // part.scale.shape[-1]
        tally.compare("scales", part.scale.repeat_interleave(repeat, dim=-1), found.scale.to(part.scale.dtype))
        if part.super_scale is not None and found.super_scale is not None:
            tally.compare("scales", part.super_scale, found.super_scale)


def _compare_floats(expected: Tensor, stored: ReaderTensor, tally: Tally) -> None:
    found = torch.from_numpy(np.array(stored.data))
    if int(stored.tensor_type) == GgmlType.BF16:  # which gguf-py gives as bytes
        found = found.view(torch.bfloat16)
    tally.compare("values", expected, found.float())


# The keys as a config

# llama.cpp's keys, behind the architecture's name, that say what one fact of `config_facts` says.
FACT_OF_KEY = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "widths of MLPs",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.shared_kv_layers": "num_kv_shared_layers",
    "embedding_length_per_layer_input": "hidden_size_per_layer_input",
    "expert_count": "num_experts",
    "expert_used_count": "top_k_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
}


def model_facts(spec: ModelSpec) -> Facts:
    """The table of a model's config, with the facts that a GGUF states and a config does not."""
    facts = config_facts(spec.config)
    widths = [tensor.shape[0] for tensor in spec.tensors if tensor.name.endswith(".mlp.gate_proj.weight")]
    facts |= {"widths of MLPs": widths, "value head_dim": facts["head_dim"]}
    if spec.family.drafter:
        facts["layers that draft"] = facts["num_hidden_layers"]
    return facts


def _config_facts(keys: dict[str, Any], factors: list[float] | None, spec: ModelSpec) -> Facts:
    """Facts that llama.cpp reads from a file's keys for an architecture; takes them out of `keys`."""

    def take(name: str, default: Any = None) -> Any:
        return keys.pop(name, default)

    facts = {name: take(key) for key, name in FACT_OF_KEY.items()}
    layers = facts["num_hidden_layers"]
    count = layers if isinstance(layers, int) and 0 < layers < 10_000 else 0
    for name in ("widths of MLPs", "num_key_value_heads"):  # one number stands for all layers
        facts[name] = facts[name] if isinstance(facts[name], list) else [facts[name]] * count
    pattern = take("attention.sliding_window_pattern")
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        pattern = [pattern == 0 or layer % pattern < pattern - 1 for layer in range(count)]
    sliding = [bool(kind) for kind in pattern or []]
    full_width, full_value = take("attention.key_length"), take("attention.value_length")
    own_width, own_value = take("attention.key_length_swa", full_width), take("attention.value_length_swa", full_value)
    facts |= {
        "layer_types": [("full_attention", "sliding_attention")[kind] for kind in sliding],
        "head_dim": [own_width if kind else full_width for kind in sliding],
        "value head_dim": [own_value if kind else full_value for kind in sliding],
    }
    # without the key llama.cpp caps at a value of its own, and zero turns it off
    facts |= {name: take(name, absent) or None for name, absent in spec.family.gguf_caps.items()}
    if spec.family.drafter:
        facts |= {
            "backbone_hidden_size of the whole": take("embedding_length_out"),
            "layers that draft": take("nextn_predict_layers"),
        }
    turned = (take("rope.dimension_count", full_width), take("rope.dimension_count_swa", own_width))
    bases = (take("rope.freq_base", 10000.0), take("rope.freq_base_swa", 10000.0))
    kind, factor = take("rope.scaling.type", "linear"), take("rope.scaling.factor") or 1.0
    if kind not in ("linear", "none"):
        facts["rope scaling"] = kind
    if False not in sliding:
        return facts
    facts["rope of full_attention"] = _rope(bases[0], turned[0], 1.0 if kind == "none" else factor, factors)
    if True in sliding:
        facts["rope of sliding_attention"] = _rope(bases[1], turned[1], 1.0, None)
    return facts


def _rope(base: float, turned: Any, factor: float, factors: list[float] | None) -> Rope | None:
    """llama.cpp's: the i-th of n / 2 pairs by base^(-2i / n), divided by the factor and by the pair's own."""
    pairs = turned // 2 if isinstance(turned, int) and turned < 1 << 16 else 0
    own = factors or [1.0] * pairs
    if base <= 0 or len(own) != pairs:
        return None
    return Rope(tuple(0.0 if own[i] > NO_ANGLE else base ** (-i / pairs) / factor / own[i] for i in range(pairs)))


class _Reader(GGUFReader):
    """gguf-py's reader, with an end: its own reads past the end give nothing, forever if the file says so."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"the file ends at byte {len(self.data)}, before what it announces")
        return super()._get(offset, dtype, count, override_order)

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        """`tensors`, those of NEWER types too, whose rows are bytes, as gguf-py has them of any blocks."""
        kinds = [int(field.parts[4][0]) for field in fields]
        for field, kind in zip(fields, kinds, strict=True):
            if kind not in KNOWN and kind not in NEWER:
                raise ConfigError(
                    f"{self.data.filename}: {field.name} is of ggml type {kind}, which neither intaglio nor gguf-py "
                    f"{version('gguf')} knows: expected one of {', '.join(kind.name for kind in GgmlType)}"
                )
        super()._build_tensors(start_offs, [f for f, kind in zip(fields, kinds, strict=True) if kind in KNOWN])
        for field, kind in zip(fields, kinds, strict=True):
            if kind in NEWER:
                self.tensors.append(self._newer(NEWER[kind], start_offs, field))
        if len({tensor.name for tensor in self.tensors}) < len(fields):
            raise ValueError("two tensors have one name")

    def _newer(self, kind: GgmlType, start: int, field: ReaderField) -> ReaderTensor:
        """A tensor whose info gguf-py has parsed: its name, sizes from the last dimension on, type and offset."""
        (_, blocks), shape, offset = GGUF_GRIDS[kind.name], field.parts[3], start + int(field.parts[5][0])
        columns, *lead = shape.tolist()
        if columns % blocks.column_multiple:
            raise ValueError(f"{field.name}: rows of {columns} are no whole blocks of {blocks.column_multiple}")
        row = columns // blocks.column_multiple * blocks.bytes_per_block
        count = math.prod(lead)
        data = self._get(offset, np.uint8, count * row).reshape(*reversed(lead), row)
        return ReaderTensor(field.name, cast(Any, kind), shape, columns * count, count * row, offset, data, field)


def read_gguf(path: Path) -> GGUFReader:
    """gguf-py's reader of this file. ConfigError if it is missing, truncated or malformed."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file: expected a .gguf file or a transformers folder")
    try:
        return _Reader(path)
    except (ValueError, LookupError, ArithmeticError, TypeError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path}: not a valid GGUF file ({error}): download or export it again") from error
