"""Time, memory and quality of quantizing a model layer by layer, for a model that does not fit.

    python benchmarks/layerwise.py speed 12b --cache DIR --out FILE --gb 24        a GPU; 2 bytes of disk a parameter, and 0.6 more
    python benchmarks/layerwise.py quality CHECKPOINT --data TRAIN --text HELDOUT --out FILE
    python benchmarks/layerwise.py quality CHECKPOINT ... --cases gptq "gptq, layers" --seeds 0     part of it

speed     random weights of a real shape (`real_size.make_checkpoint`) go through `quantize --data` with GPTQ and the stage
          "layers", in a process that may have so many GB of the GPU. Seconds of each window, peak of GPU and host.
quality   KL to the original on held-out text, simulated, of each way at equal tokens of text. Each case of each seed is
          written as it is measured, and what the file has already is not measured again: a run that was cut goes on.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import environment, write_result
from real_size import make_checkpoint, write_text

from intaglio.numerics.device import device_for
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import stored_dtype
from intaglio.packed.model import PackedModel
from intaglio.plan.bundled import bundled_config, bundled_name
from intaglio.plan.family import describe, read_spec, text_config
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.progress import Progress
from intaglio.runs.compare import compare
from intaglio.runs.proof import Evaluation
from intaglio.tiny import TRAIN_TEXT
from intaglio.train.corpus import Corpus, load_corpus
from intaglio.train.layerwise import quantize_on_text
from intaglio.train.loop import train
from intaglio.train.options import Options
from intaglio.train.pack import pack_model
from intaglio.train.quantize import quantize
from intaglio.train.sharding import load_own_rows

# Settings of each case. Its name lists what is done, in order.
CASES: dict[str, dict[str, Any]] = {
    "fit": {"gptq_tokens": 0},
    "gptq": {},
    "layers": {"gptq_tokens": 0, "stages": ("layers",)},
    "gptq, layers": {"stages": ("layers",)},
    "gptq, layers, window 2": {"stages": ("layers",), "layer_window": 2},
    "gptq, layers, scales": {"stages": ("layers", "scales")},
    "gptq, layers, model": {"stages": ("layers", "model")},
    "gptq, model": {},
}


def now(device: torch.device) -> float:
    """Seconds, once the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def corpus_of(plan: Plan, model: Path, data: Path, tokens: int) -> Corpus:
    vocabulary = plan.model.layer_config.vocab_size
    length = plan.recipe.schedule.sequence_length
    return load_corpus(
        data, load_tokenizer(model), sequence_length=length, vocab_size=vocabulary, max_tokens=max(tokens, length)
    )


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Quantize random weights of a real shape within so many GB of the GPU."""
    folder, device = options.cache / "layerwise", device_for()
    name = bundled_name(options.model)
    config = text_config(json.loads(options.config.read_text("utf-8")) if options.config else bundled_config(str(name)))
    if not (folder / "checkpoint" / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        make_checkpoint(folder / "checkpoint", config)
        write_text(folder / "train.jsonl", TRAIN_TEXT, options.tokens)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.gb * 1e9 / total))
        torch.cuda.reset_peak_memory_stats()
    stages = [] if options.no_training else ["schedule.stages=['layers']"]
    settings = [f"schedule.{key}={value}" for key, value in schedule_of(options).items()]
    plan = make_plan(folder / "checkpoint", Recipe.load(options.recipe, [*settings, *stages, *options.set]))
    corpus = corpus_of(plan, folder / "checkpoint", folder / "train.jsonl", options.tokens)
    began = now(device)
    windows: list[dict[str, Any]] = []

    class Printer(Progress):
        def part(self, done: int, total: int, figures: str = "") -> None:
            before = windows[-1]["layers"][1] if windows else -1
            windows.append({"layers": [before + 1, done - 1], "at_seconds": round(now(device) - began, 2)})
            peak = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if device.type == "cuda" else ""
            print(f"layer {done} of {total}, {windows[-1]['at_seconds']} s{peak}, {figures}", flush=True)

    quantize_on_text(
        folder / "checkpoint",
        plan,
        corpus,
        folder / "packed",
        gptq=bool(plan.recipe.schedule.gptq_tokens),
        layers="layers" in plan.recipe.schedule.stages,
        replace=True,
        progress=Printer(),
    )
    seconds = now(device) - began
    if not options.keep:
        shutil.rmtree(folder)
    return {
        "model": "config" if options.config else name,
        "parameters": sum(t.numel for t in describe(config).tensors),
        "schedule": plan.recipe.to_dict()["schedule"],
        "seconds": round(seconds, 1),
        "seconds_a_window": round((windows[-1]["at_seconds"] - windows[0]["at_seconds"]) / max(1, len(windows) - 1), 2),
        "tokens_a_second": round(corpus.tokens.size / seconds),
        "windows": windows,
        "limit_gb": options.gb if device.type == "cuda" else None,
        "peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else None,
        "peak_host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


def schedule_of(options: argparse.Namespace) -> dict[str, int]:
    keys = {"sequence_length": options.length, "tokens": options.tokens, "layer_tokens": options.tokens}
    return keys | {"gptq_tokens": min(options.tokens, options.gptq_tokens), "batch_size": options.batch}


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """Every case of every seed, measured on held-out text; goes on with what the file has."""
    result: dict[str, Any] = {"settings": schedule_of(options) | {"recipe": options.recipe, "set": options.set}}
    if options.out.is_file():
        result = json.loads(options.out.read_text("utf-8"))
    rows: dict[str, dict[str, Any]] = result.setdefault("cases", {})
    for seed in options.seeds:
        for case in options.cases or CASES:
            row = rows.setdefault(case, {})
            if str(seed) in row:
                continue
            began = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=options.cache) as folder:
                packed = make(options, case, seed, Path(folder))
                seconds = time.perf_counter() - began
                evaluation = Evaluation(text=options.text, tokens=options.eval_tokens, window=options.length)
                found = compare(packed, options.model, evaluation)
            row[str(seed)] = {
                "kl_nats": round(found.kl_mean_nats, 5),
                "same_top": round(found.same_top_share, 4),
                "seconds": round(seconds, 1),
            }
            print(f"{case}, seed {seed}: {row[str(seed)]}", flush=True)
            write_result(options.out, result | {"environment": environment()})
    return result


def make(options: argparse.Namespace, case: str, seed: int, folder: Path) -> Path:
    """The packed model of a case, in `folder`."""
    model, changes = Path(options.model), CASES[case]
    settings = [f"schedule.{key}={value}" for key, value in schedule_of(options).items()]
    recipe = Recipe.load(options.recipe, [*settings, f"schedule.seed={seed}", *options.set]).with_schedule(**changes)
    plan = make_plan(read_spec(model), recipe)
    schedule = recipe.schedule
    corpus = corpus_of(plan, model, options.data, schedule.tokens)
    whole = "model" in case or "scales" in case
    start = None
    if case == "fit":
        quantize(model, plan, folder / "start")
    elif case != "gptq, model":
        quantize_on_text(
            model, plan, corpus, folder / "start", gptq=bool(schedule.gptq_tokens), layers="layers" in schedule.stages
        )
        start = PackedModel.open(folder / "start")
    if not whole:  # fit and layers alone
        return folder / "start"
    device = device_for()
    dtype = torch.float32 if device.type == "cpu" else stored_dtype(model, plan.model)
    teacher = load_own_rows(model, plan.model, dtype, device)
    holder = teacher if start is None else load_own_rows(model, plan.model, dtype, device)
    how = Options(compiled=False)
    latents = train(holder, plan, corpus, folder / "run", teacher=teacher, start=start, options=how)
    pack_model(latents, folder / "packed", assets=model)
    return folder / "packed"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("speed", "quality"))
    parser.add_argument("model", help="speed: a bundled config such as 12b; quality: the folder of a checkpoint")
    parser.add_argument("--config", type=Path, help="speed: a config.json instead")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()), help="folder for what is made")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gb", type=float, default=24.0, help="speed: of the GPU's memory")
    parser.add_argument("--no-training", action="store_true", help="speed: GPTQ alone")
    parser.add_argument("--keep", action="store_true", help="speed: leave checkpoint and result, for another run")
    parser.add_argument("--data", type=Path, help="quality: text to learn from")
    parser.add_argument("--text", type=Path, help="quality: held-out text")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), help="quality: some of the cases")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--eval-tokens", type=int, default=65536)
    parser.add_argument("--recipe", default="q4_0")
    parser.add_argument("--tokens", type=int, default=131072, help="of the text, for each stage")
    parser.add_argument("--gptq-tokens", type=int, default=32768)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step over the whole model")
    parser.add_argument("--set", action="append", default=[], help="of the recipe, as `intaglio train` takes it")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    result = speed(options) if options.part == "speed" else quality(options)
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    write_result(options.out, {**result, "gpu": gpu, "environment": environment()})


if __name__ == "__main__":
    main()
