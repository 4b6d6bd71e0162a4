"""Decoding with a drafter, token by token: the loop that a runtime runs. `drafter.accept` works its acceptance out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from intaglio.drafter.accept import check_draft_length
from intaglio.drafter.decode import Reader, drafts


@dataclass
class Written:
    """Output of a decoding loop: tokens after the prompt, and of each round how many drafts were accepted."""

    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


def judge(pairs: list[Any], logits: Tensor, sampled: bool) -> list[int]:
    """The drafts that the target accepts, and its own token behind them. logits: [n + 1, V]."""
    kept: list[int] = []
    for (token, log_q), row in zip(pairs, logits, strict=False):
        if not sampled:
            own = int(row.argmax())
            if own != token:
                return [*kept, own]
        else:
            p, q = row.softmax(-1), log_q.exp()
            if float(torch.rand(())) >= float(p[token] / q[token]):
                return [*kept, int(torch.multinomial((p - q).clamp_min(0), 1))]
        kept.append(token)
    last = logits[len(pairs)]
    return [*kept, int(torch.multinomial(last.softmax(-1), 1)) if sampled else int(last.argmax())]


@torch.no_grad()
def speculate(
    target: Any,
    drafter: Any | None,
    prompt: list[int],
    tokens: int,
    draft_length: int,
    *,
    sampled: bool = False,
    without: Sequence[int] = (),
) -> Written:
    """Write `tokens` tokens after the prompt, `draft_length` drafts a round; without a drafter one at a time.

    The text is the target's own, whatever the drafter says: token for token where it is greedy, in distribution
    (temperature 1) where it is sampled. without: tokens that are not to be written, such as those that end a text;
    here none ends it. Raises InputError for a draft length that is not 1 to 8.
    """
    count = 0
    if drafter is not None:
        check_draft_length(draft_length)
        count = draft_length
    reader, written = Reader(target, without), Written()
    written.tokens += judge([], reader.read(prompt)[-1:], sampled)
    behind = 0
    while len(written.tokens) < tokens:
        newest = written.tokens[-1]
        pairs = drafts(reader, drafter, newest, behind, count, sampled) if drafter is not None else []
        before = reader.length
        kept = judge(pairs, reader.read([newest, *(token for token, _ in pairs)]), sampled)
        behind = len(pairs) + 1 - len(kept)
        reader.crop(before + len(kept))
        written.tokens += kept
        written.accepted.append(len(kept) - 1)
    del written.tokens[tokens:]
    return written
