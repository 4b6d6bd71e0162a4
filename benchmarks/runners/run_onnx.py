"""The two sessions of an ONNX folder in ONNX Runtime, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from runner import Runtime, run

DTYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8}
PREFILL = 64  # tokens of a window that are read at once; the rest one by one, as decoding does


class Sessions:
    """Embeddings and decoder, with the cache that goes from one step to the next."""

    def __init__(self, folder: Path) -> None:
        where = folder / "onnx"
        provider = ["CPUExecutionProvider"]
        self.embed = onnxruntime.InferenceSession(where / "embed_tokens_q4.onnx", providers=provider)
        self.decode = onnxruntime.InferenceSession(where / "decoder_model_merged_q4.onnx", providers=provider)
        self.past: dict[str, np.ndarray] = {}
        self.length = 0

    def clear(self) -> None:
        """Forget all tokens."""
        self.length = 0
        self.past = {
            value.name: np.zeros([1, value.shape[1], 0, value.shape[3]], DTYPES[value.type])
            for value in self.decode.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def step(self, ids: np.ndarray, keep: int = 0) -> np.ndarray:
        """Logits [kept, V] of the last tokens, or of all; they join the cache."""
        new, self.length = len(ids), self.length + len(ids)
        feed: dict[str, Any] = _by_name(self.embed, {"input_ids": ids[None].astype(np.int64)})
        feed["attention_mask"] = np.ones((1, self.length), np.int64)
        feed["position_ids"] = np.arange(self.length - new, self.length)[None]
        feed["num_logits_to_keep"] = np.array(keep, np.int64)
        found = _by_name(self.decode, feed | self.past)
        self.past = {
            f"past_key_values{name.removeprefix('present')}": x for name, x in found.items() if name != "logits"
        }
        return found["logits"][0]


def _by_name(session: Any, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def load(path: Path) -> Runtime:
    sessions = Sessions(path)

    def logits(ids: np.ndarray) -> np.ndarray:
        sessions.clear()
        parts = [ids[:PREFILL], *np.split(ids[PREFILL:], max(1, len(ids) - PREFILL))]
        return np.concatenate([sessions.step(part) for part in parts if len(part)])

    def greedy(prompt: np.ndarray, count: int) -> list[int]:
        sessions.clear()
        tokens, following = [], prompt
        for _ in range(count):
            tokens.append(int(sessions.step(following, keep=1)[-1].argmax()))
            following = np.array(tokens[-1:])
        return tokens

    return Runtime(f"onnxruntime {onnxruntime.__version__}", logits, greedy)


if __name__ == "__main__":
    run(load)
