"""Time and memory of a training step at real shapes beside plain fine-tuning, on one GPU or several, with random weights.

    python benchmarks/scale_step.py e2b:4:2048 e2b:1:2048 --out one.json
    torchrun --nproc-per-node 2 benchmarks/scale_step.py 12b:4:2048:checkpointing --out two.json

A case is model:sequences:tokens, then any of these flags:

    checkpointing, compiled, mobile    how it is trained; `tail`: with frozen codes
    gathered                           of several GPUs: weights stay whole from forward to backward, the teacher's for good
    plain, ours                        only this of the two
    turns                              both in memory, a step of each in turn: a busy host then disturbs both alike
    profile                            name the kernels that take most of a step

Plain fine-tuning is the same model, teacher and loss with torch's fused AdamW on bfloat16 weights. Both take the same
steps after warm-up; times are medians, with quartiles.
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
from intaglio.train.sharding import allocate, is_main, keep_gathered, like, local, shard, start_processes, world_size
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


class Training:
    """One kind of training, plain or ours, built and ready to step; it keeps the seconds of its steps."""

    def __init__(self, kind: str, plan: Plan, sequences: int, tokens: int, flags: set[str], device: torch.device):
        self.kind, self.plan, self.shape, self.flags, self.device = kind, plan, (sequences, tokens), flags, device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        dtype, began = torch.bfloat16, time.perf_counter()
        original = random_model(plan.model.config, device, dtype)
        student, self.optimizer = self.prepared(original) if kind == "ours" else self.plain(original)
        synchronize(device)
        self.build_s = time.perf_counter() - began
        if plan.recipe.schedule.gathered:
            keep_gathered(student, original)
        set_layers(student, checkpointing="checkpointing" in flags, compiled="compiled" in flags)
        set_layers(original, compiled="compiled" in flags)
        softcap = getattr(student.config, "final_logit_softcapping", None)
        self.lesson, self.teach = Distiller(student, softcap, device.type == "cuda"), Teacher(original, dtype)
        seed = torch.distributed.get_rank() if world_size() > 1 else 0
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.learning: list[float] = []
        self.stepping: list[float] = []
        self.losses: list[torch.Tensor] = []

    def prepared(self, original: Any) -> tuple[Any, Any]:
        """The student on its grids, and the optimizer of its latents."""
        latents = prepare(plain_student(original, self.plan), self.plan, fit=fit_absmax)  # quick; a step costs the same
        scales = {scale.name: 0.05 for scale in self.plan.static_scales if scale.owned}
        put_scales(latents.model, self.plan, scales)
        if "tail" in self.flags:
            latents.freeze_codes()
        return latents.model, make_optimizer(latents, self.plan.recipe.schedule)

    def plain(self, original: Any) -> tuple[Any, Any]:
        student = plain_student(original, self.plan)
        return student, PlainAdamW(student)

    def learn(self) -> None:
        """Forward and backward of one batch of random tokens."""
        vocabulary, tokens = self.plan.model.layer_config.vocab_size, self.shape[1]
        ids = torch.randint(5, vocabulary, self.shape, device=self.device, generator=self.generator)
        positions = torch.arange(tokens, device=self.device).expand(ids.shape)
        with torch.no_grad():
            taught = self.teach(ids, positions)
        loss = self.lesson(ids, positions, *taught)
        loss.backward()
        self.losses.append(loss.detach())

    def step(self) -> None:
        self.learning.append(timed(self.learn, self.device))
        self.stepping.append(timed(self.optimizer.step, self.device))

    def result(self, alone: bool) -> dict[str, Any]:
        """Times in seconds after warm-up. alone: no other training was in memory, so the peak is this one's."""
        whole = [a + b for a, b in zip(self.learning, self.stepping, strict=True)]
        late = whole[WARM_UP:]
        quartiles = statistics.quantiles(late, n=4) if len(late) > 1 else late * 3
        return {
            "kind": self.kind,
            "step_s": quartiles[1],
            "step_quartiles_s": [quartiles[0], quartiles[2]],
            "optimizer_s": statistics.median(self.stepping[WARM_UP:]),
            "tokens_per_s": self.shape[0] * self.shape[1] * world_size() / quartiles[1],
            "peak_bytes": torch.cuda.max_memory_allocated() if alone and self.device.type == "cuda" else None,
            "build_s": self.build_s,
            "first_step_s": whole[0],
            "loss": [float(self.losses[0]), float(self.losses[-1])],
        }


def measure(kinds: list[str], steps: int, *how: Any) -> dict[str, dict[str, Any]]:
    """Steps of these kinds of training, in turns; what each took."""
    trainings = [Training(kind, *how) for kind in kinds]
    for _ in range(WARM_UP + steps):
        for training in trainings:
            training.step()
    results = {training.kind: training.result(len(kinds) == 1) for training in trainings}
    for training in trainings:
        if "profile" in training.flags and is_main():
            print(training.kind, profiled(training.step), sep="\n", flush=True)
    return results


def described(row: dict[str, Any], planned_bytes: int) -> str:
    """One line of a result."""
    if "error" in row:
        return str(row["error"])
    peak = f"{row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else "not told"
    return (
        f"step {row['step_s'] * 1e3:.0f} ms {[round(q * 1e3) for q in row['step_quartiles_s']]}, optimizer "
        f"{row['optimizer_s'] * 1e3:.1f} ms, {row['tokens_per_s']:,.0f} tokens/s, peak {peak} (planned "
        f"{planned_bytes / 1e9:.1f}), built in {row['build_s']:.0f} s, first step {row['first_step_s']:.0f} s, "
        f"loss {row['loss']}"
    )


def run_case(case: str, steps: int, device: torch.device, changes: list[str]) -> dict[str, Any]:
    model, sequences, tokens, *flags = case.split(":")
    path = Path(model)
    config = json.loads(path.read_text()) if path.suffix == ".json" else bundled_config(f"gemma-4-{model}")
    schedule = [f"schedule.batch_size={int(sequences) * world_size()}", f"schedule.sequence_length={tokens}", *changes]
    schedule += [f"schedule.gathered={'gathered' in flags}".lower()]
    plan = make_plan(text_config(config), Recipe.load("mobile" if "mobile" in flags else "q4_0", schedule))
    planned = training_memory(
        plan, gpus=world_size(), gradient_checkpointing="checkpointing" in flags, compiled="compiled" in flags
    )
    found: dict[str, Any] = {
        "case": case,
        "gpus": world_size(),
        "planned_bytes": planned.total,
        "planned": planned.rows,
    }
    wanted = [kind for kind in ("plain", "ours") if kind in flags] or ["plain", "ours"]
    for kinds in [wanted] if "turns" in flags else [[kind] for kind in wanted]:
        try:
            found |= measure(kinds, steps, plan, int(sequences), int(tokens), set(flags), device)
        except (RuntimeError, ValueError) as error:  # out of memory, most of all
            found |= {kind: {"error": f"{type(error).__name__}: {error}"[:400]} for kind in kinds}
        for kind in kinds if is_main() else ():
            print(case, kind, described(found[kind], planned.total), flush=True)
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
