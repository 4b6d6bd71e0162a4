"""Candidates are measured one at a time beside an original whose dtype and batches fit the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.verify import verify
from intaglio.measure import original as original_module
from intaglio.measure.distances import weight_distances
from intaglio.measure.evaluate import Candidate, Kept, evaluate_many, logits_of
from intaglio.measure.original import Original, measuring_dtype, open_original
from intaglio.measure.simulate import Simulation, decoded_model
from intaglio.numerics.device import device_for
from intaglio.numerics.fit import fit_absmax
from intaglio.numerics.fit_stock import fit_stock
from intaglio.numerics.grid import BlockGrid, grid_named
from intaglio.packed.checkpoint import load_model
from intaglio.packed.codes import _unpack_by_shifts, pack_codes, unpack_codes
from intaglio.packed.model import PackedModel
from intaglio.plan.family import read_spec
from intaglio.progress import Progress
from intaglio.runs import train as workflow
from intaglio.train import quantize as quantize_module
from tests.support.cases import Case
from tests.support.tiny import GEMMA4, build, fill, pack

GPU = torch.device("cuda")
ON = [torch.device("cpu")] + ([GPU] if torch.cuda.is_available() else [])
GB = 1 << 30


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(5, 4000, (5, 24), generator=torch.Generator().manual_seed(0))


class CudaDivision(TorchFunctionMode):
    """Divides by Python numbers as PyTorch's CUDA kernels do: by multiplying with the reciprocal."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__truediv__, Tensor.div, torch.div) and isinstance(args[1], int | float):
            return args[0] * float(np.float32(1) / np.float32(args[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ON, ids=str)
@pytest.mark.parametrize("name", ["q4_0-free", "q8_0-free", "q6_k-free", "int2", "int4", "int8"])
def test_rounding_of_stock_tools_has_the_same_bits_on_every_device(name: str, device: torch.device) -> None:
    values = torch.randn(512, 256, generator=torch.Generator().manual_seed(1)) * 0.02
    grid = grid_named(name)
    assert isinstance(grid, BlockGrid)
    fit, grid = (fit_absmax, grid.for_width(256)) if grid.positive else (fit_stock, grid)
    expected = fit(values, grid)
    with CudaDivision():
        found = fit(values.to(device), grid)
    for part in ("codes", "scale", "super_scale"):
        one, other = getattr(expected, part), getattr(found, part)
        assert one is other is None or torch.equal(one, other.cpu()), part


@pytest.mark.parametrize("name", ["q4_0", "int2", "int4", "q6_k", "int8"])
def test_codes_are_unpacked_by_operations_of_any_device(name: str) -> None:
    grid: Any = grid_named(name)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(grid.code_min, grid.code_max + 1, (3, 5, 64), generator=generator, dtype=torch.int8)
    packed = pack_codes(codes, grid)
    assert torch.equal(unpack_codes(packed, grid), codes)
    assert grid.code_bits not in (2, 4) or torch.equal(_unpack_by_shifts(packed, grid), codes)


def test_the_device_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_for("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert device_for() == torch.device("cuda", 1)


def test_fits_are_made_on_the_device(gemma4: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(quantize_module, "device_for", lambda device: asked.append(device) or torch.device("cpu"))
    made = quantize_module.quantize(gemma4.checkpoint, gemma4.packed.plan, tmp_path / "packed", device="cuda:3")
    assert asked == ["cuda:3"] and made.sha256() == gemma4.packed.sha256()


def test_training_begins_from_the_original_in_its_own_dtype_on_a_gpu(
    gemma4: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[torch.dtype, torch.device]] = []
    monkeypatch.setattr(workflow, "load_own_rows", lambda path, spec, *how: asked.append(how))
    workflow._teacher(gemma4.checkpoint, read_spec(gemma4.checkpoint), GPU)
    workflow._teacher(gemma4.checkpoint, read_spec(gemma4.checkpoint), torch.device("cpu"))
    assert asked == [(torch.bfloat16, GPU), (torch.float32, torch.device("cpu"))]


def test_weights_are_read_to_the_device_they_are_for(gemma4: Case) -> None:
    meta = load_model(gemma4.checkpoint, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


# The reference's logits


class Counting:
    """Logits of a model, two windows at once, that counts the windows it computed."""

    def __init__(self, model: Any):
        self.model, self.windows = model, 0

    def __call__(self, windows_NT: Tensor) -> Iterator[Tensor]:
        for logits_TV in logits_of(self.model, windows_NT, batch=2):
            self.windows += 1
            yield logits_TV


@pytest.fixture(scope="module")
def model() -> Any:
    config = GEMMA4 | {"vocab_size": 64, "vocab_size_per_layer_input": 64, "num_hidden_layers": 2}
    made = build(config | {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0})
    fill(made, 0)
    return made.eval()


@pytest.mark.parametrize(("fit", "computed"), [(0, 15), (2, 5 + 3 + 3), (5, 5), (99, 5)])
def test_logits_of_the_original_are_kept_as_far_as_they_fit(
    model: Any, windows: Tensor, fit: int, computed: int
) -> None:
    windows = windows % 64
    counting = Counting(model)
    kept = Kept(counting, windows, keep_bytes=fit * 24 * 64 * 4)
    expected = list(logits_of(model, windows, batch=2))
    for _ in range(3):
        for found, wanted in zip(kept, expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert counting.windows == computed


def test_an_abandoned_pass_loses_nothing(model: Any, windows: Tensor) -> None:
    windows = windows % 64
    kept = Kept(Counting(model), windows, keep_bytes=GB)
    next(iter(kept))
    assert len(kept.kept) == 1
    assert len(list(kept)) == len(list(kept)) == 5


# The original


def test_on_a_cpu_the_original_is_the_float32_model_that_is_there(gemma4: Case, windows: Tensor) -> None:
    spec, cpu = read_spec(gemma4.checkpoint), torch.device("cpu")
    given = load_model(gemma4.checkpoint)
    measured = open_original(gemma4.checkpoint, spec, windows, cpu, given)
    assert measured.model is given and measured.batch == 1
    assert given.config._attn_implementation == "sdpa"
    assert 0 < measured.noise_kl < 1e-6
    assert "float32 on cpu" in measured.note and "another attention kernel, 4 windows" in measured.note
    other = open_original(gemma4.checkpoint, spec, windows, cpu, load_model(gemma4.checkpoint, torch.bfloat16))
    assert other.model.dtype == torch.float32
    for one, two in zip(measured.logits, other.logits, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("parameters", "dtype"), [(5_000_000_000, torch.float32), (12_000_000_000, torch.float32), (31_000_000_000, None)]
)
def test_a_gpu_measures_in_float32_what_fits_twice(
    parameters: int, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(original_module, "free_bytes", lambda device: 139 * GB)
    assert measuring_dtype(parameters, GPU) == (dtype or torch.bfloat16)
    assert measuring_dtype(10 * parameters, torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(
    ("free", "vocabulary", "batch"),
    [(99 * GB, 262144, 15), (20 * GB, 262144, 2), (0, 262144, 1), (99 * GB, 4096, 64)],
)
def test_a_gpu_reads_as_many_windows_at_once_as_fit(
    free: int, vocabulary: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.empty(GB, device="meta")  # the candidate takes four gigabytes
    fake = SimpleNamespace(config=SimpleNamespace(vocab_size=vocabulary), parameters=lambda: [weight])
    monkeypatch.setattr(original_module, "free_bytes", lambda device: free)
    windows = torch.zeros(512, 256, dtype=torch.long)
    found, keep = original_module._room(fake, windows, GPU)
    assert found == batch
    assert found * 256 * vocabulary * 4 * 6 + keep <= max(free, 6 * 256 * vocabulary * 4)


@pytest.mark.parametrize("alone", [True, False])
def test_in_bfloat16_the_noise_floor_is_against_float32_if_that_fits_alone(
    alone: bool, gemma4: Case, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(original_module, "measuring_dtype", lambda parameters, device: torch.bfloat16)
    monkeypatch.setattr(original_module, "_fit", lambda models, parameters, device: alone)
    measured = open_original(gemma4.checkpoint, read_spec(gemma4.checkpoint), windows, torch.device("cpu"))
    assert measured.model.dtype == torch.bfloat16
    assert 1e-8 < measured.noise_kl < 0.05
    assert "bfloat16 on cpu" in measured.note
    assert ("itself in float32" if alone else "another attention kernel") in measured.note
    assert all(logits_TV.dtype == torch.float32 for logits_TV in measured.logits)


# One model in memory for all candidates


def figures(original: Original, model: Any) -> float:
    source = logits_of(model, original.windows_NT)
    return original.compare(Candidate(source=source, runtime="", simulated=True), Progress()).kl_mean_nats


def test_one_model_computes_as_one_packed_model_after_another(gemma4: Case, windows: Tensor, tmp_path: Path) -> None:
    stock = pack(gemma4.checkpoint, tmp_path / "stock", "q4_0-stock")
    measured = open_original(gemma4.checkpoint, gemma4.packed.plan.model, windows, torch.device("cpu"))
    before = copy.deepcopy(measured.model.state_dict())
    apart = {packed.path: decoded_model(measured.model, packed) for packed in (stock, gemma4.packed)}
    candidates = {
        str(path): Candidate(source=logits_of(model, windows), runtime="", simulated=True)
        for path, model in apart.items()
    }
    together = evaluate_many(logits_of(measured.model, windows), candidates, windows)
    simulation, models = Simulation(measured.model), set()
    for packed in (stock, gemma4.packed, stock):
        model = simulation.load(packed)
        models.add(id(model))
        assert figures(measured, model) == together[str(packed.path)].kl_mean_nats
    assert len(models) == 1
    assert all(torch.equal(before[name], value) for name, value in measured.model.state_dict().items())


def test_static_scales_change_with_the_packed_model(mobile_packed: PackedModel, tmp_path: Path) -> None:
    checkpoint = mobile_packed.path.parent / "checkpoint"
    floats = pack(checkpoint, tmp_path / "packed", "q4_0")
    ids = torch.arange(5, 25)[None]
    simulation = Simulation(load_model(checkpoint))
    for packed in (mobile_packed, floats, mobile_packed):
        found = simulation.load(packed)(input_ids=ids).logits
        assert torch.equal(found, decoded_model(load_model(checkpoint), packed)(input_ids=ids).logits)


def test_distances_of_weights_are_the_same_in_parts(gemma4: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, packed = torch.device("cpu"), {"MSE": gemma4.packed}
    whole = weight_distances(gemma4.checkpoint, gemma4.packed.plan, packed, cpu)
    monkeypatch.setattr("intaglio.packed.store.CHUNK_ELEMENTS", 1 << 12)
    parts = weight_distances(gemma4.checkpoint, gemma4.packed.plan, packed, cpu)
    assert [row.tensor for row in whole] == [t.name for t in gemma4.packed.plan if isinstance(t.grid, BlockGrid)]
    source = load_model(gemma4.checkpoint).state_dict()
    for one, other in zip(whole, parts, strict=True):
        original = source[one.tensor]
        expected = float((gemma4.packed.decode(one.tensor) - original).norm() / original.norm())
        assert one.relative_rms["MSE"] == pytest.approx(expected, rel=1e-6)
        assert other.relative_rms["MSE"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("device", ON, ids=str)
def test_a_checkpoint_is_written_and_compared_on_the_device(
    device: torch.device, gemma4: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intaglio.packed.store.CHUNK_ELEMENTS", 1 << 14)  # several chunks a tensor
    monkeypatch.setattr("intaglio.numerics.layout.CHUNK_ELEMENTS", 1 << 13)  # and several pieces a chunk
    export_hf(gemma4.packed, tmp_path / "hf", device=device)
    path = tmp_path / "hf" / "model.safetensors"
    assert path.read_bytes() == (gemma4.hf / "model.safetensors").read_bytes()
    assert verify(gemma4.packed, tmp_path / "hf", device=device) == replace(
        verify(gemma4.packed, gemma4.hf), artifact=tmp_path / "hf"
    )
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][-1, -1] *= 2
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, path, {"format": "pt"})
    assert verify(gemma4.packed, tmp_path / "hf", device=device).differing_values == 2
