"""Fine-tuning a QAT checkpoint: on its grid, and the ordinary way, which leaves it and is converted again.

    python benchmarks/finetune_on_grid.py --out benchmarks/results/finetune_on_grid.json   # 10 minutes on two cores

The bundled model is brought to Q4_0 by a short QAT run: the checkpoint that a user has. Then it is fine-tuned
on one domain of the bundled text by plain cross-entropy, the same batches at the same rate, in two ways:

    on the grid    training goes on from the packed codes and scales (full, and by LoRA)
    ordinary       its bfloat16 checkpoint is fine-tuned with float32 masters, saved as bfloat16, and
                   converted with llama.cpp's rounding (`q4_0-stock`, the bytes of llama-quantize)

Measured on held-out text of the domain, simulated: perplexity, and KL to the ordinary fine-tune before its conversion.
"""

from __future__ import annotations

import argparse
import json
import lzma
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import environment, write_result

from intaglio.export.hf import export_hf
from intaglio.measure.evaluate import Candidate, evaluate_many, transformers_runtime, transformers_source
from intaglio.packed.checkpoint import load_model, load_tokenizer
from intaglio.packed.decoded import load_packed
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR, TRAIN_TEXT
from intaglio.train.corpus import Corpus, held_out_windows, load_corpus
from intaglio.train.loop import Options, StepInfo, train
from intaglio.train.pack import pack_model
from intaglio.train.quantize import quantize
from intaglio.train.start import plan_to_go_on

LENGTH, BATCH = 256, 4
FLOATS = [f"weights.{rule}.grid=f32" for rule in ("linear", "ple_linear", "token_embedding", "ple_embedding")]
OPTIONS = Options(precision="no", compiled=False)


def domain_text(source: Path, domain: str, target: Path) -> Path:
    """The documents of one source of the bundled text, as a file of their own."""
    with lzma.open(source, "rt", encoding="utf-8") as lines:
        kept = [line for line in lines if json.loads(line)["source"] == domain]
    target.write_text("".join(kept), "utf-8")
    return target


def corpus_of(text: Path, tokens: int) -> Corpus:
    vocabulary = make_plan(MODEL_DIR, "q4_0").model.config["vocab_size"]
    return load_corpus(
        text, load_tokenizer(MODEL_DIR), sequence_length=LENGTH, vocab_size=vocabulary, max_tokens=tokens
    )


def settings(steps: int, **more: Any) -> list[str]:
    values = {"tokens": steps * BATCH * LENGTH, "batch_size": BATCH, "sequence_length": LENGTH} | more
    return [f"schedule.{key}={value}" for key, value in values.items()]


def watch(name: str) -> Any:
    def on_step(info: StepInfo) -> None:
        if info.step % 20 == 0 or info.step == info.total_steps:
            print(f"{name} {info.step}/{info.total_steps} loss {info.loss:.4f} {info.seconds:.0f} s", flush=True)

    return on_step


def trained(original: Any, plan: Plan, corpus: Corpus, folder: Path, start: PackedModel | None = None) -> PackedModel:
    student = train(original, plan, corpus, folder / "run", start=start, options=OPTIONS, on_step=watch(folder.name))
    pack_model(student, plan, folder / "packed", assets=MODEL_DIR)
    return PackedModel.open(folder / "packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--domain", default="moby-dick", help="a source of the bundled text")
    parser.add_argument("--qat-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=150, help="of each fine-tune")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--lora-lr", type=float, default=1e-3)
    parser.add_argument("--eval-tokens", type=int, default=12_288)
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        result = run(args, Path(name))
    result |= {"seconds": time.perf_counter() - began, "arguments": {k: str(v) for k, v in vars(args).items()}}
    write_result(args.out, {"environment": environment(), **result})


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    qat = settings(args.qat_steps, lr=1e-4, gptq_tokens=16_384, scale_lr=1e-3, frozen_tail=0.1, tail_lr=0.5)
    everything = corpus_of(TRAIN_TEXT, args.qat_steps * BATCH * LENGTH)
    start = trained(load_model(MODEL_DIR), make_plan(MODEL_DIR, Recipe.load("q4_0", qat)), everything, folder / "qat")

    domain = corpus_of(domain_text(TRAIN_TEXT, args.domain, folder / "train.jsonl"), args.steps * BATCH * LENGTH)
    tuning = settings(args.steps, loss="cross_entropy", lr=args.lr, frozen_tail=0.1, tail_lr=0.5, gptq_tokens=0)
    lora = [*tuning, "schedule.lora_rank=8", f"schedule.lr={args.lora_lr}"]
    packed = {"QAT checkpoint": start}
    for label, changes in (("on the grid", tuning), ("on the grid, LoRA", lora)):
        plan = plan_to_go_on(start, changes)
        packed[label] = trained(load_packed(start), plan, domain, folder / label.replace(", ", "-"), start)

    export_hf(start, folder / "hf")
    floats = trained(
        load_model(folder / "hf"),
        make_plan(folder / "hf", Recipe.load("q4_0", FLOATS + tuning)),
        domain,
        folder / "off",
    )
    export_hf(floats, folder / "off-hf")
    stock = make_plan(folder / "off-hf", "q4_0-stock")
    packed["ordinary, converted"] = quantize(folder / "off-hf", stock, folder / "stock")

    text = domain_text(HELDOUT_TEXT, args.domain, folder / "heldout.jsonl")
    windows = held_out_windows(
        text, load_tokenizer(MODEL_DIR), length=LENGTH, max_tokens=args.eval_tokens,
        vocab_size=start.plan.model.config["vocab_size"],
    )  # fmt: skip
    candidates = {
        label: Candidate(source=transformers_source(load_packed(p)), runtime=transformers_runtime(), simulated=True)
        for label, p in packed.items()
    }
    reference = transformers_source(load_packed(floats))
    measured = evaluate_many(reference, candidates, torch.from_numpy(windows).long())
    first = next(iter(measured.values()))
    print(f"{'ordinary, before its conversion':34} perplexity {first.perplexity_reference:8.3f}")
    for label, c in measured.items():
        print(
            f"{label:34} perplexity {c.perplexity_candidate:8.3f}   KL {c.kl_mean_nats:.4f} ± {c.kl_mean_ci_nats or 0:.4f}"
        )
    return {"floats_perplexity": first.perplexity_reference, "rows": {k: c.to_dict() for k, c in measured.items()}}


if __name__ == "__main__":
    main()
