"""Checkpoints that others trained, converted: what was trained is what ships."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from intaglio.errors import ConfigError, QualityError, RecipeError
from intaglio.export.gguf import export_gguf
from intaglio.export.hf import export_hf
from intaglio.numerics.grid import F16, Quantized
from intaglio.packed.model import PackedModel
from intaglio.packed.verify import verify
from intaglio.plan.recipe import Recipe
from intaglio.sources.convert import convert
from intaglio.sources.inspect import inspect
from tests.support.cases import Case, fields
from tests.support.cli import contents, intaglio
from tests.support.strangers import RULES, make_stranger, pack_originals
from tests.support.tiny import GEMMA3, MULTIMODAL, make_checkpoint, pack

# Scales and weights of which a checkpoint keeps all bits: of a float16 scale, bfloat16 weights keep eight.
DETERMINED = [(scale, stored) for scale in ("bf16", "fp16") for stored in ("bf16", "fp16", "fp32")]
DETERMINED.remove(("fp16", "bf16"))


@pytest.mark.parametrize(("scale", "stored"), DETERMINED)
@pytest.mark.parametrize("rule", RULES)
def test_the_gguf_of_recovered_codes_is_that_of_the_original_ones(
    rule: str, scale: str, stored: str, tmp_path: Path
) -> None:
    source = tmp_path / "stranger"
    originals = make_stranger(source, rule, scale=scale, stored=stored)
    result = convert(source, tmp_path / "packed")
    assert result.recovered == result.blocks == sum(len(codes) for codes, _ in originals.values())
    assert not result.lossy
    assert "lossy" not in result.packed.provenance
    export_gguf(result.packed, tmp_path / "recovered.gguf")
    pack_originals(source, result.packed.plan, originals, tmp_path / "originals")
    export_gguf(PackedModel.open(tmp_path / "originals"), tmp_path / "original.gguf")
    assert (tmp_path / "recovered.gguf").read_bytes() == (tmp_path / "original.gguf").read_bytes()


@pytest.mark.parametrize("rule", RULES)
def test_float16_scales_in_bfloat16_weights_come_back_as_far_as_the_weights_tell(rule: str, tmp_path: Path) -> None:
    source = tmp_path / "stranger"
    originals = make_stranger(source, rule, scale="fp16", stored="bf16")
    packed = convert(source, tmp_path / "packed").packed
    weights = load_file(source / "model.safetensors")
    for name, (codes, scales) in originals.items():
        value = packed.read(name)
        assert isinstance(value, Quantized)
        assert torch.equal(value.codes.reshape(-1, 32), codes.to(torch.int8))
        assert torch.equal(value.decode().to(torch.bfloat16), weights[name])
        # a scale a step of float16 away is another one that the weights allow
        assert float((value.step.reshape(-1, 1) / scales - 1).abs().max()) < 2**-8


@pytest.mark.parametrize("stored", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("rule", RULES)
def test_float32_scales_are_recovered(rule: str, stored: str, tmp_path: Path) -> None:
    originals = make_stranger(tmp_path / "stranger", rule, scale="fp32", stored=stored)
    verdicts = {v.name: v for v in inspect(tmp_path / "stranger").verdicts}
    for name in originals:
        assert verdicts[name].tally.recovered == verdicts[name].tally.all > 0
        assert verdicts[name].scale_dtype == "float32"
        assert verdicts[name].tally.ships < verdicts[name].tally.all  # which Q4_0 cannot hold
    with pytest.raises(QualityError, match="a scale that float16 does not hold"):
        convert(tmp_path / "stranger", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_our_own_checkpoint_gives_its_own_codes_on_its_own_recipe(gemma4: Case, tmp_path: Path) -> None:
    result = convert(gemma4.hf, tmp_path / "packed")
    assert result.packed.plan.recipe.name == "q4_0"
    for tensor, value in gemma4.packed:
        if isinstance(value, Quantized) and tensor.grid.ggml_type == "Q4_0":
            found = result.packed.read(tensor.name)
            assert isinstance(found, Quantized)
            assert torch.equal(found.codes, value.codes)
            assert torch.equal(found.scale, value.scale)
    export_hf(result.packed, tmp_path / "hf")  # portable: bfloat16 holds it


def test_a_gguf_comes_back_byte_for_byte(case: Case, tmp_path: Path) -> None:
    result = convert(case.gguf, tmp_path / "packed", config=case.checkpoint)
    assert not result.lossy and not result.fitted and not result.rounded
    export_gguf(result.packed, tmp_path / "model.gguf")
    assert verify(case.packed, tmp_path / "model.gguf").exact
    first, second = (GGUFReader(path).tensors for path in (case.gguf, tmp_path / "model.gguf"))
    for ours, theirs in zip(first, second, strict=True):
        assert (ours.name, ours.tensor_type) == (theirs.name, theirs.tensor_type)
        assert np.array_equal(ours.data, theirs.data)


def test_what_llama_quantize_wrote_comes_back_too(tmp_path: Path) -> None:
    """Scales of Q4_0 and Q6_K that are not portable: the grids, and so the recipe, are the free ones."""
    stock = pack(make_checkpoint(tmp_path / "checkpoint", GEMMA3), tmp_path / "stock", "q4_0-stock")
    export_gguf(stock, tmp_path / "stock.gguf")
    result = convert(tmp_path / "stock.gguf", tmp_path / "packed", config=tmp_path / "checkpoint")
    export_gguf(result.packed, tmp_path / "model.gguf")
    assert verify(stock, tmp_path / "model.gguf").exact


def test_a_mobile_folder_is_imported(mobile_packed: PackedModel, tmp_path: Path) -> None:
    from intaglio.export.mobile import export_mobile

    export_mobile(mobile_packed, tmp_path / "mobile")
    result = convert(tmp_path / "mobile", tmp_path / "packed")
    export_mobile(result.packed, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "mobile")
    assert {v.grid for v in inspect(tmp_path / "mobile").verdicts} >= {"int2", "int4", "int8"}


def test_rows_of_a_mobile_model_saved_as_floats(mobile_packed: PackedModel, tmp_path: Path) -> None:
    """A checkpoint on the mobile grids, with a scale for each row, or for each layer's slice of one."""
    export_hf(mobile_packed, tmp_path / "floats")
    tensors = load_file(tmp_path / "floats" / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(torch.bfloat16)  # float32 scales, weights rounded to eight bits
    save_file(tensors, tmp_path / "floats" / "model.safetensors", {"format": "pt"})
    found = convert(tmp_path / "floats", tmp_path / "packed").packed
    assert found.plan.recipe.name == "mobile"
    for tensor, value in mobile_packed:
        if isinstance(value, Quantized):
            again = found.read(tensor.name)
            assert isinstance(again, Quantized)
            assert torch.equal(again.codes, value.codes), tensor.name
            assert torch.equal(again.decode().to(torch.bfloat16), tensors[tensor.name])


def spoil(folder: Path, name: str, rows: int) -> None:
    """Put the first rows of a tensor off their grid."""
    tensors = load_file(folder / "model.safetensors")
    noise = torch.randn(tensors[name][:rows].shape, generator=torch.Generator().manual_seed(1))
    tensors[name][:rows] = noise.mul(0.02).to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_blocks_off_the_grid_stop_the_conversion_unless_requantized(tmp_path: Path) -> None:
    source, name = tmp_path / "stranger", "model.layers.1.mlp.up_proj.weight"
    originals = make_stranger(source, "absmax-7")
    spoil(source, name, 3)
    blocks = 3 * 256 // 32
    stopped = intaglio("convert", source, "-o", tmp_path / "packed")
    assert stopped.code == 1
    assert f"{name}: {blocks} of" in stopped.error and "--requantize" in stopped.error
    assert not (tmp_path / "packed").exists()
    done = intaglio("convert", source, "-o", tmp_path / "packed", "--requantize", "--json")
    assert json.loads(done.out)["lossy"] == {name: blocks}
    packed = PackedModel.open(tmp_path / "packed")
    assert packed.provenance["lossy"] == {"blocks": blocks, "tensors": {name: blocks}}
    value = packed.read(name)
    assert isinstance(value, Quantized)
    codes, scale = originals[name]
    assert torch.equal(value.codes.reshape(-1, 32)[blocks:], codes[blocks:].to(torch.int8))
    assert torch.equal(value.step.reshape(-1, 1)[blocks:], scale[blocks:])
    latent = load_file(source / "model.safetensors")[name][:3].float()
    error = (value.decode()[:3] - latent).norm() / latent.norm()
    assert error < 0.12  # four bits of a block
    export_gguf(packed, tmp_path / "model.gguf")
    assert fields(tmp_path / "model.gguf")["intaglio.lossy_blocks"] == blocks


def test_inspect_calls_a_tensor_of_two_kinds_mixed(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    make_stranger(tmp_path / "stranger", "absmax-8")
    spoil(tmp_path / "stranger", name, 100)
    verdict = next(v for v in inspect(tmp_path / "stranger").verdicts if v.name == name)
    assert verdict.grid == "mixed"
    assert verdict.tally.all - verdict.tally.recovered == 100 * 256 // 32


def test_float_checkpoints_are_not_for_converting(gemma4: Case, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tensor lies on a grid"):
        convert(gemma4.checkpoint, tmp_path / "packed")
    assert {v.grid for v in inspect(gemma4.checkpoint).verdicts} == {"latent", "vector"}


def test_embeddings_that_stay_floats_by_the_recipe(tmp_path: Path) -> None:
    make_stranger(tmp_path / "stranger", "absmax-7")
    recipe = Recipe.load("q4_0-free", ["weights.token_embedding.grid=f16"])
    result = convert(tmp_path / "stranger", tmp_path / "packed", recipe=recipe)
    assert not result.fitted
    name = "model.embed_tokens.weight"
    weight = load_file(tmp_path / "stranger" / "model.safetensors")[name].float()
    assert torch.equal(result.packed.decode(name), F16.round(weight))
    assert result.rounded == {name: int((F16.round(weight) != weight).sum())}  # below float16's normal numbers
    with pytest.raises(RecipeError, match="use q4_0-free"):
        convert(tmp_path / "stranger", tmp_path / "other", recipe=Recipe.load("q4_0"))


def test_towers_come_along_or_not(tmp_path: Path) -> None:
    make_stranger(tmp_path / "stranger", "extremum-8", config=MULTIMODAL)
    whole = convert(tmp_path / "stranger", tmp_path / "whole").packed
    text = convert(tmp_path / "stranger", tmp_path / "text", text_only=True)
    assert whole.plan.model.whole is not None and text.packed.plan.model.whole is None
    assert text.left_out
    export_gguf(whole, tmp_path / "whole.gguf")
    assert verify(text.packed, tmp_path / "whole.gguf").exact
