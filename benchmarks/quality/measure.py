"""Measure every artifact of the quality table against the original, on all domains, and write the table.

    python benchmarks/quality/measure.py MODEL WORK --out FILE --table PAGE

Up to three forms of an artifact are measured:

    llama.cpp    the GGUF file itself; its kernels also round activations to 8 bits
    decoded      its weights alone, in float32, with the token and PLE embeddings in Q6_K for every method. A method
                 that left them in floats gets those of recipe q4_0; a GGUF is decoded by llama.cpp's own quantizer
    as it came   decoded, with the embeddings that the method left in floats

The codes of a symmetric method are found again by `intaglio convert`, all of them exactly or not at all, and are
written as GGUF; this is the way into llama.cpp for a method that has no export of its own.

"Greedy" counts the tokens that the artifact would write as the original does, of 512, before the first other one. For
this the artifact reads the original's own greedy text at once: up to the first other token both have the same history.

The form nearest to what a user runs is measured on all domains, the others on the held-out text. Figures are kept
beside each artifact and not measured again, so that several processes may share the work (`--only`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import environment, write_result
from llama import llama_quantize
from methods import METHODS, Method, embedding_settings
from table import write_table
from torch import Tensor

from intaglio import PackedModel, Recipe, convert, export_gguf, load_model, make_plan, quantize
from intaglio.measure.evaluate import (
    Candidate,
    Kept,
    evaluate_many,
    logits_of,
    transformers_runtime,
    transformers_source,
)
from intaglio.measure.llamacpp import LlamaCpp
from intaglio.measure.simulate import decoded_model
from intaglio.numerics.device import device_for
from intaglio.packed.checkpoint import load_quantized

Source = Callable[[Tensor], Tensor]
HELD_OUT = "held-out"
LINEARS = {"attention", "mlp", "ple_linear"}  # roles
PROMPT, WRITTEN, TEXTS = 32, 512, 8
KEEP_BYTES = 1 << 28  # of the original's logits, for each domain: 16384 tokens of a vocabulary of 4096
KEPT = ("tokens", "windows", "kl_mean_nats", "kl_mean_ci_nats", "kl_median_nats", "kl_99_nats")
KEPT += ("same_top_share", "same_top_ci", "perplexity_reference", "perplexity_candidate", "perplexity_ratio")


class Bench:
    """The original with its windows, its logits of them, and its greedy texts."""

    def __init__(self, model_dir: Path, work: Path):
        self.model_dir, self.work = model_dir, work
        self.original = load_model(model_dir, device=device_for())
        self.windows = {p.stem: torch.from_numpy(np.load(p)) for p in sorted((work / "domains").glob("*.npy"))}
        self.logits = {
            name: Kept(lambda some_NT: logits_of(self.original, some_NT), windows_NT, KEEP_BYTES)
            for name, windows_NT in self.windows.items()
        }
        self.texts_NT = self.greedy_texts()

    @torch.no_grad()
    def greedy_texts(self) -> Tensor:
        """int64 [N, 32 + 512]: prompts of held-out text, and what the original writes after them; no end of text."""
        kept = self.work / "greedy.npy"
        if kept.is_file():
            return torch.from_numpy(np.load(kept))
        windows_NT = self.windows[HELD_OUT]
        prompts_NT = windows_NT[:: max(1, len(windows_NT) // TEXTS)][:TEXTS, :PROMPT].to(self.original.device)
        plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        texts_NT = self.original.generate(prompts_NT, min_new_tokens=WRITTEN, max_new_tokens=WRITTEN, **plain).cpu()
        np.save(kept, texts_NT.numpy())
        return texts_NT

    def agreement(self, source: Source) -> dict[str, float]:
        """Tokens before the first other one, mean and median over the texts, and the share of all that are the same."""
        ends = [self.original.generation_config.eos_token_id]
        counts, shares = [], []
        for text_T in self.texts_NT:
            logits_TV = source(text_T)[PROMPT - 1 : -1]
            logits_TV[:, ends] = -torch.inf
            same_T = logits_TV.argmax(-1).cpu() == text_T[PROMPT:]
            counts.append(WRITTEN if same_T.all() else int(same_T.int().argmin()))
            shares.append(float(same_T.float().mean()))
        return {
            "mean": float(np.mean(counts)),
            "median": float(np.median(counts)),
            "same_share": float(np.mean(shares)),
        }

    def measure(self, source: Source, runtime: str, whole: bool) -> dict[str, Any]:
        """Figures of the held-out text; of the whole also those of the other domains, and the greedy agreement."""
        found: dict[str, Any] = {"runtime": runtime}
        for name, windows_NT in self.windows.items():
            if whole or name == HELD_OUT:
                candidate = Candidate(source=source, runtime=runtime, simulated=False)
                result = evaluate_many(self.logits[name], {"": candidate}, windows_NT)[""].to_dict()
                found[name] = {key: result[key] for key in KEPT}
        return found | ({"greedy": self.agreement(source)} if whole else {})

    def forms(self, folder: Path, method: Method) -> Iterator[tuple[str, Source, str]]:
        """Each form of an artifact: its name, its logits, and what computes them. The one nearest to a user is first."""
        packed, gguf, checkpoint = (folder / part for part in ("packed", "model.gguf", "checkpoint"))
        if checkpoint.is_dir() and not packed.is_dir():
            pack(method, checkpoint, packed)
        if (
            packed.is_dir()
            and not gguf.is_file()
            and ((method.script == "ours" and method.recipe != "mobile") or method.grid)
        ):
            export_gguf(PackedModel.open(packed), gguf)
        if gguf.is_file():
            with LlamaCpp(gguf, threads=torch.get_num_threads()) as llama:
                yield "llama.cpp", llama.logits, llama.version
        if packed.is_dir():
            model = decoded_model(self.original, PackedModel.open(packed))
            yield "decoded", transformers_source(model), transformers_runtime()
        else:
            llama_quantize(gguf, folder / "decoded.gguf", "F32")
            with LlamaCpp(folder / "decoded.gguf", threads=torch.get_num_threads()) as llama:
                yield "decoded", llama.logits, llama.version
        if checkpoint.is_dir():
            coded = "quantization_config" in json.loads((checkpoint / "config.json").read_text("utf-8"))
            model = (load_quantized if coded else load_model)(checkpoint).to(self.original.device)
            yield "as it came", transformers_source(model), transformers_runtime()

    def row(self, folder: Path, method: Method) -> dict[str, Any]:
        """All of a row: what the artifact took, its bytes, and its figures in every form."""
        record = json.loads((folder / "artifact.json").read_text("utf-8"))
        row = {"label": method.label, "embeddings": method.embeddings, **record, "forms": {}}
        for form, source, runtime in self.forms(folder, method):
            row["forms"][form] = self.measure(source, runtime, whole=not row["forms"])
            print(f"{method.label}, {form}: KL {row['forms'][form][HELD_OUT]['kl_mean_nats']:.4f}", flush=True)
        if (folder / "model.gguf").is_file():
            row["gguf_bytes"] = (folder / "model.gguf").stat().st_size
        return row


def pack(method: Method, checkpoint: Path, packed: Path) -> None:
    """A method's linears as they are, with the embeddings of its recipe."""
    settings = embedding_settings(checkpoint) if method.recipe == "q4_0" else []
    if method.grid:
        result = convert(checkpoint, packed, recipe=Recipe.load(method.grid, settings))
        assert result.recovered == result.blocks, f"{method.label}: {result.recovered} of {result.blocks} blocks"
    else:
        rules = [rule.name for rule in Recipe.load(method.recipe).rules if LINEARS & set(rule.roles)]
        recipe = Recipe.load(method.recipe, [*settings, *(f"weights.{rule}.grid=f32" for rule in rules)])
        quantize(checkpoint, make_plan(checkpoint, recipe), packed)


def gathered(work: Path) -> dict[str, Any]:
    """The figures of all methods that were measured, and the last words of those that failed."""
    result: dict[str, Any] = {"texts": json.loads((work / "texts.json").read_text("utf-8")), "methods": {}}
    for name, method in METHODS.items():
        figures, failure = (work / "methods" / name / file for file in ("figures.json", "failure.txt"))
        if figures.is_file():
            result["methods"][name] = json.loads(figures.read_text("utf-8"))
        elif failure.is_file():
            result["methods"][name] = {"label": method.label, "failure": failure.read_text("utf-8").strip()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path, help="gather all figures in this file")
    parser.add_argument("--table", type=Path, help="Markdown file whose tables are written anew")
    options = parser.parse_args()
    bench = None
    for name in options.only:
        folder = options.work / "methods" / name
        if (folder / "artifact.json").is_file() and not (folder / "figures.json").is_file():
            bench = bench or Bench(options.model, options.work)
            row = bench.row(folder, METHODS[name])
            (folder / "figures.json").write_text(json.dumps(row, indent=1), "utf-8")
    result = gathered(options.work)
    if options.out:
        write_result(options.out, {"environment": environment("llama-cpp-python"), **result})
    if options.table:
        write_table(result, options.table)


if __name__ == "__main__":
    main()
