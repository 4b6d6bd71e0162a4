"""Packed models of the mobile recipes: two bits, float32 scales, and static scales that are off or make sense."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import intaglio.tiny as tiny
from intaglio.errors import ConfigError, InputError, RecipeError, WeightError
from intaglio.formats.gguf.write import export_gguf
from intaglio.formats.verify import verify
from intaglio.measure.simulate import decoded_model
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.packed.checkpoint import load_model, stream_rows
from intaglio.packed.model import FILE_NAME, PackedModel
from intaglio.packed.write import write_packed
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.quantize import fit_tensor, quantize
from tests.support.cases import Case
from tests.support.repack import resave as rewrite

DOWN = "model.layers.2.mlp.down_proj"
KEYS = "model.layers.1.self_attn.k_cache_scale"


@pytest.fixture
def copy(mobile_packed: PackedModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mobile_packed.path, tmp_path / "copy"))


def resave(folder: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> PackedModel:
    rewrite(folder, tensors, **metadata)
    return PackedModel.open(folder)


def test_what_was_fitted_is_read_bit_for_bit(mobile_packed: PackedModel) -> None:
    source = dict(stream_rows(mobile_packed.path.parent / "checkpoint", mobile_packed.plan.model))
    seen: set[str] = set()
    for tensor, value in mobile_packed:
        expected = fit_tensor(source[tensor.name], mobile_packed.plan, tensor.name)
        if isinstance(value, Quantized):
            assert isinstance(expected, Quantized)
            assert torch.equal(value.codes, expected.codes)
            assert torch.equal(value.scale, expected.scale)
            seen.add(value.grid.name)
        else:
            assert torch.equal(value.float(), expected)
    assert seen == {"int2", "int4", "int8"}


def test_bytes_are_those_of_the_plan(mobile_packed: PackedModel) -> None:
    stored = load_file(mobile_packed.path / FILE_NAME)
    scalars = {name for name, tensor in stored.items() if tensor.ndim == 0 and name.endswith("_scale")}
    assert scalars == {scale.name for scale in mobile_packed.plan.static_scales}
    assert sum(t.nbytes for name, t in stored.items() if name not in scalars) == mobile_packed.plan.size_bytes


def test_quantizing_leaves_static_scales_off(mobile_packed: PackedModel) -> None:
    values = mobile_packed.read_static()
    assert set(values) == {scale.name for scale in mobile_packed.plan.static_scales}
    assert not any(values.values())


def write(mobile_packed: PackedModel, out: Path, statics: dict[str, float]) -> PackedModel:
    """The same weights with other static scales; those not named are off."""
    with write_packed(out, mobile_packed.plan, assets=mobile_packed.path, provenance={}) as writer:
        for tensor, value in mobile_packed:
            writer.add(tensor.name, value)
        writer.leave_static_off()
        for name, value in statics.items():
            writer.add_static(name, value)
    return PackedModel.open(out)


def test_a_static_scale_is_stored_with_all_that_share_it(mobile_packed: PackedModel, tmp_path: Path) -> None:
    layer = "model.layers.0.self_attn"
    owners = {f"{layer}.q_proj.input_activation_scale": 0.1, KEYS: 0.03, f"{DOWN}.output_activation_scale": 2.0}
    values = write(mobile_packed, tmp_path / "out", owners).read_static()
    on = {name for name, value in values.items() if value}
    assert on == {
        *(f"{layer}.{linear}_proj.input_activation_scale" for linear in "qkv"),
        KEYS,
        "model.layers.3.self_attn.k_cache_scale",  # the other full-attention layer, which shares the keys of layer 1
        f"{DOWN}.output_activation_scale",
    }
    assert values["model.layers.3.self_attn.k_cache_scale"] == float(torch.tensor(0.03))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e-40, 1e-60])
def test_static_scales_that_no_runtime_could_use_are_refused(
    mobile_packed: PackedModel, tmp_path: Path, copy: Path, value: float
) -> None:
    with pytest.raises(WeightError, match=rf"{KEYS} = .*: expected 0, which is off, or a normal positive"):
        write(mobile_packed, tmp_path / "out", {KEYS: value})
    assert not (tmp_path / "out").exists()
    if torch.tensor(value) != 0:
        with pytest.raises(InputError, match=rf"{KEYS} = .*: expected 0, which is off"):
            resave(copy, {KEYS: torch.tensor(value)}).read_static()


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.k_cache_scale", "lm_head.input_activation_scale"])
def test_only_owners_of_a_scale_take_a_value(mobile_packed: PackedModel, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no static scale of this plan"):
        write(mobile_packed, tmp_path / "out", {name: 1.0})


def test_scales_that_should_be_shared_and_differ_are_named(copy: Path) -> None:
    shared = "model.layers.3.self_attn.k_cache_scale"
    damaged = resave(copy, {shared: torch.tensor(0.5)})
    with pytest.raises(InputError, match=rf"{shared} = 0\.5, but it is the scale of {KEYS}, which is 0\.0"):
        damaged.read_static()


def test_static_scales_that_were_forgotten_are_an_error(mobile_packed: PackedModel, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="never written"),
        write_packed(tmp_path / "out", mobile_packed.plan, assets=mobile_packed.path, provenance={}) as writer,
    ):
        for tensor, value in mobile_packed:
            writer.add(tensor.name, value)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-40, math.nan])
def test_weight_scales_that_no_runtime_could_use_are_named(copy: Path, value: float) -> None:
    scale = load_file(copy / FILE_NAME)[f"{DOWN}.weight.scale"]
    scale[5] = value
    damaged = resave(copy, {f"{DOWN}.weight.scale": scale})
    with pytest.raises(InputError, match=rf"{DOWN}\.weight: 1 of 256 scales of grid int2 .* at row 5, block 0"):
        damaged.read(f"{DOWN}.weight")


def test_a_plan_of_another_digest_is_named(copy: Path) -> None:
    with pytest.raises(ConfigError, match=r"was packed by plan 000000000000, but its recipe and config make plan"):
        resave(copy, {}, plan="0" * 64)


def test_gguf_has_no_such_grids(mobile_packed: PackedModel, gemma4: Case, tmp_path: Path) -> None:
    says = r"on grid int2, whose scales are float32, and GGUF's are .*channel_scales=bf16"
    with pytest.raises(RecipeError, match=says):
        export_gguf(mobile_packed, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
    assert "token_embd.weight" in verify(mobile_packed, gemma4.gguf).unlike


def test_the_bundled_model_goes_through(tmp_path: Path) -> None:
    """It is as close to the original as its bits allow, and closer than by the largest weights."""
    distances = {}
    teacher = load_model(tiny.MODEL_DIR)
    ids = torch.randint(3, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = teacher(input_ids=ids).logits.log_softmax(-1)
    for fit in ("mse", "absmax"):
        plan = make_plan(tiny.MODEL_DIR, Recipe.load("mobile", [f"fit={fit}"]))
        made = quantize(tiny.MODEL_DIR, plan, tmp_path / fit)
        assert made.provenance["method"] == f"fit {fit}"
        for tensor, value in made:
            if isinstance(tensor.grid, BlockGrid):
                slices = 8 if tensor.spec.role == "ple_embedding" else 1
                assert value.scale.shape == (tensor.spec.shape[0], slices)
        with torch.no_grad():
            found = decoded_model(teacher, made)(input_ids=ids).logits.log_softmax(-1)
        distances[fit] = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert distances["mse"] < 0.8 * distances["absmax"]
