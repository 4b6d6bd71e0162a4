"""Wall-clock time and accepted drafts, with a drafter and without, in llama.cpp's server and in transformers.

    python benchmarks/drafter_speed.py --target RUN --drafter RUN/drafter --out benchmarks/results/drafter_speed.json

RUN is the folder that `intaglio demo --drafter` leaves. In llama.cpp the server's own statistics count. In transformers our loop
and the library's `generate(assistant_model=...)` run side by side; the library's drafter sees keys of rejected drafts.
Decoding is greedy, the prompts are the same everywhere, and the ways run in turn.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import environment, write_result
from runners.start import program_of
from speculate import speculate

from intaglio.drafter.text import end_tokens
from intaglio.measure.llama_server import LlamaServer
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.decoded import load_packed
from intaglio.packed.model import PackedModel
from intaglio.runs.drafter import open_target
from intaglio.runs.proof import Evaluation
from intaglio.runs.texts import read_windows
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR

PROMPT_TOKENS = 32
LENGTHS = (1, 2, 3, 4)


def in_llama(model: Path, drafter: Path, prompts: list[list[int]], tokens: int) -> list[dict[str, Any]]:
    program, rows = program_of("llamacpp", "llama-server"), []
    texts: dict[int, list[Any]] = {}
    for length in (0, *LENGTHS):
        how = {"draft": drafter, "draft_tokens": length} if length else {}
        with LlamaServer(model, program=program, threads=2, **how) as server:
            server.complete(prompts[0], tokens, past_end=True)  # to warm up
            texts[length] = [server.complete(prompt, tokens, past_end=True) for prompt in prompts]
    alone = texts.pop(0)
    for length, drafted in texts.items():
        rows.append(
            {
                "draft_length": length,
                "same_tokens": [one.tokens for one in drafted] == [one.tokens for one in alone],
                "accepted": sum(one.accepted for one in drafted) / sum(one.drafted for one in drafted),
                "tokens_a_round": 1 + sum(one.accepted for one in drafted) / sum(one.checks for one in drafted),
                "speed_up": sum(one.seconds for one in alone) / sum(one.seconds for one in drafted),
                "tokens_a_second": tokens * len(prompts) / sum(one.seconds for one in drafted),
            }
        )
        print("llama.cpp", rows[-1], flush=True)
    return rows


def by_library(target: Any, drafter: Any, prompt: list[int], tokens: int, length: int) -> tuple[list[int], list[int]]:
    """Tokens of transformers' own loop, and the number of drafts that each of its rounds accepted."""
    reads: list[int] = []
    handle = target.model.register_forward_pre_hook(
        lambda module, args, kwargs: reads.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    drafter.generation_config.num_assistant_tokens = length
    drafter.generation_config.num_assistant_tokens_schedule = "constant"
    ids = torch.tensor([prompt])
    out = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        assistant_model=drafter,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    handle.remove()
    return out[0, len(prompt) :].tolist(), reads


def timed(work: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def in_transformers(target: Any, drafter: Any, prompts: list[list[int]], tokens: int) -> list[dict[str, Any]]:
    rows, ends = [], end_tokens(target)
    for length in LENGTHS:
        ratios, accepted, library, same = [], [], [], True
        for prompt in prompts:
            plain, slow = timed(lambda prompt=prompt: speculate(target, None, prompt, tokens, 0, without=ends))
            fast, quick = timed(
                lambda prompt=prompt, n=length: speculate(target, drafter, prompt, tokens, n, without=ends)
            )
            theirs, reads = by_library(target, drafter, prompt, tokens, length)
            same = same and plain.tokens == fast.tokens == theirs
            ratios.append(slow / quick)
            accepted += fast.accepted
            library.append((tokens - 1) / (len(reads) - 1))  # the first read is the prompt's, and gives one token
        rows.append(
            {
                "draft_length": length,
                "same_tokens": same,
                "accepted": sum(accepted) / (length * len(accepted)),
                "tokens_a_round": 1 + sum(accepted) / len(accepted),
                "tokens_a_round_of_the_library": statistics.mean(library),
                "speed_up": statistics.median(ratios),
            }
        )
        print("transformers", rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192, help="after each prompt; the bundled window is 128")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    windows = Evaluation(text=HELDOUT_TEXT, tokens=options.prompts * PROMPT_TOKENS, window=PROMPT_TOKENS)
    prompts = read_windows(windows, 4096, load_tokenizer(MODEL_DIR)).tolist()
    result: dict[str, Any] = environment() | {"prompts": options.prompts, "tokens": options.tokens}
    if (options.target / "model.gguf").is_file():
        files = options.target / "model.gguf", options.drafter / "model.gguf"
        result["llama.cpp"] = in_llama(*files, prompts, options.tokens)
    target, _ = open_target(options.target / "packed")
    drafter = load_packed(PackedModel.open(options.drafter / "packed"))
    result["transformers"] = in_transformers(target, drafter, prompts, options.tokens)
    write_result(options.out, result)


if __name__ == "__main__":
    main()
