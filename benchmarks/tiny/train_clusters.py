"""The clustered head of the bundled drafter: tokens grouped by the drafter's head, centroids trained on the float target.

    python benchmarks/tiny/train_clusters.py     # after train_drafter.py

Everything else of the drafter stands still, so both heads share it. Writes `.data/clusters.safetensors`, to be copied to
`src/intaglio/tiny`, and the drafter's training.json with what the bundled model accepts with either head beside it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from train_drafter import LENGTH, SHAPE, WRITTEN_TOKENS, corpus_of, parser_of, prompts

from intaglio.drafter.accept import softcap_of
from intaglio.drafter.clusters import assign_clusters, cluster_loss
from intaglio.drafter.model import new_drafter
from intaglio.drafter.unroll import inside, steps, target_states
from intaglio.measure.drafter_report import measure_pair
from intaglio.packed.checkpoint import load_model
from intaglio.tiny import DRAFTER_DIR, MODEL_DIR
from intaglio.tiny.clustered import TOP_CLUSTERS

CENTROIDS, STEPS = 64, 4


def clustered(drafter: Any, target: Any) -> Any:
    """The same drafter with an untrained clustered head."""
    model: Any = new_drafter(target, replace(SHAPE, clusters=CENTROIDS, top_clusters=TOP_CLUSTERS))
    model.load_state_dict(drafter.state_dict(), strict=False)
    assign_clusters(model)
    return model.requires_grad_(False)


def loss_of(model: Any, target: Any, input_ids: Tensor, positions: Tensor) -> Tensor:
    """Mean over the draft steps of how far the centroids' ratings are from the target's, in nats."""
    states, counted = target_states(target, input_ids, positions), inside(positions, STEPS)
    head, places, losses = target.get_output_embeddings().weight, positions.shape[1] - STEPS, []
    for number, out in enumerate(steps(model, states, positions, STEPS)):
        here = counted[..., number]
        wanted = states.hidden[:, number + 1 : number + 1 + places][here]
        losses.append(cluster_loss(out[here], model.masked_embedding, wanted, head, softcap_of(target)))
    return torch.stack(losses).mean()


def train(model: Any, target: Any, tokens: int, batch: int, lr: float, data: Path) -> list[float]:
    corpus, losses = corpus_of(np.load(data)["train"], tokens, batch), []
    centroids = model.masked_embedding.centroids.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([centroids], lr=lr, weight_decay=0.0)
    count = tokens // (batch * LENGTH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    for step in range(count):
        rows = slice(step * batch, (step + 1) * batch)
        ids, positions = (torch.from_numpy(x[rows]).long() for x in (corpus.tokens, corpus.positions))
        loss = loss_of(model, target, ids, positions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 25 == 0:
            print(f"{step}/{count} loss {np.mean(losses[-25:]):.4f}", flush=True)
    return losses


def main() -> None:
    options = parser_of(__doc__, tokens=300_000, lr=3e-3, out=Path(".data/clusters.safetensors")).parse_args()
    target, drafter = load_model(MODEL_DIR).requires_grad_(False), load_model(DRAFTER_DIR)
    model = clustered(drafter, target)
    texts, found = prompts(), {}

    def measure(name: str, candidate: Any) -> None:
        pair = measure_pair("float", "float", target, candidate, texts, WRITTEN_TOKENS, {})
        found[name] = {mode: [a.to_dict() for a in getattr(pair, mode)] for mode in ("greedy", "sampled")}
        print(name, {mode: round(found[name][mode][3]["accepted"], 4) for mode in found[name]}, flush=True)

    measure("tied", drafter)
    measure("means", model)
    losses = train(model, target, options.tokens, options.batch, options.lr, options.data)
    model.to(torch.bfloat16).float()  # as it is saved
    measure("trained", model)
    state = model.masked_embedding.state_dict()
    save_file(
        {
            "masked_embedding.centroids.weight": state["centroids.weight"].bfloat16(),
            "masked_embedding.token_ordering": state["token_ordering"],
        },
        options.out,
        {"format": "pt"},
    )
    record = json.loads((DRAFTER_DIR / "training.json").read_text("utf-8"))
    record["acceptance"] = found["tied"]
    record["clustered_head"] = {
        **{"clusters": CENTROIDS, "looked_into": TOP_CLUSTERS, "tokens": options.tokens, "lr": options.lr},
        **{
            "final_loss": float(np.mean(losses[-50:])),
            "acceptance": found["trained"],
            "acceptance_before": found["means"],
        },
    }
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
