"""A GGUF file in llama.cpp."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import llama_cpp
import numpy as np
from runner import Runtime, run


def load(path: Path) -> Runtime:
    model = llama_cpp.Llama(str(path), n_ctx=512, logits_all=True, verbose=False)

    def logits(ids: np.ndarray) -> np.ndarray:
        model.reset()
        model.eval(ids.tolist())
        return model.scores[: len(ids)].copy()

    def greedy(prompt: np.ndarray, count: int) -> list[int]:
        model.reset()
        model.eval(prompt.tolist())
        tokens: list[int] = []
        for _ in range(count):
            tokens.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(tokens[-1:])
        return tokens

    return Runtime(f"llama.cpp of llama-cpp-python {version('llama-cpp-python')}", logits, greedy)


if __name__ == "__main__":
    run(load)
