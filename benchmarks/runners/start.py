"""Start a runner in its environment, and compare what it computed. Used by `benchmarks/runtimes.py` and the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from intaglio.errors import InputError
from intaglio.measure.metrics import Accumulator

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("INTAGLIO_RUNTIMES", HERE.parents[1] / ".runtimes"))
MAIN = ""  # as the name of an environment: the one that this runs in


@dataclass(frozen=True)
class Output:
    """Results of a runner: float32 logits [N, T - 1, V], greedy tokens int32 [P, n], and what it said of itself."""

    logits: np.ndarray
    tokens: np.ndarray
    runtime: str
    tokens_per_second: float
    kernels: list[str]


def python_of(environment: str) -> Path:
    """The interpreter of a runtime's environment. InputError, with the command that makes it, if it is missing."""
    return Path(sys.executable) if environment == MAIN else program_of(environment, "python")


def program_of(environment: str, name: str) -> Path:
    """A program of a runtime's environment. InputError as `python_of`."""
    program = ENVIRONMENTS / environment / "bin" / name
    if not program.is_file():
        raise InputError(
            f"{program}: no such file: make the runtime's environment with `make .runtimes/{environment}/.done`"
        )
    return program


def start(
    runner: str,
    environment: str,
    artifact: Path,
    ids_NT: np.ndarray,
    prompts_PQ: np.ndarray,
    out: Path,
    new_tokens: int,
) -> Output:
    """Run `run_RUNNER.py` on an artifact. InputError, with what it printed last, if it fails."""
    out.mkdir(parents=True, exist_ok=True)
    for name, ids in (("ids", ids_NT), ("prompts", prompts_PQ)):
        np.save(out / f"{name}.npy", ids.astype(np.int32))
    command = [python_of(environment), HERE / f"run_{runner}.py", artifact, out / "ids.npy", out / "prompts.npy", out]
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith("PYTHON")
    }  # of this one, not of theirs
    passed = clean if environment != MAIN else dict(os.environ)
    done = subprocess.run(
        [*map(str, command), "--new-tokens", str(new_tokens)], env=passed, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InputError(
            f"run_{runner}.py failed with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
        )
    said = json.loads((out / "run.json").read_text("utf-8"))
    logits, tokens = (np.load(out / f"{name}.npy") for name in ("logits", "tokens"))
    rows = ids_NT.shape[1] - 1
    if logits.shape[:2] != (len(ids_NT), rows) or tokens.shape != (len(prompts_PQ), new_tokens):
        raise InputError(f"run_{runner}.py left logits {logits.shape} and tokens {tokens.shape} for ids {ids_NT.shape}")
    if said.get("log_probabilities"):
        raise InputError(f"run_{runner}.py left log-probabilities: expected logits")
    return Output(logits, tokens, said["runtime"], said["tokens_per_second"], said.get("kernels", []))


@dataclass(frozen=True)
class Agreement:
    """Logits against a reference's: the largest difference, the share of equal ones, mean KL and same-top share."""

    max_difference: float
    equal_share: float
    kl_nats: float
    same_top_share: float


def agreement(reference: np.ndarray, found: np.ndarray, ids_NT: np.ndarray) -> Agreement:
    """Compare float32 logits [N, T - 1, V] of the same windows of ids [N, T]."""
    scores = Accumulator(runtime="", simulated=False)
    for expected, got, ids in zip(reference, found, ids_NT, strict=True):
        scores.add(*(torch.from_numpy(x) for x in (expected, got)), torch.from_numpy(ids[1:].astype(np.int64)))
    result = scores.result()
    return Agreement(
        max_difference=float(np.abs(reference - found).max()),
        equal_share=float((reference == found).mean()),
        kl_nats=result.kl_mean_nats,
        same_top_share=result.same_top_share,
    )
