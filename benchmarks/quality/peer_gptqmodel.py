"""GPTQ by GPTQModel: group 32, symmetric, no reordering, so that its codes are those of a GGUF file too.

python peer_gptqmodel.py MODEL WORK OUT [BITS GROUP]        4 32 by default
"""

from __future__ import annotations

import os

import torch
from artifact import DEVICE, Making, linears

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one core it asks itself for two workers, and refuses

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


def main() -> None:
    making = Making()
    config = QuantizeConfig(bits=4, group_size=32, sym=True, desc_act=False, device=DEVICE)
    model = GPTQModel.load(str(making.model_dir), config, backend=BACKEND.TORCH, dtype=torch.float32)
    making.start()
    text_NT = making.calibration()
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in text_NT], batch_size=8)
    making.stop()
    model.save(str(making.out / "gptq"))
    plain, packed = making.load(), GPTQModel.load(str(making.out / "gptq"), backend=BACKEND.TORCH, device="cpu").model
    modules = dict(packed.named_modules())
    for name, module in linears(plain).items():
        module.weight.data = modules[name].dequantize_weight().T.float()
    making.save(plain)
    making.finish("gptqmodel", calibration_tokens=text_NT.numel(), training_tokens=0, bits_a_weight=4.5)


if __name__ == "__main__":
    main()
