"""Text that a target writes by itself: what drafters are measured on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TEXTS_AT_ONCE = 32


@torch.no_grad()
def written(target: Any, prompts: Tensor, tokens: int, *, sampled: bool = False) -> Tensor:
    """`prompts` [N, P] and `tokens` more of each: greedy, or sampled at temperature 1; int64 [N, P + tokens], on
    the target's device.

    A text does not end: the tokens that would end it are left out of what may be written.
    """
    from transformers import GenerationConfig

    how = {"do_sample": True, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}
    config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, **how)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = [
            target.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            for ids in prompts.to(target.device).split(TEXTS_AT_ONCE)
        ]
    return torch.cat(parts)


def end_tokens(target: Any) -> list[int]:
    """The tokens that end a text of this target."""
    ids = target.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
