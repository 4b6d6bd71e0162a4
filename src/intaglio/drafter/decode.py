"""A target with its cache and the drafts for it, as a runtime has them, and the cost of their steps.

The target's cache keeps everything and is cropped to what was validated after each round, also where a layer has
a window: masks leave out what the window does. (transformers' own loop, 5.23, leaves keys and values of rejected
drafts to the drafter: one of them always, and more once the window is full.)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from intaglio.drafter.accept import LONGEST, draft_logits, softcap_of
from intaglio.drafter.unroll import TargetStates, draft_step, target_states, window_of
from intaglio.train.distill import cap


class Reader:
    """A target with its cache: reads tokens, hands out states and logits, forgets what was rejected."""

    def __init__(self, target: Any, without: Sequence[int] = ()):
        self.target, self.cache, self.length = target, DynamicCache(), 0
        self.without = list(without)
        self.states: TargetStates | None = None

    def read(self, tokens: list[int]) -> Tensor:
        """float32 logits [n, V] behind each of n tokens."""
        ids = torch.tensor([tokens], device=self.target.device)
        at = torch.arange(self.length, self.length + len(tokens), device=ids.device).unsqueeze(0)
        self.states = target_states(self.target, ids, at, self.cache)
        self.length += len(tokens)
        logits = self.target.get_output_embeddings()(self.states.hidden[0])
        logits = cap(logits, softcap_of(self.target))
        logits[:, self.without] = -torch.inf
        return logits

    def crop(self, length: int) -> None:
        if length < self.length:
            self.cache.crop(length - self.length)  # negative: how many to forget; all releases know that
        self.length = length


def drafts(reader: Reader, drafter: Any, newest: int, behind: int, count: int, sampled: bool) -> list[Any]:
    """`count` pairs of a draft and its log-probabilities [V]. behind: tokens read that were rejected."""
    assert reader.states is not None
    kv = {k: (key[:, :, : reader.length], value[:, :, : reader.length]) for k, (key, value) in reader.states.kv.items()}
    ages = reader.length - torch.arange(reader.length, device=reader.target.device)
    near = (ages < window_of(drafter)).view(1, 1, 1, -1)
    allowed = {"full_attention": torch.ones_like(near), "sliding_attention": near}
    at = torch.tensor([[reader.length]], device=reader.target.device)
    state = reader.states.hidden[:, -1 - behind].unsqueeze(1)
    pairs, token = [], newest
    for _ in range(count):
        embeds = reader.target.get_input_embeddings()(torch.tensor([[token]], device=at.device))
        out = draft_step(drafter, embeds, state, at, kv, allowed)
        log_q = draft_logits(drafter, out)[0, 0].float().log_softmax(-1)
        token = int(torch.multinomial(log_q.exp(), 1)) if sampled else int(log_q.argmax())
        pairs.append((token, log_q))
        state = drafter.post_projection(out)
    return pairs


@dataclass(frozen=True)
class Costs:
    """Median seconds of a step on this machine: of the target by the tokens that it reads, and of the drafter."""

    target: tuple[float, ...]  # for 1, 2, ... LONGEST + 1 tokens
    drafter: float

    def speed_up(self, length: float, draft_length: int) -> float:
        """Speed of rounds that add `length` tokens, as a multiple of one token at a time."""
        return length * self.target[0] / (self.target[draft_length] + draft_length * self.drafter)


@torch.no_grad()
def measure_costs(target: Any, drafter: Any, *, context: int = 128, repeats: int = 9) -> Costs:
    """Time single steps of both behind a context of so many tokens, one after the other in turn."""
    reader = Reader(target)
    reader.read([2] * context)
    seconds: dict[int, list[float]] = {n: [] for n in range(LONGEST + 2)}
    for _ in range(repeats):
        for count in range(1, LONGEST + 2):
            began = time.perf_counter()
            int(reader.read([2] * count)[-1].argmax())  # waits for the device, as one who writes the token would
            seconds[count].append(time.perf_counter() - began)
            reader.crop(context)
        began = time.perf_counter()
        drafts(reader, drafter, 2, 0, LONGEST, False)
        seconds[0].append((time.perf_counter() - began) / LONGEST)
    medians = [statistics.median(values) for values in seconds.values()]
    return Costs(tuple(medians[1:]), medians[0])
