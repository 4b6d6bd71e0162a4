"""Ask vLLM's own config classes about modules of a compressed-tensors folder: class, bits and group size, as JSON.

python vllm_schemes.py FOLDER MODULE...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_embedding import (
    CompressedTensorsEmbeddingWNA16Int,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe import (
    CompressedTensorsMoEMethod,
)
from vllm.model_executor.models.gemma4 import Gemma4ForCausalLM


class RoutedExperts(torch.nn.Module):
    """A module with the name of vLLM's class, and what its choice of a method reads."""

    moe_config = None
    ckpt_gate_proj_name, ckpt_up_proj_name, ckpt_down_proj_name = "gate_proj", "up_proj", "down_proj"


def scheme_of(config: CompressedTensorsConfig, name: str) -> list[Any] | None:
    """Choose as `get_quant_method` does for a linear, an embedding or a layer's experts of this name."""
    if name.endswith(".experts"):
        method: Any = CompressedTensorsMoEMethod.get_moe_method(config, RoutedExperts(), name)
        return [type(method).__name__, method.num_bits, method.group_size]
    if "embed_tokens" in name:
        found = config.get_scheme_dict(torch.nn.Embedding(1, 1), name)
        method = found and CompressedTensorsEmbeddingWNA16Int(found["weights"])
    else:
        method = config.get_scheme(torch.nn.Linear(1, 1), name)
    if not method:
        return None
    bits = method.num_bits if hasattr(method, "num_bits") else 32 // method.pack_factor
    group = method.group_size if method.group_size != -1 else None
    return [type(method).__name__, bits, group]


# which asks for a kernel on this machine; the method is the same with any
compressed_tensors_moe_wna16.select_wna16_moe_backend = lambda **config: (None, None)


def main() -> None:
    folder, *names = sys.argv[1:]
    config = CompressedTensorsConfig.from_config(
        json.loads((Path(folder) / "config.json").read_text("utf-8"))["quantization_config"]
    )
    config.packed_modules_mapping = Gemma4ForCausalLM.packed_modules_mapping
    print(json.dumps({name: scheme_of(config, name) for name in names}))


if __name__ == "__main__":
    main()
