"""GGUF files of others beside a folder: keys that contradict its config, tokens, tensors, damage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from intaglio.errors import IntaglioError
from intaglio.sources.convert import convert
from tests.support.cases import Case
from tests.support.strange import POINTER

TAKEN = "the packed model"
TOKENS, MERGES, ROPE_FACTORS = "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "rope_freqs.weight"
DAMAGED, FOREIGN = "not a valid GGUF file", "1 tensors are not part of this model"
Tensor = tuple[str, np.ndarray, GGMLQuantizationType]


class File(NamedTuple):
    """One change of our own GGUF. keys: with other values, by their names behind the architecture's where they begin
    with a dot. without: keys and tensors that are left out. tensors: that are added. right, found: as in `Input`."""

    right: str
    found: str = "right"
    keys: Mapping[str, Any] = MappingProxyType({})
    without: tuple[str, ...] = ()
    tensors: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    architecture: str = "gemma4"
    written: Callable[[bytes], bytes] = bytes


def key(name: str, value: Any, right: str | None = None, found: str = "right") -> File:
    return File(f"gemma4.{name} = .*, but the config of" if right is None else right, found, {f"gemma4.{name}": value})


def added(name: str, *shape: int) -> File:
    return File(FOREIGN, tensors={name: shape})


def with_version(number: int, order: str = "little") -> Callable[[bytes], bytes]:
    return lambda data: data[:4] + number.to_bytes(4, order) + data[8:]  # type: ignore[arg-type]


CASES: dict[str, File] = {
    "nothing": File(TAKEN),
    "layers too few": key("block_count", 3, "the file is damaged or incomplete"),
    "layers without end": key("block_count", (1 << 32) - 1, "the file is damaged or incomplete"),
    "eps NaN": key("attention.layer_norm_rms_epsilon", float("nan")),
    "eps below 0": key("attention.layer_norm_rms_epsilon", -1e-6),
    "no eps: the folder has it": File(TAKEN, without=("gemma4.attention.layer_norm_rms_epsilon",)),
    "YaRN": key("rope.scaling.factor", 4.0, found="silent"),
    "scaling by 1": key("rope.scaling.factor", 1.0, TAKEN),
    "half of the head turned": key("rope.dimension_count", 64, found="silent"),
    "half of it in windows": key("rope.dimension_count_swa", 32, found="silent"),
    "other heads in windows": key("attention.key_length_swa", 128, found="silent"),
    "other values in windows": key("attention.value_length_swa", 128, found="silent"),
    "scores that are capped": key("attn_logit_softcapping", 50.0, found="silent"),
    "an encoder": key("attention.causal", False, found="silent"),
    "experts": key("expert_count", 8, found="silent"),
    "tokens by number": key("vocab_size", 4000, found="silent"),
    "another context": key("context_length", 16, TAKEN),
    "no factors of the rope": File(f"{ROPE_FACTORS} = 'none'", "silent", without=(ROPE_FACTORS,)),
    "one of two parts": File("is one of 2 parts: join them", "misleading", {"split.count": 2}),
    "another start": File("bos_token_id = 5, but", keys={"tokenizer.ggml.bos_token_id": 5}),
    "another end": File("eos_token_id = 5, but", keys={"tokenizer.ggml.eos_token_id": 5}),
    "another token": File("token 100 is 'zzz', but", keys={TOKENS: lambda t: [*t[:100], "zzz", *t[101:]]}),
    "a token less": File(f"the number of {TOKENS} = 4095", "silent", {TOKENS: lambda tokens: tokens[:-1]}),
    "a token more": File(f"the number of {TOKENS} = 4097", "silent", {TOKENS: lambda tokens: [*tokens, "zzz"]}),
    "no tokens: the folder has them": File(TAKEN, without=(TOKENS, MERGES)),
    "merges turned round": File("has other merges than", keys={MERGES: lambda merges: merges[::-1]}),
    "a name with a line end": File(TAKEN, keys={"general.name": "a\nb"}),
    "another alignment": File(TAKEN, keys={"general.alignment": 64}),
    "no alignment": File(DAMAGED, keys={"general.alignment": 0}),
    "another architecture": File("general.architecture = 'gemma3', but", architecture="gemma3"),
    "towers alone": File("general.architecture = 'clip', but", architecture="clip"),
    "a weight missing": File("blk.0.ffn_up.weight is missing", without=("blk.0.ffn_up.weight",)),
    "a head of its own": added("output.weight", 4096, 256),
    "a bias": added("blk.0.attn_q.bias", 256),
    "an adapter": added("blk.0.attn_q.weight.lora_a", 4, 256),
    "cut off": File(DAMAGED, written=lambda data: data[:-1000]),
    "more behind it": File(TAKEN, written=lambda data: data + bytes(1000)),
    "version 1": File(DAMAGED, written=with_version(1)),
    "a version to come": File(DAMAGED, written=with_version(4)),
    "big-endian": File(DAMAGED, written=with_version(3, "big")),
    "a pointer of git-lfs": File("git lfs pull", "misleading", written=lambda data: POINTER.encode()),
    "a page of the web": File("neither GGUF nor", written=lambda data: b"<!doctype html>"),
    "empty": File("neither GGUF nor", written=lambda data: b""),
}
KINDS = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}


def rewrite(source: Path, target: Path, case: File) -> None:
    reader, writer, keys = GGUFReader(source), GGUFWriter(target, case.architecture), dict(case.keys)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in case.without:
            continue
        kind, *rest = field.types
        value = keys.pop(name, field.contents())
        value = value(field.contents()) if callable(value) else value
        writer.add_key_value(name, value, kind, rest[0] if rest else None)
    for name, value in keys.items():
        writer.add_key_value(name, value, KINDS[type(value)])
    for tensor in reader.tensors:
        if tensor.name not in case.without:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, shape in case.tensors.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target.write_bytes(case.written(target.read_bytes()))


@pytest.mark.parametrize("name", CASES)
def test_gguf(name: str, gemma4: Case, tmp_path: Path) -> None:
    case, path = CASES[name], tmp_path / "x.gguf"
    rewrite(gemma4.gguf, path, case)
    if case.right != TAKEN:
        with pytest.raises(IntaglioError, match=case.right):
            convert(path, tmp_path / "out", config=gemma4.checkpoint)
        assert not (tmp_path / "out").exists()
        return
    found = convert(path, tmp_path / "out", config=gemma4.checkpoint).packed
    for tensor in gemma4.packed.plan:
        assert torch.equal(found.decode(tensor.name), gemma4.packed.decode(tensor.name)), tensor.name


def test_a_config_by_its_file_brings_its_tokenizer(gemma4: Case, tmp_path: Path) -> None:
    convert(gemma4.gguf, tmp_path / "out", config=gemma4.checkpoint / "config.json")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
