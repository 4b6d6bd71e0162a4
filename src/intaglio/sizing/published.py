"""Memory figures that Google publishes for the family, shown beside the computed ones.

The figures are those of Google's model overview, in GB as printed there. The columns BF16, SFP8 and Q4_0
are a rule of thumb, parameters x {2, 1, 0.5} bytes x 1.2 / 2^30. The mobile columns count what a phone keeps
resident.
"""

from __future__ import annotations

PUBLISHED_GB: dict[str, dict[str, float]] = {
    "gemma-4-e2b": {"bf16": 11.4, "sfp8": 5.7, "q4_0": 2.9, "mobile": 1.1, "mobile_text": 0.84},
    "gemma-4-e4b": {"bf16": 17.9, "sfp8": 8.9, "q4_0": 4.5, "mobile": 2.5, "mobile_text": 2.2},
    "gemma-4-12b": {"bf16": 26.7, "sfp8": 13.4, "q4_0": 6.7},
    "gemma-4-26b-a4b": {"bf16": 57.7, "sfp8": 28.8, "q4_0": 14.4},
    "gemma-4-31b": {"bf16": 69.9, "sfp8": 34.9, "q4_0": 17.5},
}

# Things that the published figures leave out, for whoever plans with them.
LEFT_OUT = (
    "BF16 and Q4_0 are a rule of thumb, parameters x {2, 0.5} bytes x 1.2 in units of 2^30, and no file's size.",
    "Q4_0 leaves out the scale of each block of 32 (4.5 bits a weight, not 4) and that embeddings have 6.56 bits. "
    "Half of E2B is embeddings, so its file is larger than the figure with its 20% on top.",
    "Mobile is what stays resident. Per-layer and input embeddings are not in it: they are mapped from a larger file.",
    "None has a KV cache, which grows with context and batch: see intaglio plan MODEL --context.",
)
