"""HQQ, without any text: codes in groups along rows, with float16 scales and zero points.

python peer_hqq.py MODEL WORK OUT [BITS GROUP]        4 32 by default
"""

from __future__ import annotations

import torch
from artifact import DEVICE, Making, linears
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def main() -> None:
    making = Making()
    model = making.load()
    config = BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    for module in linears(model).values():
        layer = HQQLinear(module, config, compute_dtype=torch.float16, device=DEVICE, del_orig=False)
        module.weight.data = layer.dequantize().float()
    making.stop()
    making.save(model)
    making.finish("hqq", calibration_tokens=0, training_tokens=0, bits_a_weight=5.0)


if __name__ == "__main__":
    main()
