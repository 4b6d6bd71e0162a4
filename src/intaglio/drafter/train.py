"""Training of a drafter against a target that stands still, as it is quantized.

The target reads the text once, without gradients: with its codes, its activations and its keys and values as they
are shipped. The drafter's steps are unrolled from every place of it; the loss is the weighted KL of each step to
the target's distribution there. The drafter's own weights are on the recipe's grids all along.

Of several processes each holds its rows of the target, and the whole drafter, which is small: gradients are averaged.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from intaglio.drafter.accept import softcap_of
from intaglio.drafter.clusters import cluster_loss
from intaglio.drafter.model import check_fits
from intaglio.drafter.unroll import TargetStates, inside, states_of, steps, target_states
from intaglio.errors import CorpusError, InputError
from intaglio.packed.checkpoint import TextModel
from intaglio.plan.drafting import Drafting
from intaglio.plan.plan import Plan
from intaglio.progress import Progress, StepInfo
from intaglio.train import checkpoint
from intaglio.train.corpus import Corpus
from intaglio.train.distill import chunked_kl
from intaglio.train.latents import Latents, prepare
from intaglio.train.layers import set_layers
from intaglio.train.loop import run_identity
from intaglio.train.options import Options
from intaglio.train.run_folder import check_run_dir, claim
from intaglio.train.session import Session
from intaglio.train.sharding import (
    check_shared,
    check_together,
    is_main,
    keep_gathered,
    shard,
    start_processes,
    sum_over_processes,
    world_size,
)
from intaglio.train.student import cast_weights


class DraftLesson(nn.Module):
    """A drafter plus the loss of its steps, for `train.session.Session`."""

    def __init__(self, drafter: TextModel, drafting: Drafting, softcap: float | None):
        super().__init__()
        self.drafter, self.weights, self.softcap = drafter, drafting.step_weights, softcap
        self.clusters = drafter.config.use_ordered_embeddings and drafting.clusters == "train"

    def forward(self, input_ids: Tensor, positions: Tensor, states: TargetStates, target_head: Tensor) -> Tensor:
        """Mean loss over the drafts that stay in their document, in nats, float32 scalar."""
        count = len(self.weights)
        counted, places = inside(positions, count), positions.shape[1] - count
        own = counted.sum((0, 1)).float()
        shares = own * world_size() / sum_over_processes(own.clone()).clamp_min(1)  # of each step's mean over all
        head, total = self.drafter.get_output_embeddings().weight, torch.zeros((), device=input_ids.device)
        for number, (weight, out) in enumerate(
            zip(self.weights, steps(self.drafter, states, positions, count), strict=True)
        ):
            here = counted[..., number]
            hidden, target = out[here], states.hidden[:, number + 1 : number + 1 + places][here]
            if not len(hidden):
                total = total + 0 * out.sum()  # gradients of zero, which other processes wait for
                continue
            loss = chunked_kl(hidden, head, target, target_head, softcap=None, teacher_softcap=self.softcap)
            if self.clusters:
                embedder = self.drafter.masked_embedding
                loss = loss + cluster_loss(hidden, embedder, target, target_head, self.softcap)
            total = total + weight * shares[number] * loss
        return total / sum(self.weights)


def place_target(target: TextModel, device: torch.device) -> TextModel:
    """The target on its device, without gradients; of several processes each keeps its own rows."""
    target = target.to(device).requires_grad_(False).eval()
    if world_size() > 1 and not isinstance(target, FSDPModule):
        shard(target, device)
        target.states = types.MethodType(states_of, target)
        register_fsdp_forward_method(target, "states")
    return target


def train_drafter(
    target: TextModel,
    drafter: TextModel,
    plan: Plan,
    corpus: Corpus,
    run_dir: str | Path,
    *,
    target_digest: str = "",
    options: Options | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    on_step: Callable[[StepInfo], None] = lambda info: None,
) -> Latents:
    """Train a copy of `drafter` to the plan's grids and return its latents; `.model` is the drafter itself.

    Of several processes all must give the same drafter; the target is sharded in place.
    target: what it drafts for, as `measure.simulate.decoded_model` makes it of a packed model, or a float one.
    target_digest: says which target this is, where a run is resumed. Raises ConfigError for models that do not fit,
    CorpusError for sequences too short for the steps, and as `train.loop.train` does.
    """
    check_fits(drafter, target)
    drafting, options, run_dir = plan.recipe.drafter or Drafting(), options or Options(), Path(run_dir)
    _check_text(corpus, len(drafting.step_weights))
    if plan.recipe.schedule.stages != ("model",):
        raise InputError("schedule.stages: a drafter is trained as a whole: leave it out")
    identity = run_identity(plan, None, options) | {"corpus": corpus.digest, "target": target_digest}
    check_run_dir(run_dir, identity, resume)
    device = start_processes()
    check_together(plan.recipe.schedule.batch_size, identity)
    check_shared(run_dir)
    compiled = device.type == "cuda" if options.compiled is None else options.compiled
    target = place_target(target, device)
    if plan.recipe.schedule.gathered:
        keep_gathered(target)
    student = copy.deepcopy(drafter).to(device).requires_grad_(True).train()
    if student.config.use_ordered_embeddings and drafting.clusters == "keep":
        student.masked_embedding.centroids.requires_grad_(False)
    dtype = options.dtype
    cast_weights(student, dtype)
    latents = prepare(student, plan, source=None if student.dtype == drafter.dtype else drafter.state_dict())
    set_layers(target, compiled=compiled)

    def teach(input_ids: Tensor, positions: Tensor) -> tuple[Any, ...]:
        with torch.autocast(input_ids.device.type, dtype, enabled=target.dtype != dtype):
            states = target_states(target, input_ids, positions)
        kv = {kind: (keys.to(dtype), values.to(dtype)) for kind, (keys, values) in states.kv.items()}
        head = target.get_output_embeddings().weight  # gathered by the pass before
        return TargetStates(states.embeds.to(dtype), states.hidden.to(dtype), kv), head.to(dtype)

    lesson = DraftLesson(student, drafting, softcap_of(target))
    session = Session(latents, lesson, teach, corpus, run_dir, device, options)
    if is_main():
        claim(run_dir, identity)
    session.run(checkpoint.latest(run_dir), progress or Progress(), on_step)
    return latents


def _check_text(corpus: Corpus, count: int) -> None:
    """Raise CorpusError for text in which no draft of `count` steps stays in its document."""
    if corpus.tokens.shape[1] < count + 2:
        raise CorpusError(
            f"{corpus.source}: sequences of {corpus.tokens.shape[1]} tokens: expected {count + 2} or more for "
            f"{count} draft steps"
        )
    if not bool(inside(torch.from_numpy(corpus.positions).long(), count).any()):
        raise CorpusError(f"{corpus.source}: no document is long enough for {count} draft steps: add longer text")
