"""Train the bundled model, a small ``Gemma4ForCausalLM`` of the E2B shape, from scratch.

It has everything that makes Gemma 4 E2B special to quantize: per-layer embeddings, layers that
share the KV of earlier ones and have a double-wide MLP, sliding and full attention with different
head sizes, soft-capped logits. Weights are float32 in training and bfloat16 in the saved folder,
and everything reported is measured on the saved folder.

    python benchmarks/tiny/train_tiny.py --minutes 5

One H200 trains it in a few minutes. The schedule follows the clock: ``--minutes`` of training
after compilation, or ``--steps``.
"""

import argparse
import json
import math
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoTokenizer, Gemma4ForCausalLM, Gemma4TextConfig, GenerationConfig

WARMUP_STEPS = 150
COMPILE_STEPS = 3  # the clock starts after these
FINAL_LR = 0.003  # of the peak
LOG_EVERY = 50
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

PROMPTS = (
    "It was a bright morning, and the whole family",
    "The captain looked out over the sea and",
    "My fellow citizens, the state of our economy",
    "And the king said to the people,",
    "The following example shows how to open a file in Python:",
    "CREATE INDEX constructs an index on the specified",
)
QUESTIONS = ('What does "harbor" mean?', 'What is the meaning of "teacher"?')


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyperparameters; lengths and sizes in tokens."""

    batch: int = 128  # sequences a step
    micro_batches: int = 1
    length: int = 512
    lr: float = 3e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0


def tiny_config(tokenizer: transformers.PreTrainedTokenizerBase) -> Gemma4TextConfig:
    """The model's shape. The last two layers with own KV are [sliding, full], as llama.cpp expects."""
    return Gemma4TextConfig(
        vocab_size=len(tokenizer),
        vocab_size_per_layer_input=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        use_double_wide_mlp=True,
        num_hidden_layers=8,
        num_kv_shared_layers=4,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        global_head_dim=128,
        hidden_size_per_layer_input=32,
        sliding_window=128,
        max_position_embeddings=2048,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


# ---------------------------------------------------------------------------------------- training


def next_token_loss(hidden: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Mean cross-entropy of the soft-capped logits, of shape [batch, length, vocab]."""
    logits = F.linear(hidden.to(torch.bfloat16), head.to(torch.bfloat16)).float()
    logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def optimizer_for(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms' gains alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)


def lr_factor(step: int, progress: float) -> float:
    """Linear warm-up by steps times a cosine by progress in [0, 1]."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_LR + (1 - FINAL_LR) * cosine)


def train(
    model: Gemma4ForCausalLM,
    tokens: Tensor,
    recipe: Recipe,
    *,
    minutes: float,
    steps: int | None,
    compiled: bool,
) -> dict[str, float]:
    """Trains on random windows of the packed ``tokens`` until the clock or the steps run out."""
    device = tokens.device
    loss_function = next_token_loss
    if compiled:
        torch._dynamo.config.recompile_limit = 4 * len(model.model.layers)
        loss_function = torch.compile(next_token_loss, dynamic=False)
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    optimizer = optimizer_for(model, recipe)
    generator = torch.Generator(device).manual_seed(recipe.seed)
    offsets = torch.arange(recipe.length + 1, device=device)
    rows = recipe.batch // recipe.micro_batches
    softcap = model.config.final_logit_softcapping

    launched = started = time.perf_counter()
    step = 0
    while True:
        elapsed = time.perf_counter() - started
        progress = step / steps if steps else elapsed / (60 * minutes)
        if progress >= 1 and step > COMPILE_STEPS:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * lr_factor(step, progress)
        for _ in range(recipe.micro_batches):
            starts = torch.randint(len(tokens) - recipe.length, (rows, 1), generator=generator, device=device)
            windows = tokens[starts + offsets].long()
            with torch.autocast(device.type, torch.bfloat16):
                hidden = model.model(windows[:, :-1], use_cache=False).last_hidden_state
                loss = loss_function(hidden, model.lm_head.weight, windows[:, 1:], softcap)
            (loss / recipe.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step == COMPILE_STEPS:
            print(f"compiled, loss {loss.item():.3f}", flush=True)
            started = time.perf_counter()
        elif step % LOG_EVERY == 0:
            value, elapsed = loss.item(), time.perf_counter() - started
            rate = (step - COMPILE_STEPS) * recipe.batch * recipe.length / elapsed
            print(f"step {step:6} {elapsed:6.1f} s  loss {value:.4f}  {rate:12,.0f} tokens/s", flush=True)
    return {
        "steps": step,
        "tokens": step * recipe.batch * recipe.length,
        "final_loss": loss.item(),
        "training_seconds": time.perf_counter() - started,
        "compile_seconds": started - launched,
    }


# --------------------------------------------------------------------------------- saving, measuring


def save(model: Gemma4ForCausalLM, tokenizer: transformers.PreTrainedTokenizerBase, out: Path) -> None:
    """Writes the model in bfloat16, with its configuration and generation configuration."""
    state = {
        name: tensor.to(torch.bfloat16)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied
    }
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(["<eos>", "<turn|>", "<|tool_response>"]),
        max_length=None,
    )
    model.save_pretrained(out, state_dict=state)
    complete_config(out / "config.json", model.config)


def complete_config(path: Path, config: Gemma4TextConfig) -> None:
    """Writes what transformers leaves out of config.json and other tools read from it."""
    full = config.layer_types.index("full_attention")
    fields = json.loads(path.read_text())
    fields["dtype"] = "bfloat16"
    fields["global_head_dim"] = config.per_layer_config[full].head_dim
    fields["num_global_key_value_heads"] = config.per_layer_config[full].num_key_value_heads
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def negative_log_likelihood(model: Gemma4ForCausalLM, stream: Tensor, length: int) -> tuple[float, int]:
    """Summed over all tokens of a stream but its first, in windows of ``length``; and their number."""
    total, batch = 0.0, 64
    count = (len(stream) - 1) // length * length
    inputs, targets = (stream[i : i + count].view(-1, length) for i in (0, 1))
    for rows in zip(inputs.split(batch), targets.split(batch), strict=True):
        logits = model(rows[0], use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), rows[1].flatten(), reduction="sum").item()
    return total, count


def perplexities(model: Gemma4ForCausalLM, streams: dict[str, Tensor], length: int) -> dict[str, float]:
    """Held-out perplexity of every source and of all tokens together."""
    sums = {name: negative_log_likelihood(model, ids, length) for name, ids in streams.items()}
    sums["total"] = tuple(map(sum, zip(*sums.values(), strict=True)))
    return {name: round(math.exp(total / count), 3) for name, (total, count) in sums.items()}


@torch.no_grad()
def continuations(model: Gemma4ForCausalLM, tokenizer: transformers.PreTrainedTokenizerBase) -> list[str]:
    """Greedy continuations of the prompts and answers to the questions, special tokens shown."""
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer(text, add_special_tokens=False).input_ids)
    texts = []
    for ids in prompts:
        inputs = torch.tensor([ids], device=model.device)
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=64, do_sample=False)
        texts.append(tokenizer.decode(output[0]))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=Path, default=Path(".data/tokens.npz"))
    parser.add_argument("--tokenizer", type=Path, default=Path(".data/tokenizer"))
    parser.add_argument("--out", type=Path, default=Path(".data/model"))
    parser.add_argument("--minutes", type=float, default=2.5)
    parser.add_argument("--steps", type=int, help="train this many steps, whatever the clock says")
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--micro-batches", type=int, default=Recipe.micro_batches)
    parser.add_argument("--length", type=int, default=Recipe.length)
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    recipe = Recipe(batch=args.batch, micro_batches=args.micro_batches, length=args.length, lr=args.lr)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    with np.load(args.tokens) as arrays:
        streams = {name: torch.from_numpy(ids.astype(np.int32)) for name, ids in arrays.items()}
    tokens = streams.pop("train").to(device)
    heldout = {name.removeprefix("heldout/"): ids.to(device).long() for name, ids in streams.items()}

    model = Gemma4ForCausalLM(tiny_config(tokenizer)).to(device).train()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(tokens):,} tokens of text, on {device}", flush=True)
    result = train(model, tokens, recipe, minutes=args.minutes, steps=args.steps, compiled=args.compile)
    save(model, tokenizer, args.out)
    for name in TOKENIZER_FILES:
        shutil.copyfile(args.tokenizer / name, args.out / name)
    del model

    saved = Gemma4ForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).to(device).eval()
    result["heldout_perplexity"] = perplexities(saved, heldout, recipe.length)
    print(json.dumps(result, indent=2), flush=True)
    samples = continuations(saved, tokenizer)
    print(*samples, sep="\n" + "-" * 40 + "\n", flush=True)
    record = {
        "parameters": parameters,
        "text_tokens": len(tokens),
        "recipe": asdict(recipe),
        **result,
        "samples": samples,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
