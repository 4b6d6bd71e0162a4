"""Quality and memory of training with moments in bfloat16, in 8 bits, and in host memory.

    python benchmarks/lean_quality.py --out FILE                          # the bundled model and text
    python benchmarks/lean_quality.py MODEL --steps 200 --batch 8 --length 512 --out FILE --set weights.token_embedding.grid=q8_0
    python benchmarks/lean_quality.py --steps 4 --batch 2 --length 64 --gptq-tokens 256 --tokens 512 --seeds 0 --out FILE

The same short run is made for each choice and seed: recipe q4_0, first codes by GPTQ, KL to the original. It measures the KL to
the original on held-out text, simulated in transformers, before training and after. It also measures milliseconds a step,
without the first two, which compile. On a GPU it gives the peak that torch allocated during training, beside the plan's
figure. A seed orders the data, and all choices of a seed see the same. "float32 again" repeats the first choice; the
difference is the noise of a repetition. "int8" needs torchao (`intaglio[lean]`). Each row is written as it is measured,
and what the file has already is not measured again.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import environment, write_result

from intaglio import Recipe, load_corpus, load_tokenizer, make_plan
from intaglio.errors import InputError
from intaglio.measure.evaluate import Candidate, evaluate_many, transformers_runtime, transformers_source
from intaglio.packed.checkpoint import load_model
from intaglio.plan.family import read_spec
from intaglio.plan.memory import training_memory
from intaglio.progress import StepInfo
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR, TRAIN_TEXT
from intaglio.train.corpus import held_out_windows
from intaglio.train.latents import Latents
from intaglio.train.loop import train
from intaglio.train.options import Options

CHOICES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32 again": {},
    "float32, offloaded": {"offload_moments": True},
    "bfloat16": {"moments": "bfloat16"},
    "bfloat16, offloaded": {"moments": "bfloat16", "offload_moments": True},
    "int8": {"moments": "int8"},
}
NOT_TIMED = 2  # first steps, which compile


def recipe_of(options: argparse.Namespace, choice: str, seed: int) -> Recipe:
    schedule = {"tokens": options.steps * options.batch * options.length, "batch_size": options.batch}
    schedule |= {"sequence_length": options.length, "gptq_tokens": options.gptq_tokens, "seed": seed}
    recipe = Recipe.load(options.recipe, options.set)
    return recipe.with_schedule(**schedule, **CHOICES[choice])


def held_out_kl(original: Any, student: Any, windows_NT: torch.Tensor) -> dict[str, Any]:
    candidate = Candidate(source=transformers_source(student), runtime=transformers_runtime(), simulated=True)
    return evaluate_many(transformers_source(original), {"": candidate}, windows_NT)[""].to_dict()


def measure(options: argparse.Namespace, choice: str, seed: int, inputs: tuple) -> dict[str, Any]:
    """One run, from the original's weights to its KL."""
    tokenizer, windows_NT = inputs
    gpu = torch.cuda.is_available()
    original = load_model(options.model).to(torch.bfloat16 if gpu else torch.float32).to("cuda" if gpu else "cpu")
    plan = make_plan(options.model, recipe_of(options, choice, seed))
    corpus = load_corpus(
        options.data,
        tokenizer,
        sequence_length=options.length,
        vocab_size=plan.model.layer_config.vocab_size,
        max_tokens=plan.recipe.schedule.tokens,
    )
    row: dict[str, Any] = {"choice": choice, "seed": seed}
    ends: list[float] = []

    def on_start(latents: Latents) -> None:
        row["start"] = held_out_kl(original, latents.model, windows_NT)
        if gpu:
            torch.cuda.reset_peak_memory_stats()

    def on_step(info: StepInfo) -> None:
        if gpu:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        row["last_loss"] = info.loss

    how = Options(precision="bf16" if gpu else "no", compiled=gpu and options.compile)
    with tempfile.TemporaryDirectory() as run:
        latents = train(original, plan, corpus, Path(run) / "run", options=how, on_start=on_start, on_step=on_step)
    row["peak_bytes"] = torch.cuda.max_memory_allocated() if gpu else None
    row["planned_bytes"] = training_memory(plan).total
    row["planned_moment_bytes"] = training_memory(plan).optimizer
    times = [1e3 * (b - a) for a, b in itertools.pairwise(ends)][NOT_TIMED:]
    row["step_ms"] = statistics.median(times) if times else None
    row["trained"] = held_out_kl(original, latents.model, windows_NT)
    return row


def show(rows: list[dict[str, Any]]) -> None:
    print("KL of each seed, before -> after                       mean    ms/step  peak GB  planned GB  choice")
    for choice in dict.fromkeys(row["choice"] for row in rows):
        own = [row for row in rows if row["choice"] == choice]
        kls = [row["trained"]["kl_mean_nats"] for row in own]
        each = " ".join(f"{row['start']['kl_mean_nats']:.4f}->{kl:.4f}" for row, kl in zip(own, kls, strict=True))
        peak = max(row["peak_bytes"] or 0 for row in own) / 1e9
        print(
            f"{each:54} {statistics.mean(kls):.5f} {own[-1]['step_ms'] or 0:9.1f} {peak:8.2f} "
            f"{own[0]['planned_bytes'] / 1e9:11.2f}  {choice}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=MODEL_DIR)
    parser.add_argument("--data", default=str(TRAIN_TEXT))
    parser.add_argument("--text", default=str(HELDOUT_TEXT), help="held-out text")
    parser.add_argument("--tokens", type=int, default=32768, help="held-out tokens")
    parser.add_argument("--recipe", default="q4_0")
    parser.add_argument("--set", action="append", default=[], help="recipe key, as in `intaglio train`")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--gptq-tokens", type=int, default=32768)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--choices", nargs="*", default=list(CHOICES), choices=CHOICES)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="on a GPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lean_quality.json")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    vocabulary = read_spec(options.model).layer_config.vocab_size
    windows = held_out_windows(
        options.text, tokenizer, length=options.length, max_tokens=options.tokens, vocab_size=vocabulary
    )
    settings = {k: str(v) for k, v in vars(options).items() if k not in ("model", "data", "text", "out", "seeds")}
    settings["model"] = options.model.name
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    done = {(row["seed"], row["choice"]) for row in rows}
    for seed, choice in itertools.product(options.seeds, options.choices):
        if (seed, choice) in done:
            continue
        try:
            rows.append(measure(options, choice, seed, (tokenizer, torch.from_numpy(windows).long())))
        except InputError as error:  # torchao is not there
            print(f"{choice}: {error}", flush=True)
            continue
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        write_result(
            options.out,
            {"environment": environment("torchao") | {"device": device}, "settings": settings, "rows": rows},
        )
    show(rows)


if __name__ == "__main__":
    main()
