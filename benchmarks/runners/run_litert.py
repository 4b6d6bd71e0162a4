"""A .litertlm bundle in LiteRT's interpreter (XNNPACK), token by token through the caches of its decode signature.

LiteRT-LM drives the same models with the same kernels, but takes and gives text alone; so the speed is LiteRT-LM's, and
what it writes is compared as text (`litert_lm_text.py`).
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import litert_lm
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from litert_lm_builder import litertlm_builder
from runner import Runtime, run

MASKED = np.float32(-1e9)


class Bundle:
    """The models of a bundle: one token in, its logits out."""

    def __init__(self, path: Path):
        with TemporaryDirectory() as folder:
            litertlm_builder.unpack(str(path), folder)
            self.decode = _signature(Path(folder), "prefill_decode", "decode")
            self.embedders = {
                "embeddings": _signature(Path(folder), "embedder", "embedder"),
                "per_layer_embeddings": _signature(Path(folder), "per_layer_embedder", "per_layer_embedder"),
            }
        self.inputs = self.decode.get_input_details()
        self.context_tokens = int(self.inputs["mask"]["shape"][-1])
        self.clear()

    def clear(self) -> None:
        caches = {name: detail for name, detail in self.inputs.items() if name.startswith("kv_cache")}
        self.caches = {name: np.zeros(detail["shape"], detail["dtype"]) for name, detail in caches.items()}
        self.position = 0

    def read(self, token: int) -> np.ndarray:
        """Logits [V] after one more token."""
        mask = np.full((1, 1, 1, self.context_tokens), MASKED)
        mask[..., : self.position + 1] = 0
        ids = np.array([[token]], np.int32)
        found = {name: model(token_ids=ids)["embeddings"] for name, model in self.embedders.items() if model}
        output = self.decode(**found, input_pos=np.array([self.position], np.int32), mask=mask, **self.caches)
        self.caches = {name: output[name] for name in self.caches}
        self.position += 1
        return output["logits"][0, 0]


def _signature(folder: Path, model: str, key: str) -> Any:
    """The runner of a model's signature; None if the bundle has no such model."""
    found = list(folder.glob(f"*tf_lite_{model}.tflite"))
    return Interpreter(model_content=found[0].read_bytes(), num_threads=2).get_signature_runner(key) if found else None


def tokens_per_second(path: Path, count: int = 40) -> float:
    """Figures of LiteRT-LM's engine, after a first answer."""
    with litert_lm.Engine(str(path), backend=litert_lm.Backend.CPU()) as engine:
        for _ in range(2):
            with engine.create_session(apply_prompt_template=False, max_output_tokens=count) as session:
                session.run_prefill(["The"])
                began = time.perf_counter()
                text = session.run_decode().texts[0]
                seconds = time.perf_counter() - began
        return len(engine.tokenize(text)) / seconds


def load(path: Path) -> Runtime:
    bundle = Bundle(path)

    def logits(ids: np.ndarray) -> np.ndarray:
        bundle.clear()
        return np.stack([bundle.read(int(token)) for token in ids])

    def greedy(prompt: np.ndarray, count: int) -> list[int]:
        tokens = [int(logits(prompt)[-1].argmax())]
        while len(tokens) < count:
            tokens.append(int(bundle.read(tokens[-1]).argmax()))
        return tokens

    name = f"LiteRT {version('ai-edge-litert')}, LiteRT-LM {version('litert-lm-api')}"
    return Runtime(name, logits, greedy, {"tokens_per_second": tokens_per_second(path)})


if __name__ == "__main__":
    run(load)
