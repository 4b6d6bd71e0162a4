"""The loss of stock conversion of a stranger's QAT checkpoint, beside that of `intaglio convert`.

    python benchmarks/stranger_qat.py

The bundled model is trained by a rule that is not ggml's: linears in blocks of 32, scale = bfloat16(absmax / 7)
derived anew in every forward, codes -7..7, straight-through gradients, cross-entropy; embeddings stay floats. 30
lines of torch, nothing of intaglio. The weights of its forward are then saved in bfloat16, as releases are.

"Trained" is the model that was trained: float32 codes x scales, in transformers. Against it, in llama.cpp:

    stock      what llama.cpp's quantizer writes of the saved checkpoint (recipe q4_0-stock, the same bytes)
    convert    the codes and scales that `intaglio convert` recovers
    in float32 the same two files with every block decoded to float32 by llama.cpp, so that its rounding of
               activations to 8 bits in front of Q4_0 matrices, which costs both files the same, is left out

once with embeddings in F16 on both sides, which leaves the linears alone to differ, and once in Q6_K.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import environment, write_result
from llamacpp_parity import write_f32
from torch import Tensor, nn

from intaglio import Recipe, convert, export_gguf, inspect, load_corpus, load_model, load_tokenizer, make_plan, quantize
from intaglio.measure.evaluate import Candidate, evaluate_many, transformers_source
from intaglio.measure.llamacpp import LlamaCpp
from intaglio.packed.assets import copy_assets
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR, TRAIN_TEXT
from intaglio.train.corpus import held_out_windows

LENGTH, BATCH, LR = 128, 4, 2e-4
FLOAT_EMBEDDINGS = ["weights.token_embedding.grid=f16", "weights.ple_embedding.grid=f16"]


def on_grid(weight: Tensor) -> Tensor:
    """The stranger's rule, float32 code x bfloat16 scale."""
    blocks = weight.reshape(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 7).bfloat16().float()
    codes = (blocks / scale.clamp_min(1e-30)).round().clamp(-7, 7)
    return (codes * scale).reshape(weight.shape)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    skipped = ("lm_head", "per_layer_model_projection")
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith(skipped)}


def train(steps: int, tokenizer: Any) -> nn.Module:
    """A model whose linears hold what the last forward multiplied with."""
    model = load_model(MODEL_DIR)
    tokens = load_corpus(TRAIN_TEXT, tokenizer, sequence_length=LENGTH, vocab_size=model.config.vocab_size).tokens
    modules = linears(model)
    for module in modules.values():

        def forward(x: Tensor, m: nn.Linear = module) -> Tensor:
            return F.linear(x, m.weight + (on_grid(m.weight) - m.weight).detach())

        module.forward = forward  # type: ignore[method-assign]
    weights = [module.weight for module in modules.values()]
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=0)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        batch = torch.from_numpy(tokens[order[step * BATCH : (step + 1) * BATCH].numpy()]).long()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step:4} loss {float(loss):.3f}", flush=True)
    with torch.no_grad():
        for module in modules.values():
            module.weight.copy_(on_grid(module.weight))
            del module.forward
    return model.eval()


def save_bfloat16(model: Any, folder: Path) -> None:
    """A release: bfloat16 weights, config, tokenizer."""
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    copy_assets(MODEL_DIR, folder)


def make_files(release: Path, folder: Path) -> dict[str, Path]:
    """The GGUFs that are compared, by their labels."""
    files = {}
    for suffix, overrides in (("F16", FLOAT_EMBEDDINGS), ("Q6_K", [])):
        stock = quantize(release, make_plan(release, Recipe.load("q4_0-stock", overrides)), folder / f"stock-{suffix}")
        free = Recipe.load("q4_0-free", overrides)
        result = convert(release, folder / f"convert-{suffix}", recipe=free)
        assert result.recovered == result.blocks, "every block was trained on the grid"
        for label, packed in (("stock", stock), ("convert", result.packed)):
            path = folder / f"{label}-{suffix}.gguf"
            export_gguf(packed, path)
            write_f32(path, folder / f"{label}-{suffix}-f32.gguf")
            files[f"{label}, embeddings {suffix}"] = path
            files[f"{label}, embeddings {suffix}, in float32"] = folder / f"{label}-{suffix}-f32.gguf"
    return files


def compare(steps: int, windows: int, folder: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(MODEL_DIR)
    trained = train(steps, tokenizer)
    release = folder / "release"
    save_bfloat16(trained, release)
    found = [v.to_dict() for v in inspect(release).verdicts]
    held_out = held_out_windows(HELDOUT_TEXT, tokenizer, length=256, vocab_size=trained.config.vocab_size)
    windows_NT = torch.from_numpy(held_out[:: len(held_out) // windows][:windows]).long()
    source = transformers_source(trained)
    reference = [source(window) for window in windows_NT]
    rows = []
    for label, path in make_files(release, folder).items():
        with LlamaCpp(path) as llama:
            candidate = Candidate(source=llama.logits, runtime=llama.version, simulated=False)
            result = evaluate_many(reference, {label: candidate}, windows_NT)[label]
        rows.append({"file": label, **result.to_dict()})
        print(
            f"{label:40} KL {result.kl_mean_nats:.2e} ± {result.kl_mean_ci_nats or 0:.1e}  "
            f"same top {result.same_top_share:.2%}  perplexity {result.perplexity_candidate:.3f}",
            flush=True,
        )
    kl = {row["file"]: row["kl_mean_nats"] for row in rows}
    factor = kl["stock, embeddings F16, in float32"] / kl["convert, embeddings F16, in float32"]
    print(f"factor in float32, embeddings F16: {factor:,.0f}")
    grids = {name: sum(v["grid"] == name for v in found) for name in sorted({v["grid"] for v in found})}
    return {"steps": steps, "tokens_a_step": LENGTH * BATCH, "grids": grids, "factor_float32": factor, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--windows", type=int, default=32, help="held-out windows, of which 255 tokens each are scored")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stranger_qat.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = compare(arguments.steps, arguments.windows, Path(folder))
    write_result(arguments.out, {"environment": environment("llama-cpp-python")} | result)


if __name__ == "__main__":
    main()
