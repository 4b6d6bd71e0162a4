"""vLLM's W4A16 kernel for CPUs, alone: which share of its 16-bit results are the exact sums, rounded or cut off, as JSON.

python vllm_kernel.py
"""

from __future__ import annotations

import json

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.kernels.linear.mixed_precision.cpu import _get_isa_hint
from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32
from vllm.scalar_type import scalar_types

TOKENS, COLUMNS, ROWS, GROUP = 64, 2048, 512, 32


def measure(dtype: torch.dtype) -> dict[str, float]:
    """Random codes, scales of five significant bits, as recipe q4_0 has them, and activations in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    codes_CR = torch.randint(0, 16, (COLUMNS, ROWS), generator=generator, dtype=torch.int32)
    mantissa, exponent = torch.frexp(torch.randn(COLUMNS // GROUP, ROWS, generator=generator) * 0.02)
    scale = torch.ldexp((mantissa * 32).round() / 32, exponent)
    x = torch.randn(TOKENS, COLUMNS, generator=generator).to(dtype)
    weight = (codes_CR - 8).double() * scale.double().repeat_interleave(GROUP, 0)
    exact = x.double() @ weight
    found = {"w4a16": kernel(x, codes_CR, scale.to(dtype)), "dense": x @ weight.to(dtype)}
    shares = {f"{name}_rounded": float((y == exact.to(dtype)).double().mean()) for name, y in found.items()}
    if dtype == torch.bfloat16:
        cut = (exact.float().view(torch.int32) & -(1 << 16)).view(torch.float32)
        shares |= {f"{name}_cut_off": float((y.float() == cut).double().mean()) for name, y in found.items()}
    return shares


def kernel(x: Tensor, codes_CR: Tensor, scale: Tensor) -> Tensor:
    """Prepare weights as CPUWNA16LinearKernel does, in blocks of 16 rows, and call it."""
    words = pack_quantized_values_into_int32(codes_CR, scalar_types.uint4b8, 1)
    words = words.view(COLUMNS, -1, 2).permute(1, 0, 2).reshape(-1, COLUMNS * 2).contiguous()
    return ops.cpu_gemm_wna16(
        input=x, q_weight=words, scales=scale, zeros=None, bias=None, pack_factor=8, isa_hint=_get_isa_hint(x.dtype)
    )


if __name__ == "__main__":
    print(json.dumps({str(dtype).removeprefix("torch."): measure(dtype) for dtype in (torch.bfloat16, torch.float16)}))
