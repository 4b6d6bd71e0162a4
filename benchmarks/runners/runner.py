"""Shared by every runner: read token ids, take the time, write arrays. See README.md."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Runtime:
    """An artifact, loaded.

    name: of the runtime, with its version. logits: of one window of ids [T], float [T or T - 1, V].
    greedy: ids that follow a prompt of ids [Q], as many as asked for. more: further keys of run.json.
    """

    name: str
    logits: Callable[[np.ndarray], np.ndarray]
    greedy: Callable[[np.ndarray, int], list[int]]
    more: dict[str, Any] = field(default_factory=dict)


def run(load: Callable[[Path], Runtime]) -> None:
    """A runner's command line. load: opens the artifact of a path in the runtime."""
    parser = argparse.ArgumentParser()
    for name in ("artifact", "ids", "prompts", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--new-tokens", type=int, default=40)
    args = parser.parse_args()
    ids_NT, prompts_PQ = np.load(args.ids), np.load(args.prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    runtime = load(args.artifact)
    rows = ids_NT.shape[1] - 1
    np.save(args.out / "logits.npy", np.stack([runtime.logits(ids)[:rows].astype(np.float32) for ids in ids_NT]))
    runtime.greedy(prompts_PQ[0], 2)  # what is compiled or allocated once is not timed
    began = time.perf_counter()
    tokens = [runtime.greedy(prompt, args.new_tokens) for prompt in prompts_PQ]
    seconds = time.perf_counter() - began
    np.save(args.out / "tokens.npy", np.array(tokens, dtype=np.int32).reshape(len(prompts_PQ), args.new_tokens))
    speed = len(prompts_PQ) * args.new_tokens / seconds
    report = {"runtime": runtime.name, "tokens_per_second": speed, **runtime.more}
    (args.out / "run.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
