"""The first losses of a fixed run, as JSON: `python -m tests.support.first_losses RECIPE`.

Started by the test with ENVIRONMENT, under which every x86 machine computes the same bits.
"""

from __future__ import annotations

import json
import sys
import tempfile

import torch

from intaglio.train.loop import train
from intaglio.train.options import Options
from intaglio.train.run_folder import read_losses
from tests.support.training import small_corpus, small_model, small_plan

# Kernels of the oldest processors, for vectors, matrices and MKL alike, on one thread.
ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
}
STEPS = 20


def first_losses(recipe: str) -> list[float]:
    torch.set_num_threads(1)
    schedule = {"tokens": STEPS * 4 * 16, "batch_size": 4, "micro_batch": 2, "sequence_length": 16, "lr": 1e-4}
    schedule |= {"scale_lr": 1e-2, "embedding_lr": 1, "float_lr": 1, "frozen_tail": 0.25, "tail_lr": 0.3}
    schedule |= {"calibration_tokens": 128} if recipe == "mobile" else {}
    plan = small_plan(*(f"schedule.{key}={value}" for key, value in schedule.items()), recipe=recipe)
    with tempfile.TemporaryDirectory() as folder:
        train(small_model(), plan, small_corpus(), folder, options=Options(precision="no", compiled=False))
        return [row["loss"] for row in read_losses(folder)]


if __name__ == "__main__":
    print(json.dumps(first_losses(sys.argv[1])))
