"""Checkpoints that someone else trained: weights on a grid of their choice, saved as plain floats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.packed.model import PackedModel
from intaglio.packed.write import write_packed
from intaglio.plan.plan import Plan
from intaglio.train.quantize import fit_tensor
from tests.support.tiny import GEMMA4_DENSE, make_checkpoint

SMALL = GEMMA4_DENSE | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _extremum(blocks: Tensor) -> Tensor:
    return blocks.gather(1, blocks.abs().argmax(1, keepdim=True))


def _absmax(blocks: Tensor) -> Tensor:
    return blocks.abs().amax(1, keepdim=True)


def _free(blocks: Tensor) -> Tensor:
    ratio = torch.rand(len(blocks), 1, generator=torch.Generator().manual_seed(len(blocks)))
    return _absmax(blocks) / 8 * (0.85 + 0.2 * ratio)


# The grids of a block of 32 in the table of the QAT release: how a quantizer gets its scale, and its lowest code.
RULES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "extremum-8": (lambda blocks: _extremum(blocks) / -8, -8),
    "absmax-8": (lambda blocks: _absmax(blocks) / 8, -8),
    "absmax-7.5": (lambda blocks: _absmax(blocks) / 7.5, -8),
    "absmax-7": (lambda blocks: _absmax(blocks) / 7, -7),
    "free": (_free, -8),
}


def put_on_grid(values_NK: Tensor, rule: str, scale_dtype: str) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and scales [N, 1], float32, as that quantizer has them; its scale is stored before it divides."""
    make, lowest = RULES[rule]
    scale = make(values_NK.float()).to(DTYPES[scale_dtype]).float()
    return (values_NK.float() / scale).round().clamp(lowest, 7), scale


Originals = dict[str, tuple[Tensor, Tensor]]


def make_stranger(
    folder: Path, rule: str, *, scale: str = "bf16", stored: str = "bf16", config: dict[str, Any] = SMALL
) -> Originals:
    """Save a random model whose linears lie on a grid; return their codes [N, 32] and scales [N, 1]."""
    make_checkpoint(folder, config)
    path, originals = folder / "model.safetensors", {}
    tensors = load_file(path)
    for name, weight in tensors.items():
        if weight.ndim == 2 and "embed" not in name and "model_projection" not in name:
            more_bits = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) * 2**-8
            latent = (weight.float() * (1 + more_bits)).reshape(-1, 32)  # not the bfloat16 that it comes from
            originals[name] = put_on_grid(latent, rule, scale)
            codes, scales = originals[name]
            tensors[name] = (codes * scales).to(DTYPES[stored]).reshape(weight.shape)
        else:
            tensors[name] = weight.to(DTYPES[stored])
    save_file(tensors, path, {"format": "pt"})
    return originals


def pack_originals(checkpoint: Path, plan: Plan, originals: Originals, out: Path) -> PackedModel:
    """A packed model of the very codes and scales; what has none is fitted by the recipe."""
    tensors = load_file(checkpoint / "model.safetensors")
    with write_packed(out, plan, assets=checkpoint, provenance={"name": checkpoint.name}) as writer:
        for tensor in plan:
            if tensor.name not in originals:
                writer.add(tensor.name, fit_tensor(tensors[tensor.name], plan, tensor.name))
                continue
            codes, scale = originals[tensor.name]
            assert isinstance(tensor.grid, BlockGrid)
            scale = torch.where((codes == 0).all(1, keepdim=True), torch.tensor(-0.0), scale)
            rows = tensor.spec.shape[0]
            writer.add(
                tensor.name,
                Quantized(
                    tensor.grid, codes.to(torch.int8).reshape(rows, -1), scale.reshape(rows, -1).to(torch.float16)
                ),
            )
    return PackedModel.open(out)
