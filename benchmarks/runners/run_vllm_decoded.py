"""A folder in vLLM on the CPU, with plain PyTorch in place of kernels that only a GPU has.

Config, schemes, loader, router, attention and static activation scales are vLLM's; its emulation decodes
the experts. Put here in place of kernels: 2- and 8-bit linears (and 4-bit ones where vLLM's CPU kernel is
switched off with VLLM_DISABLED_KERNELS=CPUWNA16LinearKernel), the packed embeddings' lookup, and the
multiplication by decoded experts. So it shows what vLLM makes of a file, not what a GPU kernel computes.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from run_vllm import load  # first: it sets vLLM's environment
from runner import run
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.kernels.linear import MPLinearKernel, register_linear_kernel
from vllm.model_executor.layers.fused_moe.experts import int4_emulation_moe
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_embedding
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as moe,
)
from vllm.platforms import current_platform


def decoded(words: Tensor, scale: Tensor, bits: int) -> Tensor:
    """[R, C] in the scale's dtype, of words [R, C x bits / 32] and scales [R, groups]."""
    columns = words.shape[1] * 32 // bits
    codes = unpack_from_int32(words, bits, torch.Size((len(words), columns)))
    return codes.to(scale.dtype) * scale.repeat_interleave(columns // scale.shape[1], dim=1)


class DecodedLinear(MPLinearKernel):
    """Stands behind vLLM's own kernels for the CPU, which know 4 bits."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        return not c.zero_points, "zero points"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        words, scale, _ = self._get_weight_params(layer)
        layer.decoded = decoded(words.data, scale.data, self.config.weight_type.size_bits)

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(x, layer.decoded, bias)


def gathered(ids: Tensor, words: Tensor, scale: Tensor, hidden: int, bits: int) -> Tensor:
    return decoded(words[ids], scale[ids], bits)


class DecodedExperts(CPUUnquantizedExperts):
    """vLLM's experts in floats, on weights that its emulation backend has decoded."""

    def __init__(self, moe_config: Any, quant_config: Any):
        super().__init__(moe_config, quant_config)
        for weight in (self.quant_config._w1, self.quant_config._w2):
            weight.dtype = weight.scale = None


def set_up_experts(
    self: Any, layer: torch.nn.Module, vllms: Any = moe.CompressedTensorsWNA16MoEMethod._setup_kernel
) -> None:
    vllms(self, layer)
    for name in ("w13", "w2"):
        weight = getattr(layer, f"{name}_weight_packed").to(self.moe.in_dtype)
        delattr(layer, f"{name}_weight")
        layer.register_parameter(f"{name}_weight", Parameter(weight, requires_grad=False))
    self.moe_kernel.fused_experts.process_weights_after_loading(layer)


register_linear_kernel(DecodedLinear, current_platform._enum, "mp")
compressed_tensors_embedding._dequant_gather_triton = gathered
int4_emulation_moe.Int4EmulationTritonExperts = DecodedExperts
moe.select_wna16_moe_backend = lambda **config: (WNA16MoEBackend.EMULATION, DecodedExperts)
moe.CompressedTensorsWNA16MoEMethod._setup_kernel = set_up_experts

if __name__ == "__main__":
    run(load)
