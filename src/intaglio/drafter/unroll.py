"""Inputs that a drafter takes from its target, and its draft steps, for all places of a text at once.

After token x[t + 1] is known, the target has read the text up to x[t]. A drafter's first step takes the embedding of
x[t + 1] and the target's hidden state h[t], attends to the target's keys and values up to t, and predicts
x[t + 2]. Each later step takes the next token and what the drafter itself made of the state; position, keys and
values stay. So step s at t has the target's own prediction at t + s to match, and that of one pass over the text.

Shape suffixes: B texts, T tokens, Q places where drafts begin, D the target's width, W the drafter's, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from intaglio.train.static import static

KeysAndValues = dict[str, tuple[Tensor, Tensor]]  # by type of layer, each [B, heads, T, size]


@dataclass(frozen=True)
class TargetStates:
    """One pass of a target over texts. embeds, hidden: [B, T, D]; hidden is that behind the final norm."""

    embeds: Tensor
    hidden: Tensor
    kv: KeysAndValues


@torch.no_grad()
def target_states(target: Any, input_ids: Tensor, positions: Tensor | None = None, cache: Any = None) -> TargetStates:
    """Run the target over int64 [B, T], behind what a cache of transformers holds, if one is given.

    Without a cache, positions that restart keep documents apart. A sharded target gathers its weights by the way.
    """
    sharded = isinstance(target, FSDPModule)
    return target.states(input_ids, positions, cache) if sharded else states_of(target, input_ids, positions, cache)


def states_of(target: Any, input_ids: Tensor, positions: Tensor | None, cache: Any) -> TargetStates:
    """`target_states` of a target whose weights are whole."""
    out = target.model(
        input_ids=input_ids,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
        return_shared_kv_states=True,
    )
    kv = {kind: cached(target, kind, *pair) for kind, pair in out.shared_kv_states.items()}
    return TargetStates(target.get_input_embeddings()(input_ids), out.last_hidden_state, kv)


def cached(target: Any, kind: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a type of layer as the target's cache gives them back: through its static scales, if any."""
    config = target.config.get_text_config()
    own = config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers]
    donor = target.model.layers[len(own) - 1 - own[::-1].index(kind)].self_attn
    return static(donor, "k_cache", key), static(donor, "v_cache", value)


def masks(positions: Tensor, window: int) -> dict[str, Tensor]:
    """Keys [B, 1, T, T] that a draft which begins at each token may attend to, by type of layer; bool.

    The keys are those of its document up to it; where the window applies, those that the token after it, whose
    position the drafter has, would see.
    """
    document = (positions == 0).cumsum(1)
    same = document.unsqueeze(2) == document.unsqueeze(1)
    distance = positions.unsqueeze(2) - positions.unsqueeze(1)  # of query and key
    full = (same & (distance >= 0)).unsqueeze(1)
    near = (distance + 1 < window).unsqueeze(1)
    return {"full_attention": full, "sliding_attention": full & near}


def steps(
    drafter: Any, states: TargetStates, positions: Tensor, count: int, places: int | None = None
) -> Iterator[Tensor]:
    """Output of the drafter's final norm [B, Q, W] after each of `count` draft steps, fed with the text's tokens.

    Drafts begin at the first `places` tokens; by default as many as leave `count` tokens and a label behind.
    """
    length = states.embeds.shape[1]
    places = length - count if places is None else places
    allowed = {kind: mask[:, :, :places] for kind, mask in masks(positions, window_of(drafter)).items()}
    state, at = states.hidden[:, :places], positions[:, :places] + 1
    for step in range(1, count + 1):
        embeds = states.embeds[:, step : step + places]
        out = draft_step(drafter, embeds, state, at, states.kv, allowed)
        yield out
        state = drafter.post_projection(out)


def draft_step(
    drafter: Any, embeds: Tensor, state: Tensor, at: Tensor, kv: KeysAndValues, allowed: dict[str, Tensor]
) -> Tensor:
    """One step [B, Q, W]. embeds, state: [B, Q, D]; at: positions [B, Q]; allowed: masks as `masks` makes them.

    transformers' own forward makes masks for a single query only; this calls its layers with ours.
    """
    # 5.23 fails to cut queries short where no layer has keys of its own and there are no per-layer embeddings;
    # asked for hidden states it does not try to.
    out: Tensor = drafter.model(
        inputs_embeds=drafter.pre_projection(torch.cat((embeds, state), -1)),
        attention_mask=allowed,
        position_ids=at,
        shared_kv_states=dict(kv),
        use_cache=False,
        output_hidden_states=True,
    ).last_hidden_state
    return out


def window_of(model: Any) -> int:
    """Tokens that a sliding layer sees."""
    return int(model.config.get_text_config().sliding_window)


def inside(positions: Tensor, count: int) -> Tensor:
    """True for drafts [B, T - count, count] that stay in the document that they began in."""
    document = (positions == 0).cumsum(1)
    places = positions.shape[1] - count
    later = torch.stack([document[:, step : step + places] for step in range(1, count + 1)], -1)
    return later == document[:, :places].unsqueeze(-1)
