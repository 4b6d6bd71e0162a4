"""A folder in the Gemma mobile format in transformers, in float32, with the mend that its reader needs."""

from __future__ import annotations

from pathlib import Path

from run_transformers import runtime_of
from runner import Runtime, run

from intaglio.packed.checkpoint import load_quantized


def load(path: Path) -> Runtime:
    return runtime_of(load_quantized(path))


if __name__ == "__main__":
    run(load)
