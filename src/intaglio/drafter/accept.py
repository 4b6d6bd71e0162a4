"""Numbers of drafts that a target accepts, computed from one pass over text that the target wrote.

Greedy: a draft is accepted if it is the target's own next token, and drafts end at the first that is not. What the
target writes does not depend on the drafter, so drafts from every place of its text can be made side by side, and
the rounds of any draft length be read off.

Sampled (Leviathan et al. 2023, arXiv:2211.17192): a draft x from q is accepted with probability min(1, p(x) / q(x)),
else the target's token comes from what p has over q. Text is then distributed as p, and of a token y of such
a text the probability that it came from an accepted draft is min(p, q)(y) / p(y) = min(1, q(y) / p(y)). So rounds
can be laid over a text that the target sampled by itself.

Shape suffixes: N texts, Q places, S steps, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intaglio.drafter.clusters import clustered_logits
from intaglio.drafter.unroll import steps, target_states
from intaglio.errors import InputError
from intaglio.train.distill import cap

LONGEST = 8  # drafts of a round
TEXTS_AT_ONCE = 8


@dataclass(frozen=True)
class Acceptance:
    """Result of the rounds of one draft length.

    by_position: share of the rounds in which the first, second, ... draft was accepted. accepted: drafts that were,
    of all that were made. length: tokens that a round adds, its own token included. rounds: how many there were.
    error: standard error of `length` over texts.
    """

    draft_length: int
    by_position: tuple[float, ...]
    accepted: float
    length: float
    error: float
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_draft_length(draft_length: int) -> None:
    """Raise InputError for a length that no round has."""
    if not 1 <= draft_length <= LONGEST:
        raise InputError(f"draft length {draft_length}: expected 1 to {LONGEST}")


@torch.no_grad()
def chances(
    target: Any,
    drafter: Any,
    texts: Tensor,
    prompt: int,
    *,
    sampled: bool = False,
    without: Sequence[int] = (),
) -> NDArray[np.float32]:
    """Probability [N, Q, LONGEST] that a draft is accepted if those before it were; in greedy mode 0 or 1.

    texts: int64 [N, T], `prompt` tokens and what the target wrote. Place 0 is that where the first token after the
    prompt is known; a draft beyond the text's end has 0. without: tokens that the target was not to write.
    """
    length = texts.shape[1]
    if length - prompt < 2:
        raise InputError(f"texts of {length} tokens, {prompt} of them prompt: expected two or more that were written")
    rows = [
        _chances(target, drafter, ids.to(target.device), sampled, list(without))[:, prompt - 1 :].cpu()
        for ids in texts.split(TEXTS_AT_ONCE)
    ]
    return torch.cat(rows).numpy()


def _chances(target: Any, drafter: Any, ids: Tensor, sampled: bool, without: list[int]) -> Tensor:
    """`chances` [N, T - 1, LONGEST] from the first token on."""
    places = ids.shape[1] - 1
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    states = target_states(target, ids, positions)
    target_logits = cap(target.get_output_embeddings()(states.hidden), softcap_of(target))
    target_logits[..., without] = -torch.inf
    beyond = states.embeds[:, :1].expand(-1, LONGEST, -1)  # what drafts beyond the end are fed with counts for nothing
    padded = replace(states, embeds=torch.cat((states.embeds, beyond), 1))
    chances = torch.zeros(len(ids), places, LONGEST, device=ids.device)
    for step, hidden in enumerate(steps(drafter, padded, positions, LONGEST, places), 1):
        known = places - step  # places whose draft of this step has a token of the text to be compared with
        if known > 0:
            logits, own = draft_logits(drafter, hidden[:, :known]), target_logits[:, step : step + known]
            chances[:, :known, step - 1] = _chance(logits, own, ids[:, step + 1 : step + 1 + known], sampled)
    return chances


def _chance(logits: Tensor, target_logits: Tensor, written: Tensor, sampled: bool) -> Tensor:
    if not sampled:
        return (logits.argmax(-1) == written).float()
    at = written.unsqueeze(-1)
    q, p = (x.float().log_softmax(-1).gather(-1, at).squeeze(-1) for x in (logits, target_logits))
    return (q - p).exp().clamp(max=1.0)


def softcap_of(model: Any) -> float | None:
    """Soft-capping of a target's final logits."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def draft_logits(drafter: Any, hidden: Tensor) -> Tensor:
    """Logits [..., V] of the drafter's head, clustered or not."""
    logits: Tensor = drafter.lm_head(hidden)
    clustered = drafter.config.use_ordered_embeddings
    return clustered_logits(drafter.masked_embedding, hidden, logits) if clustered else logits


def rounds(chance: NDArray[np.float32], draft_length: int) -> Acceptance:
    """Lay rounds of one draft length over texts whose chances `chances` gave."""
    check_draft_length(draft_length)
    rng = np.random.default_rng(0)
    accepted = rng.random(chance.shape) < chance
    runs = np.cumprod(accepted[:, :, :draft_length], axis=2).sum(2)  # drafts accepted from each place
    counts = np.zeros(draft_length + 1, dtype=np.int64)
    means = []
    for row in runs:
        place, of_text = 0, []
        while place < len(row) - draft_length:  # a round at the end could not have been accepted in full
            of_text.append(int(row[place]))
            place += int(row[place]) + 1
        counts += np.bincount(of_text, minlength=draft_length + 1)
        if of_text:
            means.append(np.mean(of_text) + 1)
    total = int(counts.sum())
    if not total:
        raise InputError(f"no round of {draft_length} drafts fits into the text: expected longer texts")
    reached = counts[::-1].cumsum()[::-1][1:]  # rounds that accepted so many or more
    mean = float((counts * np.arange(draft_length + 1)).sum() / total)
    return Acceptance(
        draft_length,
        tuple(float(count / total) for count in reached),
        mean / draft_length,
        mean + 1,
        float(np.std(means) / max(1, len(means)) ** 0.5),
        total,
    )
