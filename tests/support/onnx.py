"""Traces of tiny models, made once, and ONNX Runtime on their folders."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from benchmarks.runners.codes import ONNX_CODES, tapped_decoder
from intaglio.formats.onnx.write_trace import trace_decoder
from intaglio.plan.family import ModelSpec, describe

DTYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


@functools.cache
def _traced(config: str) -> bytes:
    return trace_decoder(describe(json.loads(config))).SerializeToString()


def traced(spec: ModelSpec) -> Any:
    """`trace_decoder`, which takes seconds and depends on the config alone: once for each config."""
    return onnx.load_from_string(_traced(json.dumps(spec.config)))


class Sessions:
    """A folder in ONNX Runtime, with the cache that goes from step to step. B sequences, T tokens, V vocabulary."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.codes: dict[str, np.ndarray] = {}  # of a tapped decoder: int8 codes of the last step, by static scale
        where, provider = folder / "onnx", ["CPUExecutionProvider"]
        self.embeddings = onnxruntime.InferenceSession(where / "embed_tokens_q4.onnx", providers=provider)
        self.decoder = onnxruntime.InferenceSession(where / "decoder_model_merged_q4.onnx", providers=provider)
        self.past: dict[str, np.ndarray] = {}

    def tap(self) -> None:
        """Let the decoder say its codes, too."""
        self.decoder = tapped_decoder(self.folder)

    def start(self, batch: int) -> None:
        """Forget all tokens."""
        self.past = {
            value.name: np.zeros([batch, value.shape[1], 0, value.shape[3]], DTYPES[value.type])
            for value in self.decoder.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def step(self, ids_BT: np.ndarray, keep: int = 0, mask: np.ndarray | None = None) -> np.ndarray:
        """Logits [B, kept, V] of new tokens, which join the cache. mask: int64 [B, past and new], 0 is padding."""
        length = next(iter(self.past.values())).shape[2] + ids_BT.shape[1]
        mask = np.ones((len(ids_BT), length), np.int64) if mask is None else mask
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids_BT.shape[1] :]
        feed = _run(self.embeddings, {"input_ids": ids_BT})
        feed |= {"attention_mask": mask, "position_ids": positions, "num_logits_to_keep": np.array(keep)}
        found = _run(self.decoder, feed | self.past)
        self.codes = {
            name.removesuffix(ONNX_CODES): found.pop(name) for name in list(found) if name.endswith(ONNX_CODES)
        }
        self.past = {f"past_key_values{n.removeprefix('present')}": x for n, x in found.items() if n != "logits"}
        return found["logits"]


def _run(session: Any, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))
