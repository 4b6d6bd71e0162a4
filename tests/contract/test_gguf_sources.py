"""GGUF files of others, converted: beside a config that agrees with them, and with what no grid of ours holds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from gguf.quants import quantize as quantize_gguf

from intaglio.formats.verify import verify
from intaglio.formats.words.write_vllm import export_vllm
from intaglio.numerics.grid import Quantized
from intaglio.packed.model import PackedModel
from intaglio.sources.convert import convert
from intaglio.sources.inspect import inspect
from tests.support.cases import Case
from tests.support.cli import intaglio
from tests.support.tiny import GEMMA4_MOE, make_checkpoint, pack

Q4_0 = GGMLQuantizationType.Q4_0


def rewrite(
    source: Path,
    target: Path,
    *,
    types: dict[str, GGMLQuantizationType] | None = None,
    every: GGMLQuantizationType | None = None,
    more: dict[str, np.ndarray] | None = None,
) -> Path:
    """A copy of a GGUF with some matrices, or every one, in other types, and with more tensors."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "gemma4")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, *rest = field.types
        writer.add_key_value(name, field.contents(), kind, rest[0] if rest else None)
    for tensor in reader.tensors:
        wanted = (types or {}).get(tensor.name) or (every if len(tensor.shape) > 1 else None)
        if wanted is None:
            kind, data = tensor.tensor_type, tensor.data
        else:
            kind, data = wanted, quantize_gguf(dequantize(tensor.data, tensor.tensor_type), wanted)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    for name, data in (more or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture
def base(gemma4: Case, tmp_path: Path) -> Path:
    """The folder of config and tokenizer, which a test may change."""
    return Path(shutil.copytree(gemma4.checkpoint, tmp_path / "base"))


def refused(tmp_path: Path, *arguments: object, says: str) -> str:
    outcome = intaglio("convert", *arguments, "-o", tmp_path / "packed")
    assert outcome.code == 2
    assert re.search(says, outcome.error), outcome.error
    assert not (tmp_path / "packed").exists()
    return outcome.error


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "rope base of full layers": (
        {"rope_parameters": {"full_attention": {"rope_type": "proportional", "rope_theta": 5e5}}},
        r"gemma4\.rope\.freq_base = 1000000\.0, but the config of \S+base makes it 500000\.0",
    ),
    "rope base of sliding layers": (
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}},
        r"gemma4\.rope\.freq_base_swa = 10000\.0, but .* 20000\.0",
    ),
    "share of a head that is rotated": (
        {"rope_parameters": {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5}}},
        r"rope_freqs\.weight = 'others', but the config of \S+base makes it 'those of its rope_parameters'",
    ),
    "eps": ({"rms_norm_eps": 1e-5}, r"layer_norm_rms_epsilon = \S+, but .* 1e-05"),
    "soft-capping": ({"final_logit_softcapping": 50.0}, r"final_logit_softcapping = 30\.0, but .* 50\.0"),
    "no soft-capping": ({"final_logit_softcapping": None}, r"final_logit_softcapping = 30\.0, but .* 0\.0"),
    "window": ({"sliding_window": 64}, r"attention\.sliding_window = 32, but .* 64"),
    "heads": ({"num_attention_heads": 2}, r"attention\.head_count = 4, but .* 2"),
}


@pytest.mark.parametrize("key", CONFIGS)
def test_a_config_that_contradicts_the_file_is_refused(key: str, base: Path, gemma4: Case, tmp_path: Path) -> None:
    changes, says = CONFIGS[key]
    config = json.loads((base / "config.json").read_text())
    for name, value in changes.items():
        if name == "rope_parameters":
            value = {k: config[name][k] | value.get(k, {}) for k in config[name]}
        config[name] = value
    (base / "config.json").write_text(json.dumps(config))
    refused(tmp_path, gemma4.gguf, f"--config={base}", says=says)


def change_json(path: Path, *keys: Any, value: Any) -> None:
    table = found = json.loads(path.read_text("utf-8"))
    for key in keys[:-1]:
        found = found[key]
    found[keys[-1]] = value
    path.write_text(json.dumps(table), "utf-8")


def test_a_tokenizer_that_contradicts_the_file_is_refused(base: Path, gemma4: Case, tmp_path: Path) -> None:
    path = base / "tokenizer.json"
    original = path.read_text("utf-8")
    tokenizer = json.loads(original)
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[1000:1002]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer), "utf-8")
    refused(tmp_path, gemma4.gguf, f"--config={base}", says=r"token \d+ is .*, but \S+tokenizer\.json has .* there")
    tokenizer = json.loads(original)
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][::-1]
    path.write_text(json.dumps(tokenizer), "utf-8")
    refused(tmp_path, gemma4.gguf, f"--config={base}", says=r"has other merges than \S+tokenizer\.json")
    path.write_text(original, "utf-8")
    settings = json.loads((base / "tokenizer_config.json").read_text("utf-8"))
    change_json(base / "tokenizer_config.json", "bos_token", value=settings["pad_token"])
    refused(
        tmp_path, gemma4.gguf, f"--config={base}", says=r"bos_token_id = \d+, but the config of \S+ makes it \[\d+\]"
    )


def test_a_file_of_floats_says_how_to_go_on(gemma4: Case, tmp_path: Path) -> None:
    """A bfloat16 GGUF, as llama.cpp's converter writes it: the advice leads to an exact GGUF."""
    path = rewrite(gemma4.gguf, tmp_path / "bf16.gguf", every=GGMLQuantizationType.BF16)
    config = f"--config={gemma4.checkpoint}"
    # our own values lie on their grid whatever type holds them
    assert intaglio("convert", path, config, "-o", tmp_path / "ours").code == 0
    latent = GGUFReader(gemma4.gguf)
    noise = {
        tensor.name: np.random.default_rng(0).normal(0, 0.05, tuple(reversed(tensor.shape))).astype(np.float32)
        for tensor in latent.tensors
        if len(tensor.shape) > 1
    }
    path = rewrite_values(gemma4.gguf, tmp_path / "latent.gguf", noise)
    error = refused(
        tmp_path, path, config, says="no tensor lies on a grid: say which one to fit it to, .* --recipe q4_0"
    )
    advised = re.search(r"--recipe (\S+)$", error)
    assert advised
    done = intaglio("convert", path, config, f"--recipe={advised[1]}", "-o", tmp_path / "packed")
    assert done.code == 0 and "LOSSY" not in done.out
    assert intaglio("export", tmp_path / "packed", "gguf", "-o", tmp_path / "again.gguf").code == 0
    up = PackedModel.open(tmp_path / "packed").decode("model.layers.0.mlp.up_proj.weight").numpy()
    error_of = np.linalg.norm(up - noise["blk.0.ffn_up.weight"]) / np.linalg.norm(noise["blk.0.ffn_up.weight"])
    assert error_of < 0.12  # four bits
    quantize = intaglio("quantize", path, "-o", tmp_path / "no")
    assert quantize.code == 2 and "a GGUF file: `intaglio convert" in quantize.error


def rewrite_values(source: Path, target: Path, values: dict[str, np.ndarray]) -> Path:
    """A copy of a GGUF with these matrices in bfloat16 in place of its own."""
    plain = rewrite(source, target.with_suffix(".plain"), every=GGMLQuantizationType.BF16)
    data = bytearray(plain.read_bytes())
    for tensor in GGUFReader(plain).tensors:
        if tensor.name in values:
            packed = quantize_gguf(values[tensor.name], GGMLQuantizationType.BF16).tobytes()
            data[tensor.data_offset : tensor.data_offset + len(packed)] = packed
    target.write_bytes(data)
    return target


def test_layers_of_other_types_are_taken_where_it_is_said(gemma4: Case, tmp_path: Path) -> None:
    """llama-quantize makes some layers Q4_1 when it has an importance matrix."""
    name, ours = "blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"
    path = rewrite(gemma4.gguf, tmp_path / "imatrix.gguf", types={name: GGMLQuantizationType.Q4_1})
    config = f"--config={gemma4.checkpoint}"
    error = refused(
        tmp_path, path, config, says=rf"{name} is of type Q4_1, whose codes no grid here holds: say --requan"
    )
    advised = re.search(r"say (--\S+) to fit", error)
    assert advised
    done = intaglio("convert", path, config, advised[1], "-o", tmp_path / "packed")
    assert done.code == 0 and "LOSSY" in done.out
    packed = PackedModel.open(tmp_path / "packed")
    assert list(packed.provenance["lossy"]["tensors"]) == [ours]
    stored = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == name)
    expected = torch.from_numpy(dequantize(stored.data, stored.tensor_type))
    assert float((packed.decode(ours) - expected).norm() / expected.norm()) < 0.12
    other = "model.layers.1.mlp.up_proj.weight"
    mine, theirs = packed.read(other), gemma4.packed.read(other)
    assert isinstance(mine, Quantized) and isinstance(theirs, Quantized) and torch.equal(mine.codes, theirs.codes)
    assert {v.stored for v in inspect(path).verdicts} >= {"Q4_1", "Q4_0"}


def test_towers_in_the_same_file_are_left_out_where_it_is_said(gemma4: Case, tmp_path: Path) -> None:
    towers = {"v.patch_embd.weight": np.ones((4, 4), np.float32), "mm.input_projection.weight": np.ones(4, np.float32)}
    path = rewrite(gemma4.gguf, tmp_path / "vision.gguf", more=towers)
    config = f"--config={gemma4.checkpoint}"
    error = refused(
        tmp_path, path, config, says=r"holds towers beside the text model \(mm\.input_projection\.weight, v\."
    )
    advised = re.search(r"say (--\S+)$", error)
    assert advised
    more = rewrite(gemma4.gguf, tmp_path / "more.gguf", more={"blk.0.attn_q.bias": np.ones(4, np.float32)})
    refused(tmp_path, more, config, "--text-only", says=r"1 tensors are not part of this model: blk\.0\.attn_q\.bias")
    assert intaglio("convert", path, config, advised[1], "-o", tmp_path / "packed").code == 0
    assert verify(PackedModel.open(tmp_path / "packed"), gemma4.gguf).exact


def test_overrides_without_a_recipe_change_the_one_that_is_found(gemma4: Case, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    more = ["--set=weights.ple_model_projection.grid=f32"]
    assert intaglio("convert", gemma4.gguf, f"--config={gemma4.checkpoint}", "-o", out, *more).code == 0
    assert PackedModel.open(out).plan["model.per_layer_model_projection.weight"].grid.name == "f32"


def test_a_mixtures_vllm_folder_is_converted(tmp_path: Path) -> None:
    """Its linears of single experts are put together again."""
    packed = pack(make_checkpoint(tmp_path / "checkpoint", GEMMA4_MOE), tmp_path / "packed")
    export_vllm(packed, tmp_path / "vllm")
    again = convert(tmp_path / "vllm", tmp_path / "again").packed
    for tensor in packed.plan:
        value, found = packed.read(tensor.name), again.read(tensor.name)
        if isinstance(value, Quantized) and tensor.grid.ggml_type == "Q4_0":
            assert isinstance(found, Quantized)
            assert torch.equal(value.codes, found.codes) and torch.equal(value.scale, found.scale), tensor.name
    names = {verdict.name for verdict in inspect(tmp_path / "vllm").verdicts}
    assert "model.layers.0.experts.gate_up_proj" in names
