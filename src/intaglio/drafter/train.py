"""Training of a drafter against a target that stands still, as it is quantized.

The target reads the text once, without gradients: with its codes, its activations and its keys and values as they
are shipped. The drafter's steps are unrolled from every place of it; the loss is the weighted KL of each step to
the target's distribution there. The drafter's own weights are on the recipe's grids all along.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.drafter.accept import softcap_of
from intaglio.drafter.clusters import cluster_loss
from intaglio.drafter.model import check_fits
from intaglio.drafter.unroll import TargetStates, inside, steps, target_states
from intaglio.errors import CorpusError, InputError
from intaglio.packed.checkpoint import TextModel
from intaglio.plan.drafting import Drafting
from intaglio.plan.plan import Plan
from intaglio.train import checkpoint
from intaglio.train.corpus import Corpus
from intaglio.train.distill import chunked_kl
from intaglio.train.latents import Latents, prepare
from intaglio.train.layers import set_layers
from intaglio.train.loop import Options, Session, StepInfo, dtype_of, run_identity
from intaglio.train.run_folder import check_run_dir, claim
from intaglio.train.sharding import start_processes
from intaglio.train.student import cast_weights


class DraftLesson(nn.Module):
    """A drafter plus the loss of its steps, for `train.loop.Session`."""

    def __init__(self, drafter: TextModel, drafting: Drafting, softcap: float | None):
        super().__init__()
        self.drafter, self.weights, self.softcap = drafter, drafting.step_weights, softcap
        self.clusters = drafter.config.use_ordered_embeddings and drafting.clusters == "train"

    def forward(self, input_ids: Tensor, positions: Tensor, states: TargetStates, target_head: Tensor) -> Tensor:
        """Mean loss over the drafts that stay in their document, in nats, float32 scalar."""
        count = len(self.weights)
        counted, places = inside(positions, count), positions.shape[1] - count
        head, total = self.drafter.get_output_embeddings().weight, torch.zeros((), device=input_ids.device)
        for number, (weight, out) in enumerate(
            zip(self.weights, steps(self.drafter, states, positions, count), strict=True)
        ):
            here = counted[..., number]
            hidden, target = out[here], states.hidden[:, number + 1 : number + 1 + places][here]
            loss = chunked_kl(hidden, head, target, target_head, softcap=None, teacher_softcap=self.softcap)
            if self.clusters:
                embedder = self.drafter.masked_embedding
                loss = loss + cluster_loss(hidden, embedder, target, target_head, self.softcap)
            total = total + weight * loss
        return total / sum(self.weights)


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
    on_step: Callable[[StepInfo], None] = lambda info: None,
) -> Latents:
    """Train a copy of `drafter` to the plan's grids and return its latents; `.model` is the drafter itself.

    target: what it drafts for, as `measure.simulate.decoded_model` makes it of a packed model, or a float one.
    target_digest: says which target this is, where a run is resumed. Raises ConfigError for models that do not fit,
    CorpusError for sequences too short for the steps, and as `train.loop.train` does.
    """
    check_fits(drafter, target)
    drafting, options, run_dir = plan.recipe.drafter or Drafting(), options or Options(), Path(run_dir)
    count = len(drafting.step_weights)
    if corpus.tokens.shape[1] < count + 2:
        raise CorpusError(
            f"{corpus.source}: sequences of {corpus.tokens.shape[1]} tokens: expected {count + 2} or more for "
            f"{count} draft steps"
        )
    if not bool(inside(torch.from_numpy(corpus.positions).long(), count).any()):
        raise CorpusError(f"{corpus.source}: no document is long enough for {count} draft steps: add longer text")
    if plan.recipe.schedule.stages != ("model",):
        raise InputError("schedule.stages: a drafter is trained as a whole: leave it out")
    identity = run_identity(plan, None, options) | {"corpus": corpus.digest, "target": target_digest}
    check_run_dir(run_dir, identity, resume)
    device = start_processes()
    compiled = device.type == "cuda" if options.compiled is None else options.compiled
    target = target.to(device).requires_grad_(False).eval()
    student = copy.deepcopy(drafter).to(device).requires_grad_(True).train()
    if student.config.use_ordered_embeddings and drafting.clusters == "keep":
        student.masked_embedding.centroids.requires_grad_(False)
    dtype = dtype_of(options)
    cast_weights(student, dtype)
    latents = prepare(student, plan, source=None if student.dtype == drafter.dtype else drafter.state_dict())
    head = target.get_output_embeddings().weight.to(dtype)
    set_layers(target, compiled=compiled)

    def teach(input_ids: Tensor, positions: Tensor) -> tuple[Any, ...]:
        with torch.autocast(input_ids.device.type, dtype, enabled=target.dtype != dtype):
            states = target_states(target, input_ids, positions)
        kv = {kind: (keys.to(dtype), values.to(dtype)) for kind, (keys, values) in states.kv.items()}
        return TargetStates(states.embeds.to(dtype), states.hidden.to(dtype), kv), head

    lesson = DraftLesson(student, drafting, softcap_of(target))
    session = Session(latents, lesson, teach, corpus, run_dir, device, options)
    claim(run_dir, identity)
    session.run(checkpoint.latest(run_dir), on_step)
    return latents
