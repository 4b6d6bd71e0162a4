"""QAT with torchao's fake quantizers, group 32: all weights learn, in batches of 4 x 256 tokens, by AdamW.

    python peer_torchao.py MODEL WORK OUT LOSS BASE TOKENS RATE

LOSS  "cross_entropy", as Axolotl's and Unsloth's recipes have it, or "kl" to the original, over the full vocabulary
BASE  "int4": Int4WeightOnlyConfig, which both use; asymmetric, a scale and a zero point for each group
      "intx": IntxWeightOnlyConfig of 4 bits; symmetric, as Q4_0 is
The rate rises over 3% of the steps and falls to zero along a cosine. torchao converts the result by its own step
"convert"; where it cannot do this on a CPU, the reason is in artifact.json and the values are the fake quantizer's.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from artifact import Making, linears
from torch import Tensor, nn
from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.qat import QATConfig

BATCH = 4
BASES = {
    "int4": Int4WeightOnlyConfig(group_size=32),
    "intx": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


def loss_of(model: nn.Module, teacher: nn.Module | None, tokens_BT: Tensor) -> Tensor:
    logits_MV = model(input_ids=tokens_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    if teacher is None:
        return F.cross_entropy(logits_MV, tokens_BT[:, 1:].flatten())
    with torch.no_grad():
        target_MV = teacher(input_ids=tokens_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    return F.kl_div(logits_MV.log_softmax(-1), target_MV.log_softmax(-1), log_target=True, reduction="batchmean")


def train(model: nn.Module, teacher: nn.Module | None, text_NT: Tensor, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0)
    order = np.random.default_rng(0).permutation(len(text_NT))
    steps = len(text_NT) // BATCH
    for step in range(steps):
        share = min(1, (step + 1) / max(1, 0.03 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate * share
        loss = loss_of(model, teacher, text_NT[order[step * BATCH : (step + 1) * BATCH]].to(model.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 16 == 0:
            print(f"step {step} of {steps}: {float(loss):.4f}", flush=True)


def converted(model: nn.Module, base: str) -> tuple[nn.Module, str | None]:
    """A model with decoded weights in plain linears, and torchao's words where its own conversion fails."""
    shipped = copy.deepcopy(model)
    try:
        quantize_(shipped, QATConfig(BASES[base], step="convert"), is_ours)
        values, refusal = {name: m.weight.dequantize() for name, m in linears(shipped).items()}, None
    except Exception as error:
        values, refusal = {n: m.weight_fake_quantizer(m.weight) for n, m in linears(model).items()}, repr(error)[:300]
    quantize_(model, QATConfig(step="convert"), is_ours)
    for name, module in linears(model).items():
        module.weight = nn.Parameter(values[name].detach().float())
    return model, refusal


def is_ours(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and ".layers." in name


def main() -> None:
    making = Making()
    loss, base, tokens, rate = making.options
    teacher = making.load() if loss == "kl" else None
    model = making.load()
    text_NT = torch.from_numpy(np.load(making.work / "training.npy"))
    text_NT = text_NT[: int(tokens) // text_NT.shape[1]]
    quantize_(model, QATConfig(BASES[base], step="prepare"), is_ours)
    train(model, teacher, text_NT, float(rate))
    making.stop()
    latents = copy.deepcopy(model)
    quantize_(latents, QATConfig(step="convert"), is_ours)
    latents.to(torch.bfloat16).save_pretrained(making.out / "latents")  # for llama.cpp's own quantizer
    making.add_tokenizer(making.out / "latents")
    model, refusal = converted(model, base)
    making.save(model)
    facts = {"bits_a_weight": 5.0 if base == "int4" else 4.5, "rate": float(rate), "conversion": refusal}
    making.finish("torchao", calibration_tokens=0, training_tokens=text_NT.numel(), **facts)


if __name__ == "__main__":
    main()
