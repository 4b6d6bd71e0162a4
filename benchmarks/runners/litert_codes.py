"""The int8 codes inside of a bundle's decoder while it reads a window, in LiteRT's interpreter (XNNPACK).

python litert_codes.py BUNDLE IDS.npy OUT.npz

IDS int32 [N, T]. The decode signature gets as further outputs what each linear reads and writes as int8; that changes
no logit, which is checked. OUT holds `logits` float32 [N, T, V], for each linear MODULE.input and MODULE.output
[N, T, features], and for each layer's cache what `run_litert.py` calls it, [N, context, ...].
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from litert_lm_builder import litertlm_builder
from run_litert import Bundle

ALIGNMENT_BYTES = 64
INT8, FULLY_CONNECTED = schema.TensorType.INT8, schema.BuiltinOperator.FULLY_CONNECTED


def tapped(data: bytes) -> tuple[bytes, dict[str, str]]:
    """The model with further outputs, and the output of each MODULE.input and MODULE.output."""
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    signature = next(s for s in model.signatureDefs if s.signatureKey == b"decode")
    subgraph = model.subgraphs[signature.subgraphIndex]
    outputs: dict[int, str] = {}
    taps: dict[str, str] = {}
    for operator in subgraph.operators:
        if model.operatorCodes[operator.opcodeIndex].builtinCode != FULLY_CONNECTED:
            continue
        module = subgraph.tensors[operator.inputs[1]].name.decode().removesuffix(".weight")
        for kind, tensor in (("input", operator.inputs[0]), ("output", operator.outputs[0])):
            if subgraph.tensors[tensor].type == INT8:
                taps[f"{module}.{kind}"] = outputs.setdefault(int(tensor), f"tap_{len(outputs)}")
    subgraph.outputs = [*map(int, subgraph.outputs), *outputs]
    signature.outputs += [schema.TensorMapT(name=name, tensorIndex=tensor) for tensor, name in outputs.items()]
    return packed(model, data), taps


def packed(model: Any, data: bytes) -> bytes:
    """The model's bytes, with the weights, which lie behind the flatbuffer, moved to its new end."""
    behind = [buffer for buffer in model.buffers if buffer.size]
    start = min(buffer.offset for buffer in behind)
    end = -(-len(_flat(model)) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    for buffer in behind:
        buffer.offset += end - start
    return _flat(model).ljust(end, b"\0") + data[start:]


def _flat(model: Any) -> bytes:
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


class TappedBundle(Bundle):
    """A bundle that keeps what its decoder's taps say, token by token."""

    def __init__(self, path: Path):
        super().__init__(path)
        with TemporaryDirectory() as folder:
            litertlm_builder.unpack(str(path), folder)
            (model,) = Path(folder).glob("*tf_lite_prefill_decode.tflite")
            data, self.taps = tapped(model.read_bytes())
        self.decode = self._kept(Interpreter(model_content=data, num_threads=2).get_signature_runner("decode"))

    def _kept(self, runner: Any) -> Any:
        def run(**feed: np.ndarray) -> dict[str, np.ndarray]:
            self.last = runner(**feed)
            return self.last

        return run

    def window(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """[T, ...] of logits and taps, and the caches as they are at the end."""
        self.clear()
        rows: dict[str, list[np.ndarray]] = {name: [] for name in ("logits", *self.taps)}
        for token in ids:
            rows["logits"].append(self.read(int(token)))
            for name, output in self.taps.items():
                rows[name].append(self.last[output].reshape(-1))
        return {name: np.stack(values) for name, values in rows.items()} | self.caches


def main() -> None:
    bundle, ids_NT, out = Path(sys.argv[1]), np.load(sys.argv[2]), Path(sys.argv[3])
    plain, taps = Bundle(bundle), TappedBundle(bundle)
    windows = [taps.window(ids) for ids in ids_NT]
    for window, ids in zip(windows, ids_NT, strict=True):
        plain.clear()
        if not np.array_equal(window["logits"], np.stack([plain.read(int(token)) for token in ids])):
            raise SystemExit("the taps change the logits: what they say is not what the bundle computes")
    np.savez(out, **{name: np.stack([window[name] for window in windows]) for name in windows[0]})


if __name__ == "__main__":
    main()
