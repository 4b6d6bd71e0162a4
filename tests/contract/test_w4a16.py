"""W4A16 folders of compressed-tensors: the codes as they are packed there, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from intaglio.errors import ConfigError, QualityError
from intaglio.formats.gguf.write import export_gguf
from intaglio.formats.verify import verify
from intaglio.numerics.grid import Q4_0_FREE, Quantized
from intaglio.packed.codes import pack_codes, unpack_codes
from intaglio.sources.convert import convert
from intaglio.sources.inspect import inspect
from tests.support.strangers import make_stranger

GOLDEN = Path(__file__).parents[1] / "golden" / "w4a16" / "pack.safetensors"
SCHEME: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
}
NAME = "model.layers.0.mlp.up_proj.weight"


def test_codes_lie_as_compressed_tensors_packs_them() -> None:
    golden = load_file(GOLDEN)
    codes = unpack_codes(golden["packed"].view(torch.uint8), Q4_0_FREE)
    assert torch.equal(codes, golden["codes"])


def make_w4a16(folder: Path, group: int = 32, dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple[Tensor, Tensor]]:
    """A folder as compressed-tensors saves it; the codes [R, C] and scales [R, C / group] of its linears."""
    originals = make_stranger(folder, "absmax-7")
    path, found = folder / "model.safetensors", {}
    tensors = load_file(path)
    for name in originals:
        weight = tensors.pop(name)
        groups = weight.float().reshape(len(weight), -1, group)
        scale = (groups.abs().amax(-1) / 7).to(dtype)
        codes = (groups / scale.float().unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8).flatten(1)
        tensors[f"{name}_packed"] = pack_codes(codes, Q4_0_FREE).contiguous().view(torch.int32)
        tensors[f"{name}_scale"] = scale
        tensors[f"{name}_shape"] = torch.tensor(weight.shape)
        found[name] = codes, scale
    save_file(tensors, path, {"format": "pt"})
    edit_config(folder, {"quantization_config": SCHEME})
    return found


def edit_config(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")


@pytest.mark.parametrize("group", [32, 64])
def test_codes_and_scales_are_taken_as_they_are(group: int, tmp_path: Path) -> None:
    originals = make_w4a16(tmp_path / "w4a16", group)
    packed = convert(tmp_path / "w4a16", tmp_path / "packed").packed
    for name, (codes, scale) in originals.items():
        value = packed.read(name)
        assert isinstance(value, Quantized)
        assert torch.equal(value.codes, codes)
        assert torch.equal(value.step, scale.float().repeat_interleave(group // 32, dim=1))
    export_gguf(packed, tmp_path / "model.gguf")
    assert verify(packed, tmp_path / "model.gguf").exact
    verdict = next(v for v in inspect(tmp_path / "w4a16").verdicts if v.name == NAME)
    assert (verdict.stored, verdict.scale_dtype, verdict.tally.ships) == ("W4A16", "bfloat16", verdict.tally.all)


def test_scales_beyond_float16_are_no_exact_conversion(tmp_path: Path) -> None:
    make_w4a16(tmp_path / "w4a16", dtype=torch.float32)
    with pytest.raises(QualityError, match="a scale that float16 does not hold"):
        convert(tmp_path / "w4a16", tmp_path / "packed")
    result = convert(tmp_path / "w4a16", tmp_path / "packed", requantize=True)
    assert result.lossy


REFUSED: dict[str, Any] = {
    "eight bits": {"num_bits": 8},
    "asymmetric": {"symmetric": False},
    "floats": {"type": "float"},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_schemes_are_refused(kind: str, tmp_path: Path) -> None:
    make_w4a16(tmp_path / "w4a16")
    weights = SCHEME["config_groups"]["group_0"]["weights"] | REFUSED[kind]
    edit_config(tmp_path / "w4a16", {"quantization_config": SCHEME | {"config_groups": {"g": {"weights": weights}}}})
    with pytest.raises(ConfigError, match="which is W4A16"):
        inspect(tmp_path / "w4a16")


DAMAGES: dict[str, tuple[Any, str]] = {
    "no scale": (lambda tensors: tensors.pop(f"{NAME}_scale"), "expected weight_packed, weight_scale and weight_shape"),
    "a shape of another matrix": (
        lambda tensors: tensors.update({f"{NAME}_shape": torch.tensor([256, 512])}),
        "expected eight codes in an int32",
    ),
    "a negative shape": (
        lambda tensors: tensors.update({f"{NAME}_shape": torch.tensor([-256, -256])}),
        "expected eight codes in an int32",
    ),
    "a zero point": (
        lambda tensors: tensors.update({f"{NAME}_zero_point": torch.zeros(1)}),
        "expected symmetric codes",
    ),
    "codes of another type": (
        lambda tensors: tensors.update({f"{NAME}_packed": torch.zeros(256, 32)}),
        "expected int32 codes",
    ),
    "a scale that is NaN": (lambda tensors: tensors[f"{NAME}_scale"].fill_(float("nan")), ""),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_folders_are_refused(kind: str, tmp_path: Path) -> None:
    make_w4a16(tmp_path / "w4a16")
    damage, says = DAMAGES[kind]
    path = tmp_path / "w4a16" / "model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises((ConfigError, QualityError), match=says):
        convert(tmp_path / "w4a16", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
