"""Int8 codes of ONNX Runtime and LiteRT that differ from the training forward's, given the same codes before them.

    make test-runtimes                          # the runtimes' environments, once
    python benchmarks/int8_codes.py --out DIR   # DIR: as for runtimes.py, with the trained model in DIR/mobile

`runners/codes.py` says how. The script also counts the logits that are the same when each computes on its own codes.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import environment, write_result
from runners.codes import ONNX_CODES, Comparison, litert_codes, tapped_decoder
from runners.start import agreement

from intaglio.formats.table import EXPORTERS
from intaglio.measure.simulate import decoded_model
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import load_model
from intaglio.packed.model import PackedModel
from intaglio.runs.demo import run_demo
from intaglio.runs.proof import Evaluation
from intaglio.runs.texts import read_windows
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR

RESULT = Path(__file__).parent / "results" / "int8_codes.json"
WINDOW = 64
Found = tuple[dict[str, np.ndarray], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the trained model is, or goes")
    parser.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} held-out tokens")
    args = parser.parse_args()
    if not (args.out / "mobile" / "packed").is_dir():
        run_demo(args.out / "mobile", recipe="mobile")
    packed = PackedModel.open(args.out / "mobile" / "packed")
    teacher = load_model(MODEL_DIR)
    evaluation = Evaluation(text=HELDOUT_TEXT, tokens=args.windows * WINDOW, window=WINDOW)
    ids_NT = read_windows(evaluation, teacher.config.vocab_size, load_tokenizer(MODEL_DIR))
    model = decoded_model(teacher, packed)
    with torch.no_grad():
        own = model(input_ids=torch.from_numpy(ids_NT).long(), use_cache=False).logits.numpy()
    result: dict[str, Any] = {"environment": environment("onnxruntime"), "tokens": int(ids_NT.size)}
    with TemporaryDirectory() as folder:
        for name, found in (("ONNX Runtime", _onnx), ("LiteRT", _litert)):
            codes, logits = found(packed, ids_NT, Path(folder))
            forced = Comparison(model, packed.plan, codes, ids_NT)
            print(f"{name}: {forced}", flush=True)
            result[name] = {
                "codes": forced.counts.total(),
                "differing": forced.differing.total(),
                "furthest": forced.furthest,
                "on its codes": _compare(forced.logits, logits, ids_NT),
                "on their own codes": _compare(own, logits, ids_NT),
            }
            print(result[name])
    write_result(RESULT, result)


def _compare(expected: np.ndarray, found: np.ndarray, ids_NT: np.ndarray) -> dict[str, float]:
    within = float((np.abs(expected - found) < 1e-4).mean())
    return {"within_1e-4": within, **asdict(agreement(expected[:, :-1], found[:, :-1], ids_NT))}


def _litert(packed: PackedModel, ids_NT: np.ndarray, folder: Path) -> Found:
    path = folder / "model.litertlm"
    EXPORTERS["litert"](packed, path, context_tokens=2 * WINDOW)
    return litert_codes(path, packed.plan, ids_NT, folder)


def _onnx(packed: PackedModel, ids_NT: np.ndarray, folder: Path) -> Found:
    EXPORTERS["onnx"](packed, folder / "onnx")
    embed = onnxruntime.InferenceSession(folder / "onnx" / "onnx" / "embed_tokens_q4.onnx")
    decode = tapped_decoder(folder / "onnx")
    rows, columns = ids_NT.shape
    feed = _by_name(embed, {"input_ids": ids_NT.astype(np.int64)})
    feed |= {"attention_mask": np.ones((rows, columns), np.int64), "num_logits_to_keep": np.array(0)}
    feed["position_ids"] = np.tile(np.arange(columns), (rows, 1))
    past = {x.name: x.shape for x in decode.get_inputs() if x.name.startswith("past_key_values.")}
    feed |= {name: np.zeros((rows, shape[1], 0, shape[3]), np.int8) for name, shape in past.items()}
    found = _by_name(decode, feed)
    codes = {name.removesuffix(ONNX_CODES): x for name, x in found.items() if name.endswith(ONNX_CODES)}
    return codes, found["logits"]


def _by_name(session: Any, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feed), strict=True))


if __name__ == "__main__":
    main()
