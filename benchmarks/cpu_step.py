"""A training step on a CPU: fake-quantized by intaglio against plain float fine-tuning, torchao beside it.

    python benchmarks/cpu_step.py --models tiny   # 17 minutes on two cores; both models without it
    python benchmarks/cpu_step.py --quick         # one setting

A step is what a training loop does: forward, loss, backward, gradient clipping, AdamW. The four
students are copies of one model, train the same parameters and see the same tokens:

    float     the model as it is
    intaglio  recipe q4_0: canonical Q4_0 linears with learned scales, Q6_K embeddings, rounded float
              leftovers; weights decoded once a step (`StepWeights`), as the package's own loop does
    compiled  the same through torch.compile, as `train --compile` does on a CPU: quantizer and loss
    torchao   the same linears with torchao's int4 QAT, symmetric, group 32 (embeddings stay float)

Losses: "ce", next-token cross-entropy; "kl", the package's chunked KL to an online teacher, whose
forward all four pay for. Ratios against float are taken within one round (float, intaglio, compiled,
torchao, float, ...) and their median is reported with the quartiles: absolute times on a shared machine are
not worth printing to the digit. "saved" counts, by saved_tensors_hooks, the bytes of every distinct
storage that autograd keeps for the backward, the model's own parameters and buffers not counted;
"held" are the decoded weights that intaglio keeps until the optimizer has stepped.

Models: the bundled tiny Gemma 4 (hidden 256, 8 layers, 8.5 M parameters) and a random one of twice
the width (hidden 512, MLP 2048, 8 layers, 34 M parameters).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import environment, write_result
from intaglio.train.decode import StepWeights
from torch import Tensor, nn

from intaglio import load_model, make_plan
from intaglio.plan.family import build_meta_model, load_config
from intaglio.plan.plan import Plan
from intaglio.plan.recipe import Recipe
from intaglio.tiny import MODEL_DIR
from intaglio.train.distill import chunked_kl
from intaglio.train.lesson import final_hidden, head_weight
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

    def __init__(self, model: nn.Module, recipe: Recipe, decodes: bool, compiled: bool):
        self.model, self.decodes, self.compiled = model, decodes, compiled
        self.weights = StepWeights(model)
        self.optimizer = make_optimizer(model, recipe.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-5
        self.softcap = model.config.final_logit_softcapping

    def step(self, tokens_BT: Tensor, teacher: nn.Module | None, dtype: torch.dtype) -> None:
        if self.decodes:
            self.weights.decode(dtype)
        with self.weights.dropped_by_backward() if self.decodes else nullcontext():
            self.backward(tokens_BT, teacher, dtype)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.decodes:
            self.weights.drop()

    def backward(self, tokens_BT: Tensor, teacher: nn.Module | None, dtype: torch.dtype) -> None:
        with self.weights.in_graph(dtype) if self.compiled else nullcontext():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = self.cross_entropy(tokens_BT) if teacher is None else self.kl(tokens_BT, teacher, dtype)
            loss.backward()

    def cross_entropy(self, tokens_BT: Tensor) -> Tensor:
        logits_BTV = self.model(input_ids=tokens_BT, use_cache=False).logits.float()
        return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())

    def kl(self, tokens_BT: Tensor, teacher: nn.Module, dtype: torch.dtype) -> Tensor:
        positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
        with torch.no_grad():
            teacher_hidden = final_hidden(teacher, tokens_BT, positions_BT).to(dtype).flatten(0, 1)
        hidden = final_hidden(self.model, tokens_BT, positions_BT).to(dtype).flatten(0, 1)
        heads = head_weight(self.model, dtype), head_weight(teacher, dtype)
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


def students(teacher: nn.Module, plan: Plan) -> dict[str, Student]:
    makers: dict[str, Callable[[nn.Module, Plan], nn.Module]] = {
        "float": float_student,
        "intaglio": build_student,
        "compiled": partial(build_student, compiled=True),
        "torchao": torchao_student,
    }
    ours = "intaglio", "compiled"
    return {n: Student(make(teacher, plan), plan.recipe, n in ours, n == "compiled") for n, make in makers.items()}


def measure(teacher: nn.Module, plan: Plan, batch: tuple[int, int], loss: str, dtype: torch.dtype, rounds: int) -> dict:
    arms = students(teacher, plan)
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
        row[name]["saved_bytes"], row[name]["held_bytes"] = saved_bytes(student, tokens_BT, online, dtype)
    return row


def saved_bytes(student: Student, tokens_BT: Tensor, teacher: nn.Module | None, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of distinct storages kept for the backward, and of weights decoded for the step."""
    if student.decodes:
        student.weights.decode(dtype)
    decoded = decoded_storages(student.model)
    own = {t.untyped_storage().data_ptr() for t in (*student.model.parameters(), *student.model.buffers())}
    known = own | set(decoded)
    kept: dict[int, Any] = {}  # the storages themselves, so that none is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student.backward(tokens_BT, teacher, dtype)
    student.optimizer.zero_grad(set_to_none=True)
    if student.decodes:
        student.weights.drop()
    return sum(storage.nbytes() for storage in kept.values()), sum(decoded.values())


def decoded_storages(model: nn.Module) -> dict[int, int]:
    """Address and bytes of what `StepWeights` left in the modules."""
    cached = [getattr(m, name, None) for m in model.modules() for name in ("values", "steps", "rounded")]
    quantizers = (getattr(m, "scales", None) for m in model.modules())
    tensors = [t for t in cached if isinstance(t, Tensor)] + [t for s in quantizers if s is not None for t in s]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


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
