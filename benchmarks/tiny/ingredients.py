"""The cost of each part of the mobile format alone: bundled model, nothing trained, on a CPU.

    python benchmarks/tiny/ingredients.py          # 10 minutes on two cores

One row an ingredient: its tensors by the MSE fit, everything else in floats; activations and KV cache
with scales calibrated on training text. Measured on held-out text, simulated in transformers; the KV
cache once more with a cache that really holds int8, read token by token.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import environment, write_result

from intaglio import Recipe, calibrate, load_corpus, load_model, load_tokenizer, make_plan, quantize
from intaglio.measure.evaluate import Candidate, evaluate_many, transformers_runtime, transformers_source
from intaglio.measure.int8_cache import int8_source
from intaglio.measure.simulate import decoded_model
from intaglio.plan.plan import Plan
from intaglio.progress import Lines, Progress
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR, TRAIN_TEXT
from intaglio.train.corpus import held_out_windows
from intaglio.train.static import attach_static, read_scales, switch_static

# Ingredient -> rules of recipe `mobile` whose tensors are quantized; the others stay bfloat16.
WEIGHTS = {
    "2-bit MLP, KV-shared layers": ("mlp_late",),
    "4-bit MLP, other layers": ("mlp_early",),
    "2-bit embedding and head": ("token_embedding", "head"),
    "4-bit attention": ("attention",),
    "4-bit PLE table": ("ple_embedding",),
    "8-bit PLE linears": ("ple_linear",),
}
EMBEDDINGS = ("token_embedding", "head")
WEIGHTS["all weights"] = tuple(rule for rules in WEIGHTS.values() for rule in rules)
WEIGHTS["all weights, 4 bits instead of 2"] = WEIGHTS["all weights"]


def weights_plan(name: str) -> Plan:
    """Recipe `mobile` with just this ingredient."""
    rules = [rule.name for rule in Recipe.load("mobile").rules if rule.name not in WEIGHTS[name]]
    changes = [f"weights.{rule}.grid=bf16" for rule in rules]
    if "instead" in name:
        changes += [f"weights.{rule}.grid=int4" for rule in ("mlp_late", *EMBEDDINGS)]
    return make_plan(MODEL_DIR, Recipe.load("mobile", changes))


def calibrated(teacher: Any, plan: Plan) -> Any:
    """The original with static scales on its float weights."""
    model = copy.deepcopy(teacher)
    attach_static(model, plan)
    schedule = plan.recipe.schedule
    corpus = load_corpus(
        TRAIN_TEXT,
        load_tokenizer(MODEL_DIR),
        sequence_length=schedule.sequence_length,
        vocab_size=plan.model.config["vocab_size"],
        max_tokens=schedule.calibration_tokens,
    )
    tokens, positions = (torch.from_numpy(array).long() for array in (corpus.tokens, corpus.positions))
    calibrate(model, plan, list(zip(tokens.split(8), positions.split(8), strict=True)))
    return model


def candidates(teacher: Any, windows_NT: Tensor, folder: Path) -> dict[str, Candidate]:
    """A logit source for every row."""
    sources: dict[str, Any] = {}
    for name in WEIGHTS:
        packed = quantize(MODEL_DIR, weights_plan(name), folder / name)
        sources[name] = transformers_source(decoded_model(teacher, packed))
    plan = make_plan(MODEL_DIR, "mobile")
    for name, on in {"8-bit activations": (True, False), "8-bit KV cache": (False, True)}.items():
        model = calibrated(teacher, plan)
        switch_static(model, activations=on[0], kv_cache=on[1])
        sources[name] = transformers_source(model)
    model = calibrated(teacher, plan)
    switch_static(model, activations=False, kv_cache=False)
    sources["8-bit KV cache, decoded from int8"] = int8_source(model, windows_NT, read_scales(model, plan))
    runtime = transformers_runtime()
    return {name: Candidate(source=source, runtime=runtime, simulated=True) for name, source in sources.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="held-out tokens")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "tiny_mobile_parts.json")
    options = parser.parse_args()
    teacher, tokenizer = load_model(MODEL_DIR), load_tokenizer(MODEL_DIR)
    windows = held_out_windows(
        HELDOUT_TEXT, tokenizer, length=256, max_tokens=options.tokens, vocab_size=teacher.config.vocab_size
    )
    windows_NT = torch.from_numpy(windows).long()
    with tempfile.TemporaryDirectory() as folder:
        made = candidates(teacher, windows_NT, Path(folder))
        results = evaluate_many(
            transformers_source(teacher),
            made,
            windows_NT,
            Progress(Lines(print)),
        )
    print()
    for name, c in results.items():
        print(f"{name:36} KL {c.kl_mean_nats:.5f} +- {c.kl_mean_ci_nats:.5f}  same top {c.same_top_share:.2%}")
    rows = [{"name": name, **comparison.to_dict()} for name, comparison in results.items()]
    write_result(options.out, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
