"""A folder that transformers reads, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from runner import Runtime, run


def load(path: Path) -> Runtime:
    return runtime_of(
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    )


def runtime_of(model: Any) -> Runtime:
    """A model that transformers has loaded."""

    @torch.no_grad()
    def logits(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids).long()[None], use_cache=False).logits[0].float().numpy()

    @torch.no_grad()
    def greedy(prompt: np.ndarray, count: int) -> list[int]:
        model.generation_config.eos_token_id = None  # the end of a text is no reason to stop
        ids = torch.from_numpy(prompt).long()[None]
        plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return model.generate(ids, max_new_tokens=count, **plain)[0, ids.shape[1] :].tolist()

    return Runtime(f"transformers {transformers.__version__}", logits, greedy)


if __name__ == "__main__":
    run(load)
