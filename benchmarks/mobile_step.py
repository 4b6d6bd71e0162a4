"""Memory and time of a training step in the mobile format, at the shape of Gemma 4 E2B.

    python benchmarks/mobile_step.py --out benchmarks/results/mobile_step.json

Whole optimizer steps, as the training loop does them: forward, KL over the full vocabulary, backward, clipping, AdamW.
Each row of the mobile recipe (2-, 4- and 8-bit weights, int8 activations and KV cache, all scales learned, float32
latents behind bfloat16 weights) stands beside plain fine-tuning of the same bfloat16 model with fused AdamW and the same
loss in the same run. Random weights; the teacher's hidden states are given, so that no teacher takes memory. The table of
per-layer embeddings, which neither trains, is taken off both peaks.

`--modes compiled` is the loop's way on a GPU, `eager` its way elsewhere. `--toy` runs all of it at toy size on any device.
"""

import argparse
import gc
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import environment, write_result
from gpu_step import e2b_config, median_ms, random_model
from torch import Tensor, nn

from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.plan.schedule import Schedule
from intaglio.train.latents import Latents, prepare
from intaglio.train.layers import set_layers
from intaglio.train.lesson import Distiller
from intaglio.train.optimizer import make_optimizer
from intaglio.train.static import put_scales

# Sequences of a step, and whether decoder layers are computed again in the backward.
CASES = ((1, True), (4, True), (1, False))
STATIC_SCALE = 0.04  # of activations with a root mean square of 1: clips at five of these
CLIP = 1.0


class Training:
    """A model with its optimizer and the loss of one batch; `step` is measured."""

    def __init__(self, made: Any, compiled: bool):
        self.quantized = isinstance(made, Latents)
        self.model = made.model if self.quantized else made
        softcap = self.model.config.final_logit_softcapping
        self.distiller = Distiller(self.model, softcap, compiled)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer = (
            make_optimizer(made, Schedule(lr=1e-6, scale_lr=1e-6))
            if self.quantized
            else torch.optim.AdamW(trained, lr=1e-6, fused=True)
        )

    def step(self, input_ids: Tensor, positions: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> None:
        self.distiller(input_ids, positions, teacher_hidden, teacher_head).backward()
        if not self.quantized:  # ours clips the gradient of its latents
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def trainable_model(config: Any, device: str) -> nn.Module:
    """Random bfloat16 weights; the table of per-layer embeddings is frozen."""
    model = random_model(config, device, torch.bfloat16)
    model.get_input_embeddings().weight.requires_grad_(True)  # type: ignore[operator]
    return model


def table_gb(model: nn.Module) -> float:
    """The table of per-layer embeddings."""
    table = model.model.embed_tokens_per_layer  # type: ignore[union-attr]
    return sum(tensor.nbytes for tensor in (*table.parameters(), *table.buffers())) / 2**30


def quantize(model: nn.Module, plan: Plan) -> Latents:
    """Put the model on the plan's grids, every static scale switched on and learned."""
    latents = prepare(model, plan)
    put_scales(model, plan, {scale.name: STATIC_SCALE for scale in plan.static_scales if scale.owned})
    return latents


def batch(config: Any, model: nn.Module, sequences: int, length: int) -> tuple[Tensor, ...]:
    """Arguments of `Training.step`: random tokens and a random teacher."""
    head = model.get_output_embeddings().weight.detach()  # type: ignore[operator]
    ids = torch.randint(3, config.vocab_size, (sequences, length), device=head.device)
    positions = torch.arange(length, device=head.device).expand(sequences, -1)
    hidden = torch.randn(sequences * length, config.hidden_size, device=head.device, dtype=torch.bfloat16)
    return ids, positions, hidden, head.bfloat16()


def measure(
    training: Training, config: Any, compiled: bool, length: int, repeats: int
) -> dict[tuple[int, bool], dict[str, float]]:
    """Milliseconds, peak and base memory without the table of per-layer embeddings, for every case."""
    rows = {}
    for sequences, checkpointing in CASES:
        set_layers(training.model, checkpointing=checkpointing, compiled=compiled)
        arguments = batch(config, training.model, sequences, length)
        ms, peak, base = median_ms(partial(training.step, *arguments), repeats)
        row = {"ms": ms}
        if torch.cuda.is_available():
            table = table_gb(training.model)
            row |= {"peak_gb": peak - table, "base_gb": base - table}
        rows[sequences, checkpointing] = row
        what = "mobile" if training.quantized else "plain"
        print(what, sequences, "checkpointed" if checkpointing else "kept", rounded(row), flush=True)
    return rows


def compare(config: Any, device: str, compiled: bool, length: int, repeats: int) -> list[dict[str, Any]]:
    """Plain fine-tuning, then the same model in the mobile format; ratios are to plain."""
    plan = make_plan(config.to_dict(), Recipe.load("mobile", ["fit=absmax"]))
    measured = {}
    for quantized in (False, True):
        model = trainable_model(config, device)
        made = quantize(model, plan) if quantized else model
        measured[quantized] = measure(Training(made, compiled), config, compiled, length, repeats)
        del model, made
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    rows = []
    for case, mobile in measured[True].items():
        plain = measured[False][case]
        ratios = {f"{key}_ratio": mobile[key] / plain[key] for key in plain.keys() & {"ms", "peak_gb"}}
        where = {"mode": "compiled" if compiled else "eager", "batch": case[0], "checkpointing": case[1]}
        rows.append(where | {"plain": plain, "mobile": mobile} | ratios)
    return rows


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    result: dict[str, Any] = {"device": name, "environment": environment(), "rows": []}
    config, length = e2b_config(args.toy), 64 if args.toy else 2048
    for mode in args.modes:
        for row in compare(config, device, mode == "compiled", length, args.repeats):
            result["rows"].append(rounded(row))
            print(json.dumps(result["rows"][-1]), flush=True)
        write_result(args.out, result)


if __name__ == "__main__":
    main()
