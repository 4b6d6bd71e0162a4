"""Cost of a training step on a CPU: intaglio and torchao, each against plain float fine-tuning.

    python benchmarks/cpu_step.py --models tiny   # 17 minutes on two cores; both models without it
    python benchmarks/cpu_step.py --quick         # one setting

A step is one pass of a training loop: forward, loss, backward, gradient clipping, AdamW. The four
students are copies of one model, train the same parameters and see the same tokens:

    float     the model as it is
    intaglio  recipe q4_0: canonical Q4_0 linears with learned scales, Q6_K embeddings, rounded float
              leftovers; the model's weights are decoded in the optimizer step (`GridOptimizer`)
    compiled  the same with a compiled loss, as `train --compile` does on a CPU
    torchao   the same linears with torchao's int4 QAT, symmetric, group 32 (embeddings stay float)

There are two losses. "ce" is next-token cross-entropy. "kl" is the package's chunked KL to an online teacher,
whose forward all four pay for. Ratios against float are taken within one round (float, intaglio, compiled,
torchao, float, ...). The script reports their median with the quartiles, because absolute times on a shared
machine mean little. "saved" counts the bytes of every distinct storage that autograd keeps for the backward, by
saved_tensors_hooks. The model's own parameters and buffers do not count. "held" counts the latents that intaglio
has beside the model. Under bfloat16 ours holds its weights in bfloat16; the others
hold them in float32 and run under autocast.

Models: the bundled tiny Gemma 4 (hidden 256, 8 layers, 8.5 M parameters) and a random one of twice
the width (hidden 512, MLP 2048, 8 layers, 34 M parameters).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import environment, write_result
from torch import Tensor, nn

from intaglio import load_model, make_plan
from intaglio.plan.family import build_meta_model, load_config
from intaglio.plan.plan import Plan
from intaglio.plan.recipe import Recipe
from intaglio.tiny import MODEL_DIR
from intaglio.train.distill import chunked_kl
from intaglio.train.latents import Latents
from intaglio.train.lesson import final_hidden
from intaglio.train.optimizer import make_optimizer
from intaglio.train.student import build_student

TARGETS = {(8, 256): 1.10, (1, 256): 1.25}
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}


def wide_model() -> nn.Module:
    """Random weights, with small gains behind each block, so that it computes something tame."""
    config = load_config(MODEL_DIR) | WIDE
    model = build_meta_model(config).to_empty(device="cpu")
    model = type(model)(model.config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                noise * 0.05 if parameter.ndim == 2 else torch.full_like(noise, 0.15 if "post" in name else 1)
            )
    return model.eval()


class Student:
    """One arm of the comparison: a model, its optimizer, and the step."""

    def __init__(self, made: nn.Module | Latents, recipe: Recipe, compiled: bool):
        self.compiled = compiled
        self.model: Any = made.model if isinstance(made, Latents) else made
        self.held_bytes = sum(t.nbytes for t in made.state().values()) if isinstance(made, Latents) else 0
        self.clips = not isinstance(made, Latents)  # ours clips the gradient of its latents itself
        schedule = recipe.schedule
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer = (
            make_optimizer(made, schedule)
            if isinstance(made, Latents)
            else torch.optim.AdamW(trained, betas=schedule.betas, weight_decay=schedule.weight_decay, fused=True)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-5
        self.softcap = self.model.config.final_logit_softcapping

    def step(self, tokens_BT: Tensor, teacher: nn.Module | None, dtype: torch.dtype) -> None:
        self.backward(tokens_BT, teacher, dtype)
        if self.clips:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, tokens_BT: Tensor, teacher: nn.Module | None, dtype: torch.dtype) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16 and self.model.dtype != dtype):
            loss = self.cross_entropy(tokens_BT) if teacher is None else self.kl(tokens_BT, teacher, dtype)
        loss.backward()

    def cross_entropy(self, tokens_BT: Tensor) -> Tensor:
        logits_BTV = self.model(input_ids=tokens_BT, use_cache=False).logits.float()
        return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())

    def kl(self, tokens_BT: Tensor, teacher: nn.Module, dtype: torch.dtype) -> Tensor:
        positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            teacher_hidden = final_hidden(teacher, tokens_BT, positions_BT).to(dtype).flatten(0, 1)
        hidden = final_hidden(self.model, tokens_BT, positions_BT).to(dtype).flatten(0, 1)
        heads = [m.get_output_embeddings().weight.to(dtype) for m in (self.model, teacher)]
        return chunked_kl(hidden, heads[0], teacher_hidden, heads[1], softcap=self.softcap, compiled=self.compiled)


def float_student(teacher: nn.Module, plan: Plan) -> nn.Module:
    """A copy that trains what the plan trains."""
    model = copy.deepcopy(teacher).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(plan[name].rule.trainable)
    return model


def torchao_student(teacher: nn.Module, plan: Plan) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = float_student(teacher, plan)
    weight_config = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    linears = {t.name.removesuffix(".weight") for t in plan if t.grid.ggml_type == "Q4_0"}
    quantize_(model, QATConfig(weight_config=weight_config, step="prepare"), filter_fn=lambda m, name: name in linears)
    return model


def students(teacher: nn.Module, plan: Plan, dtype: torch.dtype) -> dict[str, Student]:
    ours = partial(build_student, dtype=dtype)
    makers: dict[str, Callable[[nn.Module, Plan], nn.Module | Latents]] = {
        "float": float_student,
        "intaglio": ours,
        "compiled": ours,
        "torchao": torchao_student,
    }
    return {name: Student(make(teacher, plan), plan.recipe, name == "compiled") for name, make in makers.items()}


def measure(teacher: nn.Module, plan: Plan, batch: tuple[int, int], loss: str, dtype: torch.dtype, rounds: int) -> dict:
    arms = students(teacher, plan, dtype)
    online = teacher if loss == "kl" else None
    tokens_BT = torch.randint(16, teacher.config.vocab_size, batch, generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 2):
        for name, student in arms.items():
            began = time.perf_counter()
            student.step(tokens_BT, online, dtype)
            if turn >= 2:  # the first two warm caches and make the optimizer's state
                seconds[name].append(time.perf_counter() - began)
    row: dict[str, Any] = {name: {"median_ms": 1e3 * statistics.median(times)} for name, times in seconds.items()}
    for name, student in arms.items():
        ratios = [mine / plain for mine, plain in zip(seconds[name], seconds["float"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row[name] |= {"ratio": middle, "ratio_quartiles": [low, high]}
        row[name]["saved_bytes"] = saved_bytes(student, tokens_BT, online, dtype)
        row[name]["held_bytes"] = student.held_bytes
    return row


def saved_bytes(student: Student, tokens_BT: Tensor, teacher: nn.Module | None, dtype: torch.dtype) -> int:
    """Bytes of distinct storages kept for the backward."""
    known = {t.untyped_storage().data_ptr() for t in (*student.model.parameters(), *student.model.buffers())}
    kept: dict[int, Any] = {}  # the storages themselves, so that none is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student.backward(tokens_BT, teacher, dtype)
    student.optimizer.zero_grad(set_to_none=True)
    return sum(storage.nbytes() for storage in kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny model, 1x256, float32, cross-entropy only")
    parser.add_argument("--rounds", type=int, default=0, help="steps of each arm; default 12 at 8x256, 40 at 1x256")
    parser.add_argument("--models", nargs="+", default=["tiny", "wide"], choices=["tiny", "wide"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_step.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    models = {"tiny": lambda: load_model(MODEL_DIR), "wide": wide_model}
    settings = [
        (name, batch, dtype, loss)
        for name in arguments.models
        for batch in TARGETS
        for dtype in (torch.float32, torch.bfloat16)
        for loss in ("ce", "kl")
    ]
    if arguments.quick:
        settings = [("tiny", (1, 256), torch.float32, "ce")]
    print(
        "model batch  dtype    loss   float ms  intaglio x [quartiles]  compiled x  torchao x   saved: float, intaglio-float; held (MB)"
    )
    rows = []
    for name, batch, dtype, loss in settings:
        teacher = models[name]()
        plan = make_plan(teacher.config.to_dict(), "q4_0")
        rounds = arguments.rounds or (12 if batch[0] > 1 else 40)
        row = measure(teacher, plan, batch, loss, dtype, rounds)
        rows.append({"model": name, "batch": list(batch), "dtype": str(dtype), "loss": loss, "rounds": rounds, **row})
        show(rows[-1])
    if not arguments.quick:
        write_result(arguments.out, {"environment": environment("torchao"), "rows": rows})


def show(row: dict[str, Any]) -> None:
    plain, ours, compiled, theirs = row["float"], row["intaglio"], row["compiled"], row["torchao"]
    low, high = ours["ratio_quartiles"]
    sizes = (plain["saved_bytes"] / 1e6, (ours["saved_bytes"] - plain["saved_bytes"]) / 1e6, ours["held_bytes"] / 1e6)
    print(
        f"{row['model']:5} {row['batch'][0]}x{row['batch'][1]}  {row['dtype'].removeprefix('torch.'):8} {row['loss']}  "
        f"{plain['median_ms']:9.0f}  {ours['ratio']:.3f} [{low:.3f}, {high:.3f}]  {compiled['ratio']:.3f}  "
        f"{theirs['ratio']:.3f}  "
        f"{sizes[0]:8.1f} {sizes[1]:+8.3f} {sizes[2]:8.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
