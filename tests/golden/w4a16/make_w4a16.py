"""Write pack.safetensors: codes and how compressed-tensors packs them. Needs `pip install compressed-tensors==0.17.0`.

python tests/golden/w4a16/make_w4a16.py
"""

from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

if __name__ == "__main__":
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-8, 8, (6, 96), generator=generator, dtype=torch.int8)
    packed = pack_to_int32(codes, 4)
    save_file({"codes": codes, "packed": packed}, Path(__file__).parent / "pack.safetensors")
