"""Share of drafts that a quantized target accepts from the float drafter, and from one that is trained again.

    python benchmarks/drafter.py --targets RUN/packed [RUN/packed ...] --seeds 0 1 2 --out benchmarks/results/drafter.json

Each target is the packed model of a run of `intaglio demo`. A float checkpoint as target is the control: it
shows the gain of training alone. For each seed the bundled drafter is trained again on the target, in floats and then on its grids.
All four pairs are measured on the same prompts. The figures are simulated: decoded weights in transformers, float32.
"""

import argparse
import tempfile
from pathlib import Path

from common import environment, write_result

from intaglio.packed.model import FILE_NAME, PackedModel
from intaglio.plan.recipe import Recipe
from intaglio.runs.drafter import Texts, run
from intaglio.tiny import DRAFTER_DIR, HELDOUT_TEXT, MODEL_DIR, TRAIN_TEXT
from intaglio.train.options import Options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=Path, nargs="+", required=True)
    parser.add_argument("--recipes", nargs="*", default=[], help="of the drafters, one a target; by default its own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=lambda text: int(float(text)), default=98_304)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for number, path in enumerate(options.targets):
        plan = PackedModel.open(path).plan if (path / FILE_NAME).is_file() else None
        own = "drafter-mobile" if plan is not None and plan.mobile else "drafter-q4_0"
        name, target = options.recipes[number] if options.recipes else own, plan.recipe.name if plan else "float"
        for seed in options.seeds:
            recipe = Recipe.load(name).with_schedule(
                tokens=options.tokens, batch_size=options.batch, sequence_length=256, lr=options.lr, seed=seed
            )
            with tempfile.TemporaryDirectory() as folder:
                report = run(
                    path,
                    recipe,
                    Path(folder) / "run",
                    data=TRAIN_TEXT,
                    drafter_dir=DRAFTER_DIR,
                    original_dir=MODEL_DIR,
                    texts=Texts(text=HELDOUT_TEXT, prompts=options.prompts),
                    options=Options(precision="no", compiled=False),
                )
            rows.append({"target": target, "recipe": name, "seed": seed, **report.to_dict()})
            for pair in report.pairs:
                a = pair.greedy[3]
                print(f"{target} {seed} {pair.label}: {a.accepted:.4f}, {a.length:.3f}", flush=True)
            write_result(options.out, environment() | {"tokens_a_stage": options.tokens, "runs": rows})


if __name__ == "__main__":
    main()
