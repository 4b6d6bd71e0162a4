"""Checkpoints that others trained, converted: what was trained is what ships."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from intaglio.errors import ConfigError, QualityError, RecipeError
from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.gguf.write import export_gguf
from intaglio.formats.verify import Verification, verify
from intaglio.numerics.grid import F16, Quantized
from intaglio.packed.model import PackedModel
from intaglio.plan.recipe import Recipe
from intaglio.sources.convert import convert
from intaglio.sources.inspect import inspect
from tests.support.cases import Case, fields
from tests.support.cli import contents, intaglio
from tests.support.strangers import RULES, make_stranger, pack_originals, put_on_grid
from tests.support.tiny import GEMMA3, GEMMA4, GEMMA4_MOE, MULTIMODAL, add_unused, make_checkpoint, pack

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
    assert_same_weights(verify(stock, tmp_path / "model.gguf"))


def assert_same_weights(found: Verification) -> None:
    """Nothing differs but the names of plan and recipe."""
    assert not (found.differing_codes or found.differing_scales or found.differing_values or found.unlike)
    assert not (found.missing or found.extra)
    assert all(fact.startswith(("config: intaglio.plan", "config: intaglio.recipe")) for fact in found.differing_facts)


def test_a_mobile_folder_is_imported(mobile_packed: PackedModel, tmp_path: Path) -> None:
    from intaglio.formats.mobile.write import export_mobile

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


def put_rows(folder: Path, name: str, weight: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][: len(weight)] = weight.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_two_grids_within_a_tensor(tmp_path: Path) -> None:
    """Each block of four bits is recovered by itself, whatever its rule; rows of eight bits beside them stop it."""
    name, latent = (
        "model.layers.1.mlp.up_proj.weight",
        torch.randn(128, 256, generator=torch.Generator().manual_seed(2)),
    )
    originals = make_stranger(tmp_path / "stranger", "absmax-7")
    codes, scale = put_on_grid(latent.reshape(-1, 32), "extremum-8", "bf16")
    put_rows(tmp_path / "stranger", name, (codes * scale).reshape(128, 256))
    value = convert(tmp_path / "stranger", tmp_path / "packed").packed.read(name)
    assert isinstance(value, Quantized)
    expected = torch.cat([codes, originals[name][0][len(codes) :]])
    assert torch.equal(value.codes.reshape(-1, 32).abs(), expected.abs().to(torch.int8))  # either sign of a scale
    assert torch.equal(value.decode().to(torch.bfloat16), load_file(tmp_path / "stranger/model.safetensors")[name])

    step = (latent.abs().amax(1, keepdim=True) / 127).bfloat16().float()
    put_rows(tmp_path / "stranger", name, (latent / step).round() * step)
    says = r"up_proj.weight: 1,024 of 2,048 blocks do not lie on its grid \(block 32, absmax / 7\)\. Say --requantize"
    with pytest.raises(QualityError, match=says):
        convert(tmp_path / "stranger", tmp_path / "other")
    assert not (tmp_path / "other").exists()


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
    assert verify(whole, tmp_path / "whole.gguf").exact
    assert_same_weights(verify(text.packed, tmp_path / "whole.gguf"))


# What they print


def test_inspect_shows_what_would_become_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    make_stranger(tmp_path / "stranger", "absmax-7")
    outcome = intaglio("inspect", tmp_path / "stranger")
    assert outcome.code == 0
    row = next(line for line in outcome.out.splitlines() if "mlp.up_proj" in line)
    assert re.search(
        r"layers\.\*\.mlp\.up_proj\.weight \(2\).*BF16.*absmax / 7 .*100\.00%.*bfloat16.*0\.00%.*100\.00%", row
    )
    assert re.search(r"embed_tokens\.weight.*latent", outcome.out)
    assert len(intaglio("inspect", tmp_path / "stranger", "--all").out) > len(outcome.out)
    said = json.loads(intaglio("inspect", tmp_path / "stranger", "--json").out)
    up = next(t for t in said["tensors"] if t["name"] == "model.layers.0.mlp.up_proj.weight")
    assert (up["grid"], up["recovered_share"], up["stock_keeps_share"], up["ships_share"]) == ("absmax-7", 1, 0, 1)
    assert not up["portable"]


def test_our_own_checkpoint_is_portable(gemma4: Case) -> None:
    on_blocks = [v for v in inspect(gemma4.hf).verdicts if v.in_blocks]
    assert len(on_blocks) == sum(t.grid.ggml_type == "Q4_0" for t in gemma4.packed.plan)
    assert all(v.portable and v.grid == "extremum-8" and v.tally.stock == v.tally.all for v in on_blocks)
    assert all(v.portable for v in inspect(gemma4.gguf).verdicts if v.stored in ("Q4_0", "Q6_K"))
    assert {v.grid for v in inspect(gemma4.packed.path).verdicts} >= {"q4_0", "q6_k"}


def test_convert_says_what_was_fitted(tmp_path: Path) -> None:
    make_stranger(tmp_path / "stranger", "absmax-8")
    outcome = intaglio("convert", tmp_path / "stranger", "-o", tmp_path / "packed")
    assert outcome.code == 0
    assert "model.embed_tokens.weight has no trained grid: fitted to q6_k" in outcome.out
    assert "tensors: block 32, absmax / 8" in outcome.out
    assert "LOSSY" not in outcome.out
    provenance = PackedModel.open(tmp_path / "packed").provenance
    assert provenance["fitted"] == {"model.embed_tokens.weight": "q6_k"}


# What is refused


def refused(folder: Path, *arguments: object, says: str) -> None:
    """Exit code 2, one message, nothing written."""
    outcome = intaglio("convert", *arguments, "-o", folder / "packed")
    assert outcome.code == 2
    assert re.search(says, outcome.error), outcome.error
    assert not (folder / "packed").exists()


def test_ggufs_that_do_not_fit(cases: dict[str, Case], tmp_path: Path) -> None:
    gemma4, gemma3 = cases["gemma4"], cases["gemma3"]
    refused(tmp_path, gemma4.gguf, says="brings no config.json.*--config")
    refused(tmp_path, gemma4.gguf, "--config", gemma3.checkpoint, says="general.architecture = 'gemma4'.*'gemma3'")
    refused(tmp_path, gemma4.packed.path, says="packed: a packed model: .*`intaglio export")
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((gemma4.checkpoint / "config.json").read_text("utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}), "utf-8")
    refused(tmp_path, gemma4.gguf, "--config", other, says="feed_forward_length = .* but the config of")


def test_a_gguf_with_a_broken_block_count(gemma4: Case, tmp_path: Path) -> None:
    data = gemma4.gguf.read_bytes()
    key = b"gemma4.block_count" + (4).to_bytes(4, "little")
    at = data.index(key) + len(key)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data[:at] + (7).to_bytes(4, "little") + data[at + 4 :])
    refused(tmp_path, broken, "--config", gemma4.checkpoint, says="block_count = 7, but its tensors are those of 4 lay")
    assert intaglio("inspect", broken).code == 2


def sharded(folder: Path, checkpoint: Path) -> dict[str, str]:
    """The checkpoint in two files; the weight map of its index."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(weight_map.values())):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    return weight_map


def test_shards_that_contradict_their_index(gemma4: Case, tmp_path: Path) -> None:
    weight_map = sharded(tmp_path / "model", gemma4.hf)
    assert {v.grid for v in inspect(tmp_path / "model").verdicts} == {v.grid for v in inspect(gemma4.hf).verdicts}
    name, index = min(weight_map), tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | {name: "model-2.safetensors"}}), "utf-8")
    refused(tmp_path, tmp_path / "model", says=f"puts {name} into model-2.safetensors, but model-1")
    index.write_text(json.dumps({"weight_map": weight_map | {"more": "model-2.safetensors"}}), "utf-8")
    refused(tmp_path, tmp_path / "model", says="puts more into model-2.safetensors, but no shard holds it")
    second = load_file(tmp_path / "model" / "model-2.safetensors")
    second[name] = torch.zeros(2)
    save_file(second, tmp_path / "model" / "model-2.safetensors", {"format": "pt"})
    refused(tmp_path, tmp_path / "model", says=f"{name} is in model-1.safetensors and in model-2.safetensors")
    (tmp_path / "model" / "model-2.safetensors").unlink()
    refused(tmp_path, tmp_path / "model", says="lists 'model-2.safetensors', which is not a file of this folder")


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    (tmp_path / "text.txt").write_text("The whale swam.")
    for path, says in (
        (tmp_path / "weights.bin", "weights.bin is a pickle"),
        (tmp_path / "text.txt", "neither GGUF nor"),
        (tmp_path / "gone", "no such file or folder"),
    ):
        outcome = intaglio("inspect", path)
        assert outcome.code == 2 and says in outcome.error


def test_a_config_cannot_make_inspect_build_anything(gemma4: Case, tmp_path: Path) -> None:
    """Layers without end, in a config; and a module of its own that is to be imported."""
    folder = Path(shutil.copytree(gemma4.hf, tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"num_hidden_layers": 10**9, "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "evil.py").write_text("raise SystemExit('executed')", "utf-8")
    assert len(inspect(folder).verdicts) == len(inspect(gemma4.hf).verdicts)


def test_keys_and_values_that_no_one_reads_come_along(tmp_path: Path) -> None:
    make_stranger(tmp_path / "stranger", "extremum-8", config=GEMMA4)
    unused = add_unused(tmp_path / "stranger")
    result = convert(tmp_path / "stranger", tmp_path / "packed")
    assert [tensor.name for tensor in result.packed.plan.carried] == unused
    assert len(result.left_out) == 2  # a norm in each of the two layers
    for name in unused:
        value = result.packed.read(name)
        assert isinstance(value, Quantized) and value.grid.ggml_type == "Q4_0"


def test_experts_come_back_from_a_gguf_and_from_floats(tmp_path: Path) -> None:
    packed = pack(make_checkpoint(tmp_path / "checkpoint", GEMMA4_MOE), tmp_path / "packed")
    export_gguf(packed, tmp_path / "model.gguf")
    export_hf(packed, tmp_path / "hf")
    for source in (tmp_path / "model.gguf", tmp_path / "hf"):
        again = convert(source, tmp_path / f"from-{source.name}", config=tmp_path / "checkpoint").packed
        for tensor in packed.plan:
            if tensor.spec.role == "expert":
                value, found = packed.read(tensor.name), again.read(tensor.name)
                assert isinstance(value, Quantized) and isinstance(found, Quantized)
                assert torch.equal(value.codes, found.codes) and torch.equal(value.scale, found.scale)
