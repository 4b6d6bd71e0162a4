"""A mixture of 16 experts is trained for Q4_0, exported, and measured in llama.cpp.

    python benchmarks/moe_tiny.py --out benchmarks/results/moe_tiny.json   # 15 minutes on two cores

The bundled model gets a mixture of experts beside every MLP, as Gemma 4 26B-A4B has it: each expert begins
as some neurons of that MLP, and float training on the bundled text makes a model of it. That is the original:
stock rounding, the MSE fit and QAT are compared with it on held-out text, each as a GGUF in llama.cpp.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import environment, write_result
from finetune_on_grid import FLOATS, LENGTH, corpus_of, settings, trained

from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.gguf.write import export_gguf
from intaglio.measure.evaluate import Candidate, evaluate_many, transformers_source
from intaglio.measure.llamacpp import LlamaCpp
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import load_model
from intaglio.plan.family import build_meta_model, load_config
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR, TRAIN_TEXT
from intaglio.train.corpus import Corpus, held_out_windows
from intaglio.train.quantize import quantize

EXPERTS, USED, WIDTH = 16, 2, 64
MIXTURE_GAIN = 0.3  # of the experts' output beside the MLP's, when training begins
FLOAT_MIXTURE = [*FLOATS, "weights.expert.grid=f32"]


@torch.no_grad()
def mixture(folder: Path) -> Path:
    """The bundled model with experts, as a checkpoint."""
    shutil.copytree(MODEL_DIR, folder)
    config = load_config(MODEL_DIR) | {
        "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": USED, "moe_intermediate_size": WIDTH,
    }  # fmt: skip
    config.pop("architectures", None)
    meta: Any = build_meta_model(config)
    model, dense = type(meta)(meta.config), load_model(MODEL_DIR)
    model.load_state_dict(dense.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        gate, up, down = (getattr(layer.mlp, f"{kind}_proj").weight for kind in ("gate", "up", "down"))
        for expert in range(EXPERTS):
            neurons = torch.randperm(gate.shape[0], generator=generator)[:WIDTH]
            layer.experts.gate_up_proj[expert] = torch.cat([gate[neurons], up[neurons]])
            layer.experts.down_proj[expert] = down[:, neurons]
        layer.router.proj.weight.normal_(0, 0.3, generator=generator)
        layer.pre_feedforward_layernorm_2.weight.copy_(layer.pre_feedforward_layernorm.weight)
        layer.post_feedforward_layernorm_2.weight.fill_(MIXTURE_GAIN)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--float-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=300, help="of QAT")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--eval-tokens", type=int, default=12_288)
    parser.add_argument("--cache", type=Path, help="for the mixture trained in floats: a later run takes it from here")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        result = run(args, Path(name))
    result |= {
        "seconds": time.perf_counter() - began,
        "arguments": {k: str(v) for k, v in vars(args).items() if k not in ("out", "cache")},
    }
    write_result(args.out, {"environment": environment("llama-cpp-python"), **result})


def original_mixture(args: argparse.Namespace, text: Corpus, folder: Path) -> Path:
    """The mixture trained in floats, as a checkpoint; the one in the cache, if an earlier run left it there."""
    original = (args.cache or folder) / "original"
    if original.is_dir():
        return original
    begun = mixture(folder / "begun")
    pretraining = settings(args.float_steps, loss="cross_entropy", lr=3e-4, embedding_lr=1.0, float_lr=1, frozen_tail=0)
    plan = make_plan(begun, Recipe.load("q4_0", FLOAT_MIXTURE + pretraining))
    export_hf(trained(load_model(begun), plan, text, folder / "float"), original)
    return original


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    text = corpus_of(TRAIN_TEXT, (args.float_steps + args.steps) * 4 * LENGTH)
    source = original_mixture(args, text, folder)
    original = load_model(source)

    schedule = settings(
        args.steps, lr=args.lr, scale_lr=1e-3, float_lr=1, frozen_tail=0.1, tail_lr=0.5, gptq_tokens=16_384
    )
    plan = make_plan(source, Recipe.load("q4_0", schedule))
    packed = {
        "stock": quantize(source, make_plan(source, "q4_0-stock"), folder / "stock"),
        "MSE fit": quantize(source, plan, folder / "fitted"),
        "QAT": trained(original, plan, text, folder / "qat"),
    }
    windows = torch.from_numpy(
        held_out_windows(
            HELDOUT_TEXT, load_tokenizer(MODEL_DIR), length=LENGTH, max_tokens=args.eval_tokens,
            vocab_size=plan.model.config["vocab_size"],
        )
    ).long()  # fmt: skip
    rows = {}
    for label, model in packed.items():
        export_gguf(model, folder / f"{label}.gguf")
        with LlamaCpp(folder / f"{label}.gguf") as runtime:
            named = {label: Candidate(source=runtime.logits, runtime="llama.cpp", simulated=False)}
            rows[label] = evaluate_many(transformers_source(original), named, windows)[label]
    first = next(iter(rows.values()))
    print(f"{'original':10} perplexity {first.perplexity_reference:8.3f}")
    for label, c in rows.items():
        share = 1 - c.kl_mean_nats / rows["stock"].kl_mean_nats
        print(
            f"{label:10} perplexity {c.perplexity_candidate:8.3f}   KL {c.kl_mean_nats:.4f} ± {c.kl_mean_ci_nats or 0:.4f}   R {share:.2f}"
        )
    return {"original_perplexity": first.perplexity_reference, "rows": {k: c.to_dict() for k, c in rows.items()}}


if __name__ == "__main__":
    main()
