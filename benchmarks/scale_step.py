"""A training step at real shapes: ours beside plain fine-tuning, on one GPU or several, random weights, KL to the teacher.

    python benchmarks/scale_step.py e2b:4:2048 e2b:1:2048 --out one.json
    torchrun --nproc-per-node 2 benchmarks/scale_step.py 12b:4:2048:checkpointing --out two.json

A case is model:sequences:tokens, then any of `checkpointing`, `compiled`, `mobile`, `tail` (codes frozen), `plain` (only plain
fine-tuning), `ours` (only ours) and `profile` (name the kernels that take most of a step). Plain fine-tuning is the same model, teacher and loss with torch's fused AdamW on
bfloat16 weights. Both take the same steps after warm-up; times are medians, with quartiles.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from intaglio.numerics.fit import fit_absmax
from intaglio.plan.bundled import bundled_config
from intaglio.plan.family import text_config, transformers_config
from intaglio.plan.memory import training_memory
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.latents import owners_of, prepare
from intaglio.train.layers import set_layers
from intaglio.train.lesson import Distiller, Teacher
from intaglio.train.optimizer import make_optimizer
from intaglio.train.sharding import allocate, is_main, like, local, shard, start_processes, world_size
from intaglio.train.static import put_scales

WARM_UP = 3


def random_model(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A text model with random weights whose blocks add little to the residual stream, as those of trained models."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(transformers_config(config), dtype=dtype)
    model.tie_weights()
    model.requires_grad_(False).eval()
    if world_size() > 1:
        shard(model, device)
    allocate(model, device)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        own = local(parameter)
        if "norm" in name:
            own.fill_(0.15 if "post_" in name else 1.0)
        else:
            own.normal_(0, 0.02)
    return model


class PlainAdamW:
    """Fine-tuning without any grid: clip, and AdamW on the model's own weights."""

    def __init__(self, model: nn.Module):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.adam = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def plain_student(original: Any, plan: Plan) -> Any:
    """A copy that trains what the recipe trains."""
    model = deepcopy(original) if world_size() == 1 else like(original, next(original.parameters()).device)
    model.requires_grad_(False).train()
    owners = owners_of(model)
    for tensor in plan:
        value = getattr(*owners[tensor.name])
        if isinstance(value, nn.Parameter):
            value.requires_grad_(tensor.rule.trainable)
    return model


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def profiled(step: Callable[[], Any]) -> str:
    """The kernels of one step, by their time on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return found.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=90)


def measure(
    kind: str, plan: Plan, sequences: int, tokens: int, flags: set[str], steps: int, device: torch.device
) -> dict[str, Any]:
    """Times in seconds and memory in bytes of one kind of training, on this process's GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    dtype, began = torch.bfloat16, time.perf_counter()
    original = random_model(plan.model.config, device, dtype)
    if kind == "ours":
        latents = prepare(plain_student(original, plan), plan, fit=fit_absmax)  # quick; a step costs the same
        student: Any = latents.model
        put_scales(student, plan, {scale.name: 0.05 for scale in plan.static_scales if scale.owned})
        if "tail" in flags:
            latents.freeze_codes()
        optimizer: Any = make_optimizer(latents, plan.recipe.schedule)
    else:
        student = plain_student(original, plan)
        optimizer = PlainAdamW(student)
    synchronize(device)
    built = time.perf_counter() - began
    set_layers(student, checkpointing="checkpointing" in flags, compiled="compiled" in flags)
    set_layers(original, compiled="compiled" in flags)
    lesson = Distiller(student, getattr(student.config, "final_logit_softcapping", None), device.type == "cuda")
    teach = Teacher(original, dtype)
    generator = torch.Generator(device=device).manual_seed(torch.distributed.get_rank() if world_size() > 1 else 0)
    positions = torch.arange(tokens, device=device).expand(sequences, -1)
    vocabulary = plan.model.layer_config.vocab_size
    losses: list[float] = []

    def learn() -> None:
        ids = torch.randint(5, vocabulary, (sequences, tokens), device=device, generator=generator)
        with torch.no_grad():
            taught = teach(ids, positions)
        loss = lesson(ids, positions, *taught)
        loss.backward()
        losses.append(loss.detach())  # type: ignore[arg-type]

    whole: list[float] = []
    stepping: list[float] = []
    for _ in range(WARM_UP + steps):
        first = timed(learn, device)
        second = timed(optimizer.step, device)
        whole.append(first + second)
        stepping.append(second)
    first_step = whole[0]
    del whole[:WARM_UP], stepping[:WARM_UP]
    if "profile" in flags and is_main():
        print(profiled(lambda: (learn(), optimizer.step())), flush=True)
    median = statistics.median(whole)
    quartiles = statistics.quantiles(whole, n=4) if len(whole) > 1 else [median] * 3
    return {
        "kind": kind,
        "step_s": median,
        "step_quartiles_s": [quartiles[0], quartiles[2]],
        "optimizer_s": statistics.median(stepping),
        "tokens_per_s": sequences * tokens * world_size() / median,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "build_s": built,
        "first_step_s": first_step,
        "loss": [float(losses[0]), float(losses[-1])],
    }


def run_case(case: str, steps: int, device: torch.device, changes: list[str]) -> dict[str, Any]:
    model, sequences, tokens, *flags = case.split(":")
    path = Path(model)
    config = json.loads(path.read_text()) if path.suffix == ".json" else bundled_config(f"gemma-4-{model}")
    schedule = [f"schedule.batch_size={int(sequences) * world_size()}", f"schedule.sequence_length={tokens}", *changes]
    plan = make_plan(text_config(config), Recipe.load("mobile" if "mobile" in flags else "q4_0", schedule))
    planned = training_memory(plan, gpus=world_size(), gradient_checkpointing="checkpointing" in flags)
    found: dict[str, Any] = {
        "case": case,
        "gpus": world_size(),
        "planned_bytes": planned.total,
        "planned": planned.rows,
    }
    for kind in ("plain", "ours"):
        if {"plain", "ours"} & set(flags) and kind not in flags:
            continue
        try:
            found[kind] = measure(kind, plan, int(sequences), int(tokens), set(flags), steps, device)
        except (RuntimeError, ValueError) as error:  # out of memory, most of all
            found[kind] = {"error": f"{type(error).__name__}: {error}"[:400]}
        if is_main():
            row = found[kind]
            print(
                case,
                kind,
                row.get("error")
                or (
                    f"step {row['step_s'] * 1e3:.0f} ms {[round(q * 1e3) for q in row['step_quartiles_s']]}, optimizer "
                    f"{row['optimizer_s'] * 1e3:.1f} ms, {row['tokens_per_s']:,.0f} tokens/s, peak "
                    f"{(row['peak_bytes'] or 0) / 1e9:.1f} GB (planned {planned.total / 1e9:.1f}), built in {row['build_s']:.0f} s, "
                    f"first step {row['first_step_s']:.0f} s, "
                    f"loss {row['loss']}"
                ),
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--set", action="append", default=[], help="of the recipe, as `intaglio train` takes it")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = start_processes()
    rows = [run_case(case, arguments.steps, device, arguments.set) for case in arguments.cases]
    if arguments.out is not None and is_main():
        arguments.out.write_text(json.dumps({"torch": torch.__version__, "cases": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
