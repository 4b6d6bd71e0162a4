"""Quality of fine-tuning a QAT checkpoint on its grid, against the ordinary way in floats and a new conversion.

    python benchmarks/finetune_on_grid.py --start ours        # 10 minutes on two cores
    python benchmarks/finetune_on_grid.py --start stranger    # 10 minutes

The checkpoint that a user has is the bundled model after a short QAT run: `ours` by recipe q4_0, `stranger` by the
rule of `stranger_qat.py` (absmax / 7, embeddings in floats), released in bfloat16 and taken over by `convert`. It is
fine-tuned on one domain of the bundled text by plain cross-entropy, the same batches at the same rate:

    on the grid    training goes on from the packed codes and scales (full, and by LoRA)
    ordinary       the bfloat16 checkpoint is fine-tuned with float32 masters, saved as bfloat16, and converted, with
                   llama.cpp's rounding (`q4_0-stock`, the bytes of llama-quantize) or with our own fit (`quantize`)

It measures perplexity, and KL to the ordinary fine-tune before its conversion, on held-out text of the domain, simulated.
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
from stranger_qat import FLOAT_EMBEDDINGS, save_bfloat16
from stranger_qat import train as train_stranger

from intaglio.formats.checkpoint.write import export_hf
from intaglio.measure.evaluate import Candidate, evaluate_many, transformers_runtime, transformers_source
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import load_model
from intaglio.packed.decoded import load_packed
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.progress import StepInfo
from intaglio.sources.convert import convert
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR, TRAIN_TEXT
from intaglio.train.corpus import Corpus, held_out_windows, load_corpus
from intaglio.train.loop import train
from intaglio.train.options import Options
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
    latents = train(original, plan, corpus, folder / "run", start=start, options=OPTIONS, on_step=watch(folder.name))
    pack_model(latents, folder / "packed", assets=MODEL_DIR)
    return PackedModel.open(folder / "packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", choices=("ours", "stranger"), required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "finetune_on_grid.json")
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
    said = {k: str(v) for k, v in vars(args).items() if k != "out"}
    result |= {"environment": environment(), "seconds": time.perf_counter() - began, "arguments": said}
    before = json.loads(args.out.read_text("utf-8")) if args.out.is_file() else {}
    write_result(args.out, before | {args.start: result})


def checkpoint_of_ours(args: argparse.Namespace, folder: Path) -> tuple[Path, PackedModel]:
    """A bfloat16 checkpoint on recipe q4_0's grids, and its packed model."""
    qat = settings(args.qat_steps, lr=1e-4, gptq_tokens=16_384, scale_lr=1e-3, float_lr=1, frozen_tail=0.1, tail_lr=0.5)
    everything = corpus_of(TRAIN_TEXT, args.qat_steps * BATCH * LENGTH)
    start = trained(load_model(MODEL_DIR), make_plan(MODEL_DIR, Recipe.load("q4_0", qat)), everything, folder / "qat")
    export_hf(start, folder / "released")
    return folder / "released", start


def checkpoint_of_a_stranger(args: argparse.Namespace, folder: Path) -> tuple[Path, PackedModel]:
    """A bfloat16 checkpoint whose linears lie on a grid that is not ggml's, and what `convert` makes of it."""
    save_bfloat16(train_stranger(args.qat_steps, load_tokenizer(MODEL_DIR)), folder / "released")
    found = convert(folder / "released", folder / "converted", recipe=Recipe.load("q4_0-free", FLOAT_EMBEDDINGS))
    return folder / "released", found.packed


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    released, start = (checkpoint_of_ours if args.start == "ours" else checkpoint_of_a_stranger)(args, folder)
    embeddings = [] if args.start == "ours" else FLOAT_EMBEDDINGS
    domain = corpus_of(domain_text(TRAIN_TEXT, args.domain, folder / "train.jsonl"), args.steps * BATCH * LENGTH)
    tuning = settings(
        args.steps, loss="cross_entropy", lr=args.lr, float_lr=1, frozen_tail=0.1, tail_lr=0.5, gptq_tokens=0
    )
    lora = [*tuning, "schedule.lora_rank=8", f"schedule.lr={args.lora_lr}"]
    packed = {"QAT checkpoint": start}
    for label, changes in (("on the grid", tuning), ("on the grid, LoRA", lora)):
        plan = plan_to_go_on(start, changes)
        packed[label] = trained(load_packed(start), plan, domain, folder / label.replace(", ", "-"), start)

    plan = make_plan(released, Recipe.load("q4_0", [*FLOATS, *embeddings, *tuning]))
    floats = trained(load_model(released), plan, domain, folder / "ordinary")
    export_hf(floats, folder / "tuned")
    for label, recipe in (("ordinary, llama-quantize", "q4_0-stock"), ("ordinary, MSE fit", "q4_0-free")):
        plan = make_plan(folder / "tuned", Recipe.load(recipe, embeddings))
        packed[label] = quantize(folder / "tuned", plan, folder / recipe)

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
