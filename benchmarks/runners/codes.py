"""A runtime's int8 codes put into the training forward: does each operation, given the same codes, give the same codes?

Left to itself, a model with static int8 activations parts from any other computation of it at the first code that lies
at a border and falls to the other side; all that follows differs then. So here the forward computes every operation
on what the runtime had: it rounds its own input or output of each linear, its own keys and values, compares these
codes with the runtime's, and goes on with the runtime's. What is compared is thus everything between one rounding and
the next, and at the end the logits, in exact terms.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from intaglio.errors import InputError
from intaglio.numerics.activation import encode
from intaglio.plan.plan import Plan

from .start import HERE, python_of


class Comparison:
    """Counts codes and those that differ, by the static scale that owns theirs, and how far the furthest is off.

    logits: float32 [B, T, V] of the forward on the runtime's codes.
    """

    def __init__(self, model: Any, plan: Plan, codes: dict[str, np.ndarray], ids_BT: np.ndarray):
        """codes: int8, by the names of scales, shaped as the forward has what they scale."""
        self.codes, self.furthest = codes, 0
        self.counts, self.differing = Counter[str](), Counter[str]()
        self.names = {module: name for name, module in model.named_modules()}
        self.owners = {(scale.module, scale.kind): scale.owner for scale in plan.static_scales}
        with patch("intaglio.train.static.static", self._force), torch.no_grad():
            self.logits: np.ndarray = model(input_ids=torch.from_numpy(ids_BT).long(), use_cache=False).logits.numpy()

    @property
    def equal_share(self) -> float:
        return 1 - self.differing.total() / self.counts.total()

    def __str__(self) -> str:
        total = f"{self.differing.total()} of {self.counts.total():,} codes differ, by {self.furthest} at most"
        return f"{total}; most for {self.differing.most_common(2)}"

    def _force(self, module: Any, kind: str, x: Tensor) -> Tensor:
        scales = getattr(module, "static", None)
        if scales is None or kind not in scales.fixed:
            return x
        name, scale = self.owners[self.names[module], kind], scales.fixed[kind]
        theirs = torch.from_numpy(self.codes[name])
        off = (encode(x, scale).int() - theirs.int()).abs()
        self.counts[name] += off.numel()
        self.differing[name] += int(off.count_nonzero())
        self.furthest = max(self.furthest, int(off.max()))
        return theirs.to(x.dtype) * scale


ONNX_CODES = ".codes"  # ends the name of what a QuantizeLinear of the exporter gives


def tapped_decoder(folder: Path) -> Any:
    """An ONNX folder's decoder in ONNX Runtime, which also says every int8 code that it rounds to.

    Its data lie beside it, so it is read from a file there.
    """
    import onnx
    import onnxruntime

    path = folder / "onnx" / "decoder_model_merged_q4.onnx"
    model = onnx.load(path, load_external_data=False)
    for name in [name for node in model.graph.node for name in node.output if name.endswith(ONNX_CODES)]:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT8, None))
    tapped = path.with_name("tapped.onnx")
    tapped.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(tapped, providers=["CPUExecutionProvider"])
    tapped.unlink()
    return session


def litert_codes(
    bundle: Path, plan: Plan, ids_NT: np.ndarray, folder: Path
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The int8 codes of a bundle's decoder, as `Comparison` takes them, and its logits [N, T, V]."""
    np.save(folder / "ids.npy", ids_NT)
    command = [python_of("litert"), HERE / "litert_codes.py", bundle, folder / "ids.npy", folder / "codes.npz"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"litert_codes.py failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    found, codes = dict(np.load(folder / "codes.npz")), {}
    for scale in plan.static_scales:
        if scale.kind in ("input", "output"):
            values = found[f"{scale.module}.{scale.kind}"]
            if not np.array_equal(codes.setdefault(scale.owner, values), values):
                raise InputError(f"{scale.name}: other codes than {scale.owner}, whose scale it has")
        elif scale.owned:
            cache = found[f"kv_cache_{scale.kind[0]}_{scale.module.split('.')[2]}"][:, 0]
            cache = cache if scale.kind == "k_cache" else cache.swapaxes(-1, -2)  # [N, heads, context, width]
            codes[scale.owner] = np.ascontiguousarray(cache[:, :, : ids_NT.shape[1]])
    return codes, found["logits"]
