"""QAT of the bundled model under many settings, one after the other, on one device.

    python benchmarks/tiny/sweep.py --jobs benchmarks/tiny/jobs.json --out out --seconds 500

A job is {"name", "recipe", "set": ["schedule.lr=1e-4", ...], "hidden_loss": 0.1, "compile": false};
all but the name may be missing. Reports the KL to the float original on held-out text for each recipe's
references, which are not trained (stock or absmax rounding, and the fit alone), and after training, with
what that recovers of either: R = 1 - KL / KL(reference). Rows go to `sweep.jsonl` as they come; a job
that does not fit the time left is named and left out.

hidden_loss: weight of one more term, the squared error of the last hidden state relative to its mean
square; the library's loop has no such loss.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from intaglio import calibrate
from intaglio.formats.table import format_of
from intaglio.packed.checkpoint import load_model
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.progress import StepInfo
from intaglio.tiny import MODEL_DIR
from intaglio.train import loop
from intaglio.train.corpus import Corpus
from intaglio.train.latents import prepare
from intaglio.train.loop import train
from intaglio.train.options import Options
from intaglio.train.run_folder import read_losses
from intaglio.train.static import switch_static

BOS = 2


def sequences(stream: np.ndarray, length: int) -> np.ndarray:
    """Cut a token stream into rows of `length`, int32 [N, T]."""
    return stream[: len(stream) // length * length].reshape(-1, length).astype(np.int32)


def positions_of(tokens_NT: np.ndarray, documents: bool) -> np.ndarray:
    """Position ids: restarting at each document if `documents`, else running through a row."""
    count = np.broadcast_to(np.arange(tokens_NT.shape[1], dtype=np.int32), tokens_NT.shape)
    if not documents:
        return count.copy()
    starts = np.where(tokens_NT == BOS, count, 0)
    return (count - np.maximum.accumulate(starts, axis=1)).astype(np.int32)


@torch.no_grad()
def evaluate(teacher: nn.Module, student: nn.Module, windows_NT: Tensor, batch: int) -> dict[str, float]:
    """Mean KL in nats with the 95% interval of window means, same-top share and perplexities."""
    kls, tops, nlls, teacher_nlls = [], [], [], []
    for rows in windows_NT.split(batch):
        log_p = teacher(rows, use_cache=False).logits.float().log_softmax(-1)[:, :-1]
        log_q = student(rows, use_cache=False).logits.float().log_softmax(-1)[:, :-1]
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1).mean(-1))
        tops.append((log_p.argmax(-1) == log_q.argmax(-1)).float().mean(-1))
        labels = rows[:, 1:, None]
        nlls.append(-log_q.gather(-1, labels).mean((1, 2)))
        teacher_nlls.append(-log_p.gather(-1, labels).mean((1, 2)))
    kl, top, nll, teacher_nll = (torch.cat(x).double() for x in (kls, tops, nlls, teacher_nlls))
    return {
        "kl": kl.mean().item(),
        "kl_ci95": 1.96 * kl.std().item() / math.sqrt(len(kl)),
        "same_top": top.mean().item(),
        "perplexity": math.exp(nll.mean().item()),
        "teacher_perplexity": math.exp(teacher_nll.mean().item()),
    }


class HiddenLoss(loop.Distiller):
    """The loop's KL plus `weight` times the relative squared error of the last hidden state."""

    weight = 0.0

    def loss(self, hidden: Tensor, *lesson: Tensor | None) -> Tensor:
        teacher_hidden = lesson[2]
        assert teacher_hidden is not None
        teacher = teacher_hidden.float()
        apart = (hidden.float() - teacher).square().mean() / teacher.square().mean()
        return super().loss(hidden, *lesson) + self.weight * apart


def reference(teacher: nn.Module, plan: Plan, corpus: Corpus) -> nn.Module:
    """The model after the recipe's fit alone, static scales calibrated."""
    student = prepare(copy.deepcopy(teacher).requires_grad_(True), plan).model
    if plan.static_scales:
        rows = plan.recipe.schedule.calibration_tokens // corpus.tokens.shape[1]
        device = next(teacher.parameters()).device
        tokens, positions = (torch.from_numpy(a[:rows]).long().to(device) for a in (corpus.tokens, corpus.positions))
        calibrate(student, plan, list(zip(tokens.split(16), positions.split(16), strict=True)))
    return student.eval()


def steady_rate(steps: list[StepInfo]) -> float:
    """Tokens a second between the first and the last quarter: compilation comes before and between."""
    early, late = steps[len(steps) // 4], steps[3 * len(steps) // 4]
    return (late.tokens - early.tokens) / (late.seconds - early.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=Path, default=Path(".data/tokens.npz"))
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--jobs", type=Path, required=True)
    parser.add_argument("--part", default="0/1", help="i/n: every n-th job from the i-th; run n such processes at once")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--windows", type=int, default=512)
    parser.add_argument("--eval-batch", type=int, default=64)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096

    with np.load(args.tokens) as arrays:
        stream = arrays["train"]
        heldout = np.concatenate([arrays[name] for name in arrays.files if name != "train"])
    rng = np.random.default_rng(0)
    windows = sequences(heldout, 512)
    windows = torch.from_numpy(windows[rng.permutation(len(windows))[: args.windows]]).long().to(device)
    teacher = load_model(args.model).to(device)

    def write(row: dict) -> None:
        with open(args.out / "sweep.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{time.perf_counter() - began:6.0f} s",
            json.dumps({k: v for k, v in row.items() if k != "losses"}),
            flush=True,
        )

    def measure(student: nn.Module, plan: Plan) -> dict[str, float]:
        result = evaluate(teacher, student.eval(), windows, args.eval_batch)
        if plan.static_scales:
            switch_static(student, activations=False, kv_cache=False)
            off = evaluate(teacher, student, windows, args.eval_batch)
            result |= {"kl_static_off": off["kl"], "same_top_static_off": off["same_top"]}
        return result

    known: dict[tuple[str, str], dict[str, float]] = {}

    def references(recipe: Recipe, corpus: Corpus) -> dict[str, float]:
        """KL without training of anyone's rounding and of the recipe's fit; measured once for a set of grids."""
        fit = make_plan(args.model, recipe)
        stock = make_plan(args.model, format_of(fit).stock_recipe(recipe))
        kls = {}
        for name, plan in {"stock": stock, "fit": fit}.items():
            key = (plan.recipe.fit, plan.layout_digest)
            if key not in known:
                known[key] = measure(reference(teacher, plan, corpus), plan)
                write({"name": f"{plan.recipe.name}, {name}, not trained", **known[key]})
            kls[name] = known[key]["kl"]
        return kls

    rate, plain_loss = 0.0, loop.Distiller
    index, parts = map(int, args.part.split("/"))
    for job in json.loads(args.jobs.read_text("utf-8"))[index::parts]:
        recipe = Recipe.load(job.get("recipe", "q4_0"), job.get("set", []))
        left = args.seconds - (time.perf_counter() - began)
        if rate and recipe.schedule.tokens / rate + 6 > left:
            write({"name": job["name"], "left out": f"{left:.0f} s left"})
            continue
        tokens = sequences(stream, recipe.schedule.sequence_length)
        corpus = Corpus(tokens=tokens, positions=positions_of(tokens, job.get("documents", False)), source="tokens")
        untrained = references(recipe, corpus)
        HiddenLoss.weight = job.get("hidden_loss", 0.0)
        loop.Distiller = HiddenLoss if HiddenLoss.weight else plain_loss  # type: ignore[misc]
        run_dir = args.out / "runs" / job["name"].replace(" ", "-")
        plan = make_plan(args.model, recipe)
        start = time.perf_counter()
        steps: list[StepInfo] = []
        options = Options(compiled=job.get("compile", args.compile))
        student = train(teacher, plan, corpus, run_dir, options=options, on_step=steps.append).model
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        losses = read_losses(run_dir)
        rate = steady_rate(steps)
        result = measure(student, plan)
        write(
            {
                "name": job["name"],
                **{f"recovered_{name}": 1 - result["kl"] / kl for name, kl in untrained.items()},
                **result,
                "recipe": recipe.name,
                "set": job.get("set", []),
                "hidden_loss": HiddenLoss.weight,
                "seconds": seconds,
                "tokens_per_second": rate,
                "losses": [[r["tokens"], round(r["loss"], 5)] for r in losses[:: max(1, len(losses) // 60)]],
            }
        )


if __name__ == "__main__":
    main()
