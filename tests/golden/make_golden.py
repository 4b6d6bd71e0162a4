"""Make `ggml.npz`: what ggml's own C code makes of a few hard rows, and how it reads them back.

    python tests/golden/make_golden.py

The file holds, for each kind of row, `KIND/values` (float32), and for each type `KIND/TYPE/blocks`
(uint8, from ggml_quantize_chunk) and `KIND/TYPE/values` (float32, from dequantize_row_*). With it the
layouts are tested where libggml cannot be installed. A rerun gives the same arrays.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support import ggml
from tests.support.samples import samples


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    for kind, values in samples(rows=2, columns=512).items():
        arrays[f"{kind}/values"] = values
        for ggml_type in ggml.TYPES:
            blocks = ggml.quantize(values, ggml_type)
            arrays[f"{kind}/{ggml_type}/blocks"] = blocks
            arrays[f"{kind}/{ggml_type}/values"] = ggml.dequantize(blocks, ggml_type)
    target = Path(__file__).with_name("ggml.npz")
    np.savez_compressed(target, **arrays)
    print(f"{target.name}: {len(arrays)} arrays, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
