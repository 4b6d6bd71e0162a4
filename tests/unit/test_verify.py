"""Verification finds every difference, and no damaged file gets past it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file

from intaglio.errors import ConfigError
from intaglio.formats.verify import Verification, verify
from intaglio.packed.model import PackedModel
from tests.support.cases import Case


def tensor_offset(path: Path, name: str) -> int:
    return next(t.data_offset for t in GGUFReader(path).tensors if t.name == name)


@pytest.mark.parametrize(
    ("name", "byte", "counter"),
    [
        ("blk.1.attn_q.weight", 5, "codes"),  # a nibble of Q4_0
        ("blk.1.attn_q.weight", 18 * 40, "scales"),  # the low byte of a scale
        ("token_embd.weight", 3, "codes"),  # the low bits of a Q6_K code
        ("token_embd.weight", 130, "codes"),  # the upper bits
        ("token_embd.weight", 200, "scales"),
        ("token_embd.weight", 209, "scales"),  # the multiplier of a super-block
        ("per_layer_model_proj.weight", 0, "values"),
        ("output_norm.weight", 0, "values"),
        ("blk.3.layer_output_scale.weight", 0, "values"),
        ("rope_freqs.weight", 0, "values"),
    ],
)
def test_one_flipped_bit_is_found(gemma4: Case, tmp_path: Path, name: str, byte: int, counter: str) -> None:
    data = bytearray(gemma4.gguf.read_bytes())
    data[tensor_offset(gemma4.gguf, name) + byte] ^= 1
    flipped = tmp_path / "flipped.gguf"
    flipped.write_bytes(data)
    found = verify(gemma4.packed, flipped)
    assert not found.exact
    differing = {kind: getattr(found, f"differing_{kind}") for kind in ("codes", "scales", "values")}
    assert differing == {"codes": 0, "scales": 0, "values": 0} | {counter: 1}
    assert f"NOT exact: 1 of {getattr(found, counter):,} {counter} differ" in found.summary()


def rewritten(source: Path, target: Path, change: Callable[[str, np.ndarray, Any], Any]) -> Path:
    """A copy of the tensors of a GGUF in which `change` replaces or drops some."""
    writer = GGUFWriter(target, "gemma4")
    for tensor in GGUFReader(source).tensors:
        changed = change(tensor.name, np.asarray(tensor.data), tensor.tensor_type)
        if changed is not None:
            name, data, kind = changed
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_missing_extra_and_unlike_tensors_are_found(gemma4: Case, tmp_path: Path) -> None:
    def change(name: str, data: np.ndarray, kind: Any) -> Any:
        if name == "blk.0.ffn_up.weight":
            return None
        if name == "output_norm.weight":
            return "surprise.weight", data, kind
        if name == "blk.0.ffn_down.weight":
            return name, data[:-1], kind
        if name == "blk.0.attn_norm.weight":
            return name, data.astype(np.float64), None
        return name, data, kind

    found = verify(gemma4.packed, rewritten(gemma4.gguf, tmp_path / "other.gguf", change))
    assert found.missing == ("blk.0.ffn_up.weight", "output_norm.weight")
    assert found.extra == ("surprise.weight",)
    assert set(found.unlike) == {"blk.0.ffn_down.weight", "blk.0.attn_norm.weight"}
    assert found.differing_codes == found.differing_scales == found.differing_values == 0
    assert not found.exact
    assert "2 tensors missing, the first is blk.0.ffn_up.weight" in found.summary()
    assert "2 tensors of another type or shape" in found.summary()


def test_differences_in_a_folder_are_found(gemma4: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gemma4.hf, tmp_path / "hf"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].view(torch.int16)[3, 3] ^= 1
    weights["model.extra.weight"] = torch.zeros(1)
    weights["model.norm.weight"] = torch.zeros(3)
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    found = verify(gemma4.packed, folder)
    assert (found.differing_values, found.missing, found.extra, found.unlike) == (
        1,
        ("model.layers.0.mlp.down_proj.weight",),
        ("model.extra.weight",),
        ("model.norm.weight",),
    )


def test_the_unquantized_checkpoint_does_not_pass(gemma4: Case) -> None:
    found = verify(gemma4.packed, gemma4.checkpoint)
    assert found.differing_values > found.values // 2


def test_sharded_folders_can_be_verified(gemma4: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gemma4.hf, tmp_path / "hf"))
    weights = load_file(gemma4.hf / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file_name, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / file_name)
    weight_map = {name: file_name for file_name, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    assert verify(gemma4.packed, folder).exact


def readable(packed: PackedModel, path: Path) -> Verification | None:
    """None for a file that is refused; any error but ours fails the test."""
    try:
        return verify(packed, path)
    except ConfigError as error:
        assert str(path) in str(error)
        return None


def test_truncated_gguf_is_refused(gemma4: Case, tmp_path: Path) -> None:
    data = gemma4.gguf.read_bytes()
    path = tmp_path / "short.gguf"
    for keep in (0, 3, 4, 8, 20, 24, 30, 1000, 50_000, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:keep])
        assert readable(gemma4.packed, path) is None, keep


def test_no_damaged_header_gets_through_untyped(gemma4: Case, tmp_path: Path) -> None:
    whole = rewritten(gemma4.gguf, tmp_path / "whole.gguf", lambda name, data, kind: (name, data, kind))
    data = whole.read_bytes()
    assert readable(gemma4.packed, whole) is not None
    path = tmp_path / "damaged.gguf"
    for place in range(4, GGUFReader(whole).data_offset, 23):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        readable(gemma4.packed, path)


@pytest.mark.parametrize(
    "body",
    [
        # one key, an array of 2^60 bytes: gguf-py alone would read nothing for ever
        b"\x01" + bytes(7) + b"a\x09\0\0\0" + b"\0\0\0\0" + (1 << 60).to_bytes(8, "little"),
        b"\xff" * 8,
        (1 << 63).to_bytes(8, "little") + b"x" * 100,
        # arrays in arrays in arrays
        b"\x01" + bytes(7) + b"a\x09\0\0\0" + (b"\x09\0\0\0" + b"\x01" + bytes(7)) * 5000,
    ],
    ids=["endless array", "endless key", "long key", "deep array"],
)
def test_hostile_gguf_is_refused(gemma4: Case, tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little") + body)
    assert readable(gemma4.packed, path) is None


def test_what_is_no_artifact_is_refused(gemma4: Case, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    for path in (tmp_path / "text.gguf", tmp_path / "absent.gguf", tmp_path):
        assert readable(gemma4.packed, path) is None
