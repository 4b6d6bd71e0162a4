"""A folder that transformers reads, in float32."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import transformers
from runner import Runtime, run

os.environ["HF_HUB_OFFLINE"] = "1"


def load(path: Path) -> Runtime:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()

    @torch.no_grad()
    def logits(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids).long()[None], use_cache=False).logits[0].float().numpy()

    @torch.no_grad()
    def greedy(prompt: np.ndarray, count: int) -> list[int]:
        ids = torch.from_numpy(prompt).long()[None]
        plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "eos_token_id": None}
        return model.generate(ids, max_new_tokens=count, **plain)[0, ids.shape[1] :].tolist()

    return Runtime(f"transformers {transformers.__version__}", logits, greedy)


if __name__ == "__main__":
    run(load)
