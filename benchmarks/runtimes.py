"""One table of how every runtime computes from the same codes and scales.

    make test-runtimes                          # the runtimes' environments, once
    python benchmarks/runtimes.py --out DIR

trains the bundled model by the demo's recipes (DIR/q4_0 and DIR/mobile, unless they are there), exports it for
every runtime, reads each artifact back, runs it, and compares it with the training forward: what transformers
computes in float32 from the decoded weights, activations and KV cache quantized as the recipe says. A runtime
without the one or the other is compared with the same in floats; vLLM with its own run of decoded weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import environment, write_result
from runners.start import ENVIRONMENTS, MAIN, Agreement, Output, agreement, start

from intaglio.formats.table import EXPORTERS
from intaglio.formats.verify import verify
from intaglio.measure.evaluate import logits_of
from intaglio.measure.simulate import decoded_model
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import TextModel, load_model
from intaglio.packed.model import PackedModel
from intaglio.runs.demo import run_demo
from intaglio.runs.proof import Evaluation
from intaglio.runs.texts import read_windows
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR
from intaglio.train.static import switch_static

RESULT = Path(__file__).parent / "results" / "runtimes.json"
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 16, 40
TRAINING, FLOATS, DENSE = "training forward", "training forward, float activations", "its own run of decoded weights"
FLOAT_KV = "training forward, float KV cache"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    label: of the runtime. recipe, export: which artifact; file: its name where it is no folder. runner,
    environment: what runs it where. reference: what it is compared with.
    """

    label: str
    recipe: str
    export: str
    runner: str
    environment: str = MAIN
    file: str = ""
    reference: str = TRAINING


RUNTIMES = (
    Row(label="transformers", recipe="q4_0", export="hf", runner="transformers"),
    Row(label="transformers, compressed-tensors", recipe="q4_0", export="vllm", runner="transformers"),
    Row(label="llama.cpp", recipe="q4_0", export="gguf", runner="llamacpp", file="model.gguf"),
    Row(label="MLX", recipe="q4_0", export="mlx", runner="mlx", environment="mlx"),
    Row(label="vLLM", recipe="q4_0", export="vllm", runner="vllm", environment="vllm", reference=DENSE),
    Row(label="ONNX Runtime", recipe="q4_0", export="onnx", runner="onnx"),
    Row(label="Transformers.js", recipe="q4_0", export="onnx", runner="node", environment="transformersjs"),
    Row(label="Chromium", recipe="q4_0", export="web", runner="wasm", environment="transformersjs"),
    Row(label="transformers", recipe="mobile", export="gemma-mobile", runner="mobile", reference=FLOAT_KV),
    Row(
        label="LiteRT-LM",
        recipe="mobile",
        export="litert",
        runner="litert",
        environment="litert",
        file="model.litertlm",
    ),
    Row(label="MLX", recipe="mobile", export="mlx", runner="mlx", environment="mlx", reference=FLOATS),
    Row(label="ONNX Runtime", recipe="mobile", export="onnx", runner="onnx"),
    Row(label="Transformers.js", recipe="mobile", export="onnx", runner="node", environment="transformersjs"),
    Row(label="Chromium", recipe="mobile", export="web", runner="wasm", environment="transformersjs"),
)


@dataclass(frozen=True)
class Model:
    """A trained recipe: what it is, and what the training forward computes, by reference."""

    packed: PackedModel
    references: dict[str, Output]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the trained models are, or go")
    parser.add_argument("--windows", type=int, default=8, help="of 256 held-out tokens")
    parser.add_argument("--only", default="", help="rows whose label contains this")
    args = parser.parse_args()
    rows = [row for row in RUNTIMES if args.only.lower() in row.label.lower()]
    teacher, tokenizer = load_model(MODEL_DIR), load_tokenizer(MODEL_DIR)
    evaluation = Evaluation(text=HELDOUT_TEXT, tokens=args.windows * 256)
    ids_NT = read_windows(evaluation, teacher.config.vocab_size, tokenizer)
    prompts_PQ = ids_NT[:PROMPTS, :PROMPT_TOKENS]
    original = np.stack([logits[:-1].numpy() for logits in logits_of(teacher, torch.from_numpy(ids_NT).long())])
    models = {recipe: _model(recipe, args.out, teacher, ids_NT, prompts_PQ) for recipe in {row.recipe for row in rows}}
    lines = []
    with TemporaryDirectory() as folder:
        for row in rows:
            lines.append(_measure(row, models[row.recipe], Path(folder), original, ids_NT, prompts_PQ))
            print(_markdown(lines[-1]), flush=True)
    result = {"environment": environment(), "tokens": int(ids_NT[:, 1:].size), "rows": lines}
    print("\n".join([HEADER, *map(_markdown, lines)]))
    write_result(RESULT, result)


def _model(recipe: str, out: Path, teacher: TextModel, ids_NT: np.ndarray, prompts_PQ: np.ndarray) -> Model:
    if not (out / recipe / "packed").is_dir():
        run_demo(out / recipe, recipe=recipe)
    packed = PackedModel.open(out / recipe / "packed")
    model = decoded_model(teacher, packed)
    references = {}
    for name, activations, kv_cache in ((TRAINING, True, True), (FLOAT_KV, True, False), (FLOATS, False, False)):
        switch_static(model, activations=activations, kv_cache=kv_cache)
        logits = np.stack([part[:-1].numpy() for part in logits_of(model, torch.from_numpy(ids_NT).long())])
        tokens = np.stack(list(_greedy(model, prompts_PQ)))
        references[name] = Output(logits, tokens, "", 0.0, [])
    return Model(packed, references)


@torch.no_grad()
def _greedy(model: TextModel, prompts_PQ: np.ndarray) -> Iterator[np.ndarray]:
    """Without a cache: each token from the whole text so far, as training computes it."""
    for prompt in prompts_PQ:
        ids = torch.from_numpy(prompt).long()[None]
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        yield ids[0, len(prompt) :].numpy()


def _measure(
    row: Row, model: Model, folder: Path, original: np.ndarray, ids_NT: np.ndarray, prompts_PQ: np.ndarray
) -> dict[str, Any]:
    artifact = folder / row.recipe / row.export / (row.file or "artifact")
    if not artifact.exists():
        options = {"transformers_js": ENVIRONMENTS / "transformersjs" / "node_modules"} if row.export == "web" else {}
        EXPORTERS[row.export](model.packed, artifact, **options)
    read_back = verify(model.packed, artifact)

    def run(path: Path) -> Output:
        return start(row.runner, row.environment, path, ids_NT, prompts_PQ, folder / "out", NEW_TOKENS)

    found = run(artifact)
    if row.reference == DENSE:
        dense = folder / row.recipe / "dense"
        EXPORTERS["hf"](model.packed, dense)
        reference = run(dense)
    else:
        reference = model.references[row.reference]
    to_reference: Agreement = agreement(reference.logits, found.logits, ids_NT)
    return {
        **asdict(row),
        "runtime": found.runtime,
        "kernels": found.kernels,
        "size_bytes": sum(path.stat().st_size for path in [artifact, *artifact.rglob("*")] if path.is_file()),
        "codes": read_back.codes,
        "differing_codes": read_back.differing_codes,
        "scales": read_back.scales + read_back.static_scales,
        "differing_scales": read_back.differing_scales + read_back.differing_static_scales,
        "exact": read_back.exact,
        **asdict(to_reference),
        "tokens_equal": bool((reference.tokens == found.tokens).all()),
        "tokens_per_second": found.tokens_per_second,
        "kl_to_original_nats": agreement(original, found.logits, ids_NT).kl_nats,
    }


HEADER = (
    "| runtime | recipe | size, MB | codes, scales that differ | max logit difference | KL to the reference, nats "
    "| same top | 40 tokens | tokens/s | KL to the original, nats | reference |\n"
    "|---|---|---:|---|---:|---:|---:|---|---:|---:|---|"
)


def _markdown(line: dict[str, Any]) -> str:
    cells = [
        f"{line['label']} ({line['runtime']})",
        line["recipe"],
        f"{line['size_bytes'] / 1e6:.2f}",
        f"{line['differing_codes']} of {line['codes']:,}, {line['differing_scales']} of {line['scales']:,}",
        f"{line['max_difference']:.1e}",
        f"{line['kl_nats']:.1e}",
        f"{line['same_top_share']:.2%}",
        "equal" if line["tokens_equal"] else "differ",
        f"{line['tokens_per_second']:.0f}",
        f"{line['kl_to_original_nats']:.4f}",
        line["reference"],
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
