"""GPTQ by GPTQModel: group 32, symmetric, no reordering, so that its codes are those of a GGUF file too.

python peer_gptqmodel.py MODEL WORK OUT [BITS GROUP]        4 32 by default
"""

from __future__ import annotations

import os

import torch
from artifact import DEVICE, Making, linears

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one core it asks itself for two workers, and refuses

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file


def decoded(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Code x scale in float32, [out, in]: GPTQModel's own decoding rounds to 16 bits, off the grid."""
    part = {key: tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
    assert (part["qzeros"] == 0x77777777).all(), "a zero point other than 8, which the file stores less 1"
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)[:, None]
    codes = ((part["qweight"][:, None] >> shifts) & 15).flatten(0, 1) - 8  # [in, out]
    return (codes * part["scales"].float()[part["g_idx"].long()]).T.contiguous()


def main() -> None:
    making = Making()
    config = QuantizeConfig(bits=4, group_size=32, sym=True, desc_act=False, device=DEVICE)
    model = GPTQModel.load(str(making.model_dir), config, backend=BACKEND.TORCH, dtype=torch.float32)
    making.start()
    text_NT = making.calibration()
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in text_NT], batch_size=8)
    making.stop()
    model.save(str(making.out / "gptq"))
    plain, tensors = making.load(), load_file(making.out / "gptq" / "model.safetensors")
    for name, module in linears(plain).items():
        module.weight.data = decoded(tensors, name)
    making.save(plain)
    making.finish("gptqmodel", calibration_tokens=text_NT.numel(), training_tokens=0, bits_a_weight=4.5)


if __name__ == "__main__":
    main()
