"""The cost of training on a grid, and of the full-vocabulary KL, on a GPU at the shape of Gemma 4 E2B.

    python benchmarks/gpu_step.py --out benchmarks/results/gpu_step.json

Whole steps of the text model with gradient checkpointing: forward, backward, and AdamW; random weights, loss on the
final hidden states. The steps of each row and those of plain training of the same shape are taken in turns. Ours pull
gradients to float32 latents, step these with GridOptimizer, and decode them into the bfloat16 weights. `optimizer_ms` is
the optimizer step alone. Before them, the KL at 8192 tokens x 262144 entries, chunked and naive.
`--toy` runs all of it at toy size on any device.
"""

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.distill import chunked_kl
from intaglio.train.grid_optimizer import GridOptimizer
from intaglio.train.latents import prepare
from intaglio.train.layers import set_layers

LR = 1e-6
SLIDING, FULL = "sliding_attention", "full_attention"
# embeddings as they are, since torchao leaves them alone too
FROZEN = [
    "weights.token_embedding.trainable=false",
    "weights.token_embedding.grid=f16",
    "weights.ple_embedding.grid=f16",
]


def e2b_config(toy: bool) -> Gemma4TextConfig:
    """Text model of Gemma 4 E2B; `toy` keeps its structure at a hundredth of its width."""
    small = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "head_dim": 32, "ple": 32}
    full = {"vocab_size": 262144, "hidden_size": 1536, "intermediate_size": 6144, "head_dim": 256, "ple": 256}
    size = small if toy else full
    groups = 2 if toy else 7
    return Gemma4TextConfig(
        vocab_size=size["vocab_size"],
        vocab_size_per_layer_input=size["vocab_size"],
        hidden_size=size["hidden_size"],
        intermediate_size=size["intermediate_size"],
        num_hidden_layers=5 * groups,
        num_kv_shared_layers=5 if toy else 20,
        use_double_wide_mlp=True,
        layer_types=([SLIDING] * 4 + [FULL]) * groups,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=size["head_dim"],
        global_head_dim=2 * size["head_dim"],
        hidden_size_per_layer_input=size["ple"],
        sliding_window=512,
        max_position_embeddings=8192,
        final_logit_softcapping=30.0,
        attn_implementation="sdpa",
    )


def random_model(config: Gemma4TextConfig, device: str, linear_dtype: torch.dtype) -> nn.Module:
    """Random weights made on the device: embeddings bfloat16 and frozen, the rest in `linear_dtype`."""
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = Gemma4ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter.requires_grad_(False)
        else:
            parameter.data = parameter.data.to(linear_dtype)
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its tables in float32
    set_layers(model, checkpointing=True)
    return model.train()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_ms(run: Callable[[], None], repeats: int) -> tuple[float, float, float]:
    """Median milliseconds, and peak and base memory in GB, after two warm-up runs."""
    for _ in range(2):
        run()
    gc.collect()
    synchronize()
    base = 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return statistics.median(times), peak / 2**30, base / 2**30


class Step:
    """Forward, backward and optimizer step of a model; `optimizer_ms` has the milliseconds of the last of these."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, autocast: bool = False):
        self.model, self.optimizer, self.autocast = model, optimizer, autocast
        self.optimizer_ms: list[float] = []

    def __call__(self, ids: Tensor) -> None:
        with torch.autocast(ids.device.type, torch.bfloat16) if self.autocast else nullcontext():
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()
        synchronize()
        start = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize()
        self.optimizer_ms.append(1e3 * (time.perf_counter() - start))


def plain(model: nn.Module, autocast: bool = False) -> Step:
    """Plain fine-tuning of what the model trains, with fused AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return Step(model, torch.optim.AdamW(trained, lr=LR, fused=True), autocast)


def in_turns(runs: list[Callable[[], None]], repeats: int) -> list[list[float]]:
    """Milliseconds of each run, taken in turns, so that what else the machine does meets all alike."""
    for run in (*runs, *runs):
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, mine in zip(runs, times, strict=True):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            mine.append(1e3 * (time.perf_counter() - start))
    return times


def compare(
    write: Callable[..., None],
    name: str,
    step: Step,
    plains: dict[str, Step],
    batches: dict[int, Tensor],
    repeats: int,
) -> None:
    """Rows of `name` beside each plain training; the ratio is the median of pairs of steps."""
    for b, ids in batches.items():
        ms, *others = in_turns([partial(run, ids) for run in (step, *plains.values())], repeats)
        for beside, plain_ms in zip(plains, others, strict=True):
            pairs = [mine / other for mine, other in zip(ms, plain_ms, strict=True)]
            low, middle, high = statistics.quantiles(pairs, n=4)
            write(
                name=name,
                batch=b,
                beside=beside,
                ms=statistics.median(ms),
                plain_ms=statistics.median(plain_ms),
                optimizer_ms=statistics.median(step.optimizer_ms[-repeats:]),
                plain_optimizer_ms=statistics.median(plains[beside].optimizer_ms[-repeats:]),
                ratio=middle,
                ratio_quartiles=[round(low, 4), round(high, 4)],
            )


def measure_steps(write: Callable[..., None], device: str, toy: bool, repeats: int) -> None:
    config = e2b_config(toy)
    length = 64 if toy else 2048
    batches = {b: torch.randint(0, config.vocab_size, (b, length), device=device) for b in (1, 4)}
    for measure in (on_the_grid, torchao_steps):
        measure(write, config, batches, repeats)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def on_the_grid(write: Callable[..., None], config: Gemma4TextConfig, batches: dict[int, Tensor], repeats: int) -> None:
    """A step of the training loop beside plain bfloat16, and beside float32 weights under autocast."""
    device = batches[1].device.type
    bf16 = random_model(config, device, torch.bfloat16)
    plains = {
        "plain bfloat16": plain(bf16),
        "plain float32, autocast": plain(random_model(config, device, torch.float32), autocast=True),
    }
    plan = make_plan(config.to_dict(), Recipe.load("q4_0", FROZEN))
    latents = prepare(copy.deepcopy(bf16), plan, fit=_quick_fit)
    ours = Step(latents.model, GridOptimizer(latents, torch.optim.AdamW, lr=LR, scale_lr=LR, fused=True))
    compare(write, "intaglio q4_0", ours, plains, batches, repeats)


def _quick_fit(values: Tensor, grid):  # type: ignore[no-untyped-def]
    """Scales for a benchmark: the widest step, on the grid; a search would only cost time here."""
    from intaglio.numerics.steps import from_steps

    values = values.float()
    step = grid.blocks(values).abs().amax(-1) / grid.code_min
    if grid.super_block is not None:
        step = torch.full_like(step, 2.0**-9)
    step = grid.round_step(step)
    return from_steps(grid, grid.encode(values, step), step)


def torchao_steps(
    write: Callable[..., None], config: Gemma4TextConfig, batches: dict[int, Tensor], repeats: int
) -> None:
    name = "torchao int4 group 32, bfloat16"
    try:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    except ImportError as error:
        write(name=name, error=str(error))
        return
    model = random_model(config, batches[1].device.type, torch.bfloat16)
    quantized = copy.deepcopy(model)
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    is_linear = lambda module, name: isinstance(module, nn.Linear)  # noqa: E731
    quantize_(quantized.model, QATConfig(weight_config=weights, step="prepare"), filter_fn=is_linear)
    compare(write, name, plain(quantized), {"plain bfloat16": plain(model)}, batches, repeats)


def measure_kl(write: Callable[..., None], device: str, toy: bool, repeats: int) -> None:
    """Chunked KL with the gradient in the forward, against autograd over all logits at once."""
    tokens, width, vocabulary = (256, 64, 512) if toy else (8192, 1536, 262144)
    hidden = torch.randn(tokens, width, device=device, dtype=torch.bfloat16).requires_grad_()
    teacher_hidden = hidden.detach() + 0.1 * torch.randn_like(hidden)
    head = (0.02 * torch.randn(vocabulary, width, device=device)).bfloat16()
    trained_head = head.clone().requires_grad_()

    def chunked(student_head: Tensor) -> None:
        chunked_kl(hidden, student_head, teacher_hidden, head, softcap=30.0, compiled=device == "cuda").backward()
        hidden.grad = trained_head.grad = None

    def naive(student_head: Tensor) -> None:
        log_q = (30 * torch.tanh((hidden @ student_head.T).float() / 30)).log_softmax(-1)
        with torch.no_grad():
            log_p = (30 * torch.tanh((teacher_hidden @ head.T).float() / 30)).log_softmax(-1)
        F.kl_div(log_q, log_p, log_target=True, reduction="sum").div(tokens).backward()
        hidden.grad = trained_head.grad = None

    for label, student_head in (("head frozen", head), ("head trained", trained_head)):
        ms, peak, base = median_ms(lambda h=student_head: chunked(h), repeats)
        naive_ms, naive_peak, naive_base = median_ms(lambda h=student_head: naive(h), 3)
        write(
            name=f"KL {tokens} x {vocabulary}, {label}",
            ms=ms,
            above_base_gb=peak - base,
            naive_ms=naive_ms,
            naive_above_base_gb=naive_peak - naive_base,
            ratio=ms / naive_ms,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    rows = [{"device": name, "torch": torch.__version__}]

    def write(**row: object) -> None:
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
        print(json.dumps(rows[-1]), flush=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")

    measure_kl(write, device, args.toy, args.repeats)
    measure_steps(write, device, args.toy, args.repeats)


if __name__ == "__main__":
    main()
