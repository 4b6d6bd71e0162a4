"""Weights that are hard to quantize."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def samples(rows: int = 8, columns: int = 512) -> dict[str, np.ndarray]:
    """float32 [rows, columns] of several kinds, the same in every run."""
    rng = np.random.default_rng(20)
    shape = (rows, columns)
    normal = rng.standard_normal(shape, dtype=np.float32)
    zeros = normal.copy()
    zeros[:, : columns // 2] = 0
    zeros[:, columns // 2 : columns // 2 + 40] = -0.0
    half_zero = np.where(rng.random(shape) < 0.97, 0, normal)
    return {
        "normal": normal,
        "weight-like": normal * np.float32(0.02),
        "heavy-tailed": rng.standard_t(2, shape).astype(np.float32),
        "ties": (rng.integers(-16, 17, shape) * 0.5).astype(np.float32),
        "two values": rng.choice([-1.0, 1.0], shape).astype(np.float32),
        "positive": np.abs(normal),
        "zero": np.zeros(shape, dtype=np.float32),
        "zero blocks": zeros,
        "sparse": half_zero.astype(np.float32),
        "tiny": normal * np.float32(1e-6),
        "half subnormal": normal * np.float32(1e-7),
        "below half": normal * np.float32(1e-10),
    }


def forget(tokenizer: dict[str, Any], ids: Iterable[int]) -> None:
    """Take tokens, and all that are merged of them, out of what a tokenizer.json holds; their ids stay free."""
    model = tokenizer["model"]
    gone = {text for text, index in model["vocab"].items() if index in set(ids)}
    while True:
        broken = {"".join(pair) for pair in model["merges"] if gone & {*pair, "".join(pair)}} | gone
        if broken == gone:
            break
        gone = broken
    model["merges"] = [pair for pair in model["merges"] if not gone & {*pair, "".join(pair)}]
    model["vocab"] = {text: index for text, index in model["vocab"].items() if text not in gone}
