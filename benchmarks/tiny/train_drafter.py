"""The bundled drafter, rebuilt: trained from scratch on the corpus of the bundled model, against that model in floats.

    python benchmarks/tiny/train_drafter.py     # after build_corpus.py and build_tokenizer.py

Writes `.data/drafter`, to be copied to `src/intaglio/tiny/drafter`: bfloat16 weights, tokenizer, and training.json with
the run and what the bundled model accepts of its drafts. A run that was cut short goes on from its last checkpoint.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from sweep import positions_of, sequences
from torch import Tensor

from intaglio.drafter.model import Shape, new_drafter
from intaglio.drafter.train import train_drafter
from intaglio.formats.checkpoint.write import export_hf
from intaglio.measure.drafter_report import measure_pair
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import load_model
from intaglio.packed.decoded import load_packed
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.progress import StepInfo
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR
from intaglio.train.corpus import Corpus, held_out_windows
from intaglio.train.options import Options
from intaglio.train.pack import pack_model

# A width other than the model's: llama.cpp refuses a drafter that is as wide as its target.
SHAPE = Shape(width=128, mlp=512, heads=4)
LENGTH = 256
PROMPTS, PROMPT_TOKENS, WRITTEN_TOKENS = 64, 32, 96


def corpus_of(stream: np.ndarray, tokens: int, batch: int) -> Corpus:
    """Rows for the whole run, drawn from the whole corpus."""
    rows = sequences(stream, LENGTH)
    chosen = rows[np.random.default_rng(0).permutation(len(rows))[: tokens // LENGTH + batch]]
    return Corpus(chosen, positions_of(chosen, documents=True), "corpus of the bundled model")


def prompts() -> Tensor:
    """int64 [PROMPTS, PROMPT_TOKENS], held out."""
    windows = held_out_windows(
        HELDOUT_TEXT,
        load_tokenizer(MODEL_DIR),
        length=PROMPT_TOKENS,
        vocab_size=4096,
        max_tokens=PROMPTS * PROMPT_TOKENS,
    )
    return torch.from_numpy(windows).long()


def parser_of(description: str | None, *, tokens: int, lr: float, out: Path) -> argparse.ArgumentParser:
    """Options of both scripts that train the drafter, with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lambda text: int(float(text)), default=tokens)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--data", type=Path, default=Path(".data/tokens.npz"))
    parser.add_argument("--out", type=Path, default=out)
    return parser


def main() -> None:
    parser = parser_of(__doc__, tokens=1_200_000, lr=2e-3, out=Path(".data/drafter"))
    parser.add_argument("--run", type=Path, default=Path(".data/drafter-run"))
    options = parser.parse_args()

    target = load_model(MODEL_DIR)
    drafter = new_drafter(target, SHAPE)
    recipe = Recipe.load("drafter").with_schedule(
        tokens=options.tokens, batch_size=options.batch, sequence_length=LENGTH, lr=options.lr
    )
    plan = make_plan(drafter.config.to_dict(), recipe)
    corpus = corpus_of(np.load(options.data)["train"], options.tokens, options.batch)
    began, last = time.perf_counter(), []

    def on_step(info: StepInfo) -> None:
        last.append(info.loss)
        if info.step % 50 == 0:
            rate = info.tokens / (time.perf_counter() - began)
            print(f"{info.step}/{info.total_steps} loss {np.mean(last[-50:]):.4f} {rate:.0f} tokens/s", flush=True)

    how = Options(compiled=False, checkpoint_every=100)
    latents = train_drafter(target, drafter, plan, corpus, options.run, options=how, resume=True, on_step=on_step)
    packed_dir, seconds = options.run / "packed", time.perf_counter() - began
    record = {"name": "intaglio-tiny-assistant", "method": "trained from scratch against the float target"}
    pack_model(latents, packed_dir, assets=MODEL_DIR, provenance=record, replace=True)
    export_hf(PackedModel.open(packed_dir), options.out, replace=True)

    trained = load_packed(PackedModel.open(packed_dir))
    pair = measure_pair("float", "float", target, trained, prompts(), WRITTEN_TOKENS, {})
    made = {
        "parameters": sum(p.numel() for p in trained.parameters()),
        "tokens": options.tokens,
        "final_loss": float(np.mean(last[-50:])),
        "seconds_of_this_call": seconds,
        "torch": torch.__version__,
        "schedule": {"lr": options.lr, "batch_size": options.batch, "sequence_length": LENGTH},
        "measured_on": f"{PROMPTS} held-out prompts of {PROMPT_TOKENS} tokens, {WRITTEN_TOKENS} written after each",
        "acceptance": {mode: [a.to_dict() for a in getattr(pair, mode)] for mode in ("greedy", "sampled")},
    }
    (options.out / "training.json").write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    shutil.rmtree(options.run / "checkpoints", ignore_errors=True)
    print(json.dumps(made["acceptance"]["greedy"][3]))


if __name__ == "__main__":
    main()
