"""The drafter of the bundled model, and the same with a clustered head."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from intaglio.drafter.clusters import assign_clusters
from intaglio.packed.checkpoint import load_model
from intaglio.plan.family import load_config
from intaglio.tiny import DRAFTER_DIR, MODEL_DIR
from tests.support.tiny import build

CLUSTERS, TOP_CLUSTERS = 64, 8


def cluster_head(folder: Path, source: Path = DRAFTER_DIR) -> Path:
    """Save a drafter in `folder` with its tokens in clusters that come from its head; return the folder."""
    clusters = {"num_centroids": CLUSTERS, "centroid_intermediate_top_k": TOP_CLUSTERS}
    model: Any = build(load_config(source) | {"use_ordered_embeddings": True} | clusters).to(torch.bfloat16)
    with torch.no_grad():
        model.load_state_dict(load_model(source).state_dict(), strict=False)
        assign_clusters(model)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(MODEL_DIR / name, folder / name)
    return folder
