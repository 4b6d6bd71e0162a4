"""Training sharded over two processes: the losses, codes and checkpoints of one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from intaglio.formats.verify import verify
from intaglio.numerics.grid import Quantized
from intaglio.packed.model import PackedModel
from intaglio.tiny import DRAFTER_DIR, HELDOUT_TEXT, MODEL_DIR
from intaglio.train.run_folder import read_losses, read_speed
from tests.support import layers, sharded

PROCESSES = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")  # on a free port

ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def two_processes(out: Path, recipe: str, *overrides: str, stop: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *PROCESSES, "-m", "tests.support.sharded", str(out), recipe, str(stop), *overrides]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_losses(out / "run")]


def assert_same_codes(one: Path, other: Path) -> None:
    a, b = PackedModel.open(one / "packed"), PackedModel.open(other / "packed")
    differ = total = 0
    for tensor in a.plan:
        x, y = a.read(tensor.name), b.read(tensor.name)
        if isinstance(x, Quantized):
            assert isinstance(y, Quantized)
            differ, total = differ + int((x.codes != y.codes).sum()), total + x.codes.numel()
        else:
            assert isinstance(y, torch.Tensor)
            torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2)
    assert differ <= 1e-5 * total, f"{differ} of {total} codes differ"
    assert a.read_static() == pytest.approx(b.read_static(), rel=0.01)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("q4_0", ()),
        ("mobile", ("weights.ple_embedding.trainable=true",)),
        ("experts", ()),
        ("q4_0", ("schedule.gathered=true",)),
    ],
    ids=["q4_0", "mobile", "experts", "gathered"],
)
def test_two_processes_train_what_one_does(recipe: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    sharded.run(tmp_path / "one", recipe, 0, *overrides)
    (tmp_path / "two").mkdir()
    ran = two_processes(tmp_path / "two", recipe, *overrides)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for one, two in zip(*(read_losses(tmp_path / name / "run") for name in ("one", "two")), strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)  # held-out text and codes too
    assert len(read_speed(tmp_path / "two/run")) == len(losses(tmp_path / "two"))
    assert len(list((tmp_path / "two/run/tensorboard").glob("events*"))) == 1  # the main process's
    assert_same_codes(tmp_path / "one", tmp_path / "two")
    assert len(list((tmp_path / "two/run/checkpoints/step-00000006").glob("state-*-of-00002.safetensors"))) == 2


def test_gptq_takes_every_process_its_rows_and_its_text(tmp_path: Path) -> None:
    """A tie that falls otherwise changes its row and all layers behind, so the first weights are compared."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    overrides = ("schedule.gptq_tokens=128", "schedule.tokens=64")
    sharded.run(tmp_path / "one", "q4_0", 0, *overrides)
    ran = two_processes(tmp_path / "two", "q4_0", *overrides)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=0.2)
    one, two = (PackedModel.open(tmp_path / name / "packed") for name in ("one", "two"))
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        a, b = (packed.read(f"model.layers.0.self_attn.{part}.weight") for packed in (one, two))
        assert isinstance(a, Quantized) and isinstance(b, Quantized)
        assert float((a.codes != b.codes).float().mean()) < 0.01, part


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    sharded.run(tmp_path / "whole", "q4_0", 0)
    stopped = two_processes(tmp_path / "cut", "q4_0", stop=7)
    assert "step-00000006" in {p.name for p in (tmp_path / "cut/run/checkpoints").iterdir()}, stopped.stderr[-2000:]
    sharded.run(tmp_path / "cut", "q4_0", 0)  # one process goes on in the frozen tail
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert_same_codes(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("data", [[f"--data={HELDOUT_TEXT}"], []], ids=["data", "its own text"])
def test_the_command_line_trains_in_two_processes(data: list[str], tmp_path: Path) -> None:
    """One run folder, packed, exported and measured by the main process alone."""
    options = ("schedule.tokens=512", "schedule.batch_size=4", "schedule.sequence_length=32")
    command = [sys.executable, *PROCESSES, "-m", "intaglio", "train", str(MODEL_DIR), *data]
    command += [f"--out={tmp_path / 'run'}", "--eval-tokens=256", "--references=none"]
    command += [f"--set={option}" for option in options]
    ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("report.html") == 1
    packed = PackedModel.open(tmp_path / "run/packed")
    assert verify(packed, tmp_path / "run/model.gguf").exact and verify(packed, tmp_path / "run/hf").exact
    assert len(read_losses(tmp_path / "run")) == 4


def test_batches_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    ran = two_processes(tmp_path, "q4_0", "schedule.batch_size=3", "schedule.tokens=48")
    assert ran.returncode != 0
    assert "schedule.batch_size = 3 sequences on 2 processes: expected a multiple of 2" in ran.stderr
    assert not (tmp_path / "run").exists()


def test_layers_are_recomputed_and_compiled_within_shards(tmp_path: Path) -> None:
    command = [sys.executable, *PROCESSES, "-m", "tests.support.layers", str(tmp_path / "losses.json")]
    ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    plain, both = json.loads((tmp_path / "losses.json").read_text())
    assert both == pytest.approx(plain, rel=1e-4)  # compiled layers attend in chunks, whose sums have another order
    assert plain == pytest.approx(layers.train()[0], rel=1e-5)


DIFFERENT = {
    "recipe": ("run", ("schedule.seed={rank}",), "process 1 has another plan|process 1 has another recipe"),
    "data": ("run", ("corpus={rank}",), "process 1 has another corpus than process 0"),
    "disk": ("run-{rank}", (), r"process 1 on .* does not see .*, into which process 0 writes"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_processes_that_differ_are_refused(kind: str, tmp_path: Path) -> None:
    """Another recipe, other data, or a folder of its own; no process leaves anything behind."""
    name, overrides, message = DIFFERENT[kind]
    for folder in ("run", "run-0", "run-1"):
        (tmp_path / folder).mkdir()
    ran = two_processes(tmp_path / name, "q4_0", *overrides)
    assert ran.returncode != 0
    assert re.search(message, ran.stderr), ran.stderr[-3000:]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def draft(out: Path, *launcher: str) -> None:
    """Train the bundled drafter for the bundled model, four steps of each stage."""
    options = ("tokens=512", "batch_size=4", "sequence_length=32", "lr=1e-5", "scale_lr=1e-4")
    command = [sys.executable, *launcher, "-m", "intaglio", "train-drafter", str(MODEL_DIR), f"--out={out}"]
    command += [f"--drafter={DRAFTER_DIR}", f"--data={HELDOUT_TEXT}", "--checkpoint-every=3", "--resume"]
    command += ["--prompts=2", "--prompt-tokens=8", "--written-tokens=12", *(f"--set=schedule.{o}" for o in options)]
    ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("retrained, quantized") == 1


def test_a_drafter_trains_in_two_processes_as_in_one(tmp_path: Path) -> None:
    """The target is sharded, the drafter is not; the second run goes on from a checkpoint of the first."""
    draft(tmp_path / "one")
    draft(tmp_path / "two", *PROCESSES)
    for stage in ("float", "quantized"):
        found, expected = read_losses(tmp_path / "two" / stage), read_losses(tmp_path / "one" / stage)
        assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
        assert_same_codes(tmp_path / "one" / stage, tmp_path / "two" / stage)
    shutil.rmtree(tmp_path / "two/quantized/packed")
    draft(tmp_path / "two", *PROCESSES)
    assert_same_codes(tmp_path / "one", tmp_path / "two")
