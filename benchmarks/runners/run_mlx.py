"""An MLX folder in mlx-lm, on the CPU, in float32."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import load as load_model
from mlx_lm.models.cache import make_prompt_cache
from runner import Runtime, run


def load(path: Path) -> Runtime:
    mx.set_default_device(mx.cpu)
    model, _ = load_model(str(path))
    model.set_dtype(mx.float32)  # scales and floats of 16 bits become float32: exact, and so is the rest

    def logits(ids: np.ndarray) -> np.ndarray:
        return np.array(model(mx.array(ids)[None])[0].astype(mx.float32))

    def greedy(prompt: np.ndarray, count: int) -> list[int]:
        cache, tokens, last = make_prompt_cache(model), [], mx.array(prompt)[None]
        for _ in range(count):
            last = model(last, cache=cache)[:, -1:].argmax(-1)
            tokens.append(int(last.item()))
        return tokens

    return Runtime(f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}", logits, greedy)


if __name__ == "__main__":
    run(load)
