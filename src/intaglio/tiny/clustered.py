"""The bundled drafter with its other head: tokens in clusters, as Google's for E2B and E4B have it.

Both heads share every weight but those in `CLUSTERS`, so that the package carries the drafter once.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from intaglio.tiny import DRAFTER_DIR

CLUSTERS: Path = Path(__file__).parent / "clusters.safetensors"
TOP_CLUSTERS = 8  # of 64


def write_clustered_drafter(folder: str | Path) -> Path:
    """Make a Hugging Face folder of the bundled drafter with the clustered head; return it.

    FileExistsError if there is such a folder already.
    """
    folder = Path(folder)
    shutil.copytree(DRAFTER_DIR, folder)
    head = load_file(CLUSTERS)
    save_file(load_file(folder / "model.safetensors") | head, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {
        "use_ordered_embeddings": True,
        "num_centroids": len(head["masked_embedding.centroids.weight"]),
        "centroid_intermediate_top_k": TOP_CLUSTERS,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (folder / "training.json").unlink()  # it is of the other head
    return folder
