"""A drafter, packed: in a transformers folder as the official ones are, and in a GGUF as llama.cpp takes it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

from intaglio.errors import ConfigError, RecipeError
from intaglio.formats.gguf.write import check_supported
from intaglio.formats.gguf.write_bundles import export_lmstudio, export_ollama
from intaglio.formats.verify import verify
from intaglio.formats.words.write_mlx import export_mlx
from intaglio.formats.words.write_vllm import export_vllm
from intaglio.packed.checkpoint import checkpoint_spec, load_model, load_quantized
from intaglio.plan.bundled import MODELS
from intaglio.plan.family import build_meta_model, describe
from intaglio.plan.plan import make_plan
from intaglio.sizing.planning import bundled_spec
from intaglio.sizing.sizes import bf16_bytes, gguf_size
from tests.support import ggml
from tests.support.cases import Case, fields, make_case
from tests.support.tiny import ASSISTANT
from tests.unit.test_sizes import metadata_bytes

KINDS = ("assistant", "unified-assistant")


@pytest.fixture(scope="module")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: make_case(name, tmp_path_factory.mktemp(name)) for name in KINDS}


@pytest.fixture(params=KINDS)
def drafter(request: pytest.FixtureRequest, drafters: dict[str, Case]) -> Case:
    return drafters[request.param]


@pytest.fixture
def clustered(drafters: dict[str, Case]) -> Case:
    """The one with a clustered head."""
    return drafters["assistant"]


def test_both_files_hold_what_was_packed(drafter: Case) -> None:
    for artifact in (drafter.gguf, drafter.hf):
        found = verify(drafter.packed, artifact)
        assert found.exact, found.summary()
    plan = drafter.packed.plan
    assert verify(drafter.packed, drafter.hf).values == sum(tensor.spec.numel for tensor in plan)
    assert gguf_size(plan, metadata_bytes(drafter.gguf)).total == drafter.gguf.stat().st_size


def test_a_drafters_folder_is_not_taken_for_the_text_model_that_it_nests(drafter: Case) -> None:
    for folder in (drafter.checkpoint, drafter.hf):
        assert checkpoint_spec(folder).tensors == drafter.packed.plan.model.tensors
        assert checkpoint_spec(folder).family.drafter


def test_a_tensor_that_is_missing_or_other_is_found(clustered: Case, tmp_path: Path) -> None:
    data = bytearray(clustered.gguf.read_bytes())
    projection = next(t for t in GGUFReader(clustered.gguf).tensors if t.name == "nextn.pre_projection.weight")
    data[projection.data_offset + 5] ^= 0x10
    (tmp_path / "other.gguf").write_bytes(data)
    assert verify(clustered.packed, tmp_path / "other.gguf").differing_codes == 1
    (tmp_path / "other.gguf").write_bytes(data.replace(b"nextn.post_projection", b"nextn.past_projection"))
    found = verify(clustered.packed, tmp_path / "other.gguf")
    assert (found.missing, found.extra) == (("nextn.post_projection.weight",), ("nextn.past_projection.weight",))


DRAFTER_KEYS = {
    "general.architecture": "gemma4-assistant",
    "general.file_type": 2,
    "gemma4-assistant.block_count": 4,
    "gemma4-assistant.context_length": 2048,
    "gemma4-assistant.embedding_length": 512,
    "gemma4-assistant.embedding_length_out": 256,
    "gemma4-assistant.nextn_predict_layers": 4,
    "gemma4-assistant.feed_forward_length": 256,
    "gemma4-assistant.attention.head_count": 4,
    "gemma4-assistant.attention.head_count_kv": 2,
    "gemma4-assistant.attention.key_length": 128,
    "gemma4-assistant.attention.value_length": 128,
    "gemma4-assistant.attention.key_length_swa": 64,
    "gemma4-assistant.attention.value_length_swa": 64,
    "gemma4-assistant.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    "gemma4-assistant.attention.shared_kv_layers": 4,
    "gemma4-assistant.attention.sliding_window": 32,
    "gemma4-assistant.attention.sliding_window_pattern": [True, True, True, False],
    "gemma4-assistant.embedding_length_per_layer_input": 0,
    "gemma4-assistant.rope.dimension_count": 128,
    "gemma4-assistant.rope.dimension_count_swa": 64,
    "gemma4-assistant.rope.freq_base": 1e6,
    "gemma4-assistant.rope.freq_base_swa": 1e4,
}


def test_keys_and_tensors_are_those_of_llamacpps_converter(drafters: dict[str, Case]) -> None:
    """Compared once with the converter in the sdist of llama-cpp-python 0.3.36, for both, and written down."""
    for name, heads in (("assistant", 2), ("unified-assistant", [2, 2, 2, 1])):
        found = fields(drafters[name].gguf)
        own = {key: value for key, value in found.items() if key.startswith("gemma4-assistant.")}
        expected = DRAFTER_KEYS | {"gemma4-assistant.attention.head_count_kv": heads}
        assert own == {key: value for key, value in expected.items() if not key.startswith("general.")}
        assert {key: found[key] for key in expected} == expected
        assert found["tokenizer.ggml.model"] == "gemma4"
    layer = {
        *("attn_norm", "attn_q", "attn_q_norm", "attn_output", "post_attention_norm", "layer_output_scale"),
        *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "post_ffw_norm"),
    }
    names = {f"blk.{i}.{kind}.weight" for i in range(4) for kind in layer}
    names |= {"token_embd.weight", "output_norm.weight", "rope_freqs.weight"}
    names |= {"nextn.pre_projection.weight", "nextn.post_projection.weight"}  # and nothing of the clustered head
    assert {tensor.name for tensor in GGUFReader(drafters["assistant"].gguf).tensors} == names


def test_ggmls_quantizer_finds_the_same_bytes_in_the_folder(drafter: Case) -> None:
    """A stranger converts and quantizes the transformers folder."""
    weights = load_file(drafter.hf / "model.safetensors")
    stored = {tensor.name: tensor for tensor in GGUFReader(drafter.gguf).tensors}
    for ours, theirs in (
        ("pre_projection.weight", "nextn.pre_projection.weight"),
        ("post_projection.weight", "nextn.post_projection.weight"),
        ("model.layers.3.self_attn.q_proj.weight", "blk.3.attn_q.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
    ):
        assert np.array_equal(ggml.quantize(weights[ours].float().numpy(), "Q4_0"), stored[theirs].data)


def test_transformers_opens_the_folder_and_drafts_with_it(drafter: Case) -> None:
    model: Any = load_model(drafter.hf)
    state = model.state_dict()
    for tensor in drafter.packed.plan:
        assert torch.equal(state[tensor.name].double(), drafter.packed.decode(tensor.name).double()), tensor.name
    config = json.loads((drafter.hf / "config.json").read_text("utf-8"))
    assert config["architectures"] == [type(model).__name__] and config["dtype"] == "bfloat16"
    assert config["text_config"]["global_head_dim"] == 128 and config["text_config"]["dtype"] == "bfloat16"
    assert config["text_config"]["num_global_key_value_heads"] == (1 if "unified" in drafter.name else None)
    found = draft_once(model, model.config.backbone_hidden_size)
    assert found.logits.shape == (1, 1, 4096) and found.last_hidden_state.shape == (1, 1, 256)
    if drafter.name == "assistant":
        order = torch.arange(4096)
        assert not torch.equal(state["masked_embedding.token_ordering"], order)
        assert torch.equal(state["masked_embedding.token_ordering"].sort().values, order)
        assert (found.logits > found.logits.min()).sum() < 4 * (4096 // 64) + 1  # four clusters of 64 tokens


def draft_once(model: Any, width: int, device: str = "cpu") -> Any:
    """One step of a drafter on a context of five tokens."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    config = model.config.get_text_config()
    layer_of = {kind: config.per_layer_config[config.layer_types.index(kind)] for kind in set(config.layer_types)}

    def noise(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator)
        return values.to(device, model.dtype)

    shared = {
        kind: tuple(noise(1, layer.num_key_value_heads, 5, layer.head_dim) for _ in range(2))
        for kind, layer in layer_of.items()
    }
    with torch.no_grad():
        positions = torch.tensor([[5]], device=device)
        return model(inputs_embeds=noise(1, 1, 2 * width), position_ids=positions, shared_kv_states=shared)


@pytest.mark.parametrize("name", MODELS)
def test_official_drafters_are_planned_sized_and_constructed(name: str) -> None:
    """And take a step on the meta device, on keys and values of their targets' shapes."""
    target, spec = bundled_spec(name).text_only(), bundled_spec(f"{name}-assistant")
    plan = make_plan(spec, "q4_0")
    check_supported(spec)
    assert 0.55 * sum(t.numel for t in spec.tensors) < gguf_size(plan).data < bf16_bytes(plan)
    model = build_meta_model(spec.config)
    model.config.use_ordered_embeddings = False  # transformers reads a number of this head, and meta has none
    found = draft_once(model, target.layer_config.hidden_size, "meta")
    assert found.last_hidden_state.shape[-1] == target.layer_config.hidden_size
    theirs, ours = target.layer_config, spec.layer_config
    for mine, other in zip(ours.per_layer_config[-2:], theirs.per_layer_config[-2:], strict=True):
        assert (mine.head_dim, mine.num_key_value_heads) == (other.head_dim, other.num_key_value_heads)
    assert theirs.layer_types[-2:] == ours.layer_types[-2:]
    for key in ("sliding_window", "vocab_size", "rope_parameters"):
        assert getattr(ours, key) == getattr(theirs, key)


def test_compressed_tensors_hold_a_drafter_too(clustered: Case, tmp_path: Path) -> None:
    """The clustered head and the embedding stay floats, in vLLM as in transformers."""
    export_vllm(clustered.packed, tmp_path / "vllm")
    assert verify(clustered.packed, tmp_path / "vllm").exact
    model = load_quantized(tmp_path / "vllm")
    for name in ("masked_embedding.centroids", "model.embed_tokens"):
        weight = model.get_submodule(name).weight
        assert torch.equal(weight.float(), clustered.packed.decode(f"{name}.weight"))
    from compressed_tensors.compressors import decompress_module  # a step would do the same

    projection = model.get_submodule("pre_projection")
    decompress_module(projection)
    assert torch.equal(projection.weight.float(), clustered.packed.decode("pre_projection.weight"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 256}, r"hidden_size = 256 is the target's too"),
        ({"layer_types": ["full_attention"] * 4}, r"llama\.cpp needs layers of both kinds"),
        ({"hidden_activation": "silu"}, r"hidden_activation = 'silu'"),
    ],
)
def test_drafters_that_llamacpp_would_not_run_are_refused(changes: dict[str, Any], message: str) -> None:
    config = ASSISTANT | {"text_config": ASSISTANT["text_config"] | changes}
    with pytest.raises(ConfigError, match=message):
        check_supported(describe(config))


def test_what_runs_models_alone_takes_no_drafter(clustered: Case, tmp_path: Path) -> None:
    for export in (export_ollama, export_lmstudio):
        with pytest.raises(ConfigError, match="a drafter does not run by itself: export it to gguf"):
            export(clustered.packed, tmp_path / "x")
    with pytest.raises(RecipeError, match=r"MLX export is for .*, this model is gemma4_assistant"):
        export_mlx(clustered.packed, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_ollama_bundle_takes_the_drafter_of_its_model(gemma4: Case, clustered: Case, tmp_path: Path) -> None:
    export_ollama(gemma4.packed, tmp_path / "ollama", gguf=gemma4.gguf, draft=clustered.gguf)
    assert "DRAFT ./draft.gguf\n" in (tmp_path / "ollama/Modelfile").read_text()
    assert verify(gemma4.packed, tmp_path / "ollama").exact
    assert verify(clustered.packed, tmp_path / "ollama/draft.gguf").exact
    (tmp_path / "ollama/draft.gguf").unlink()
    with pytest.raises(ConfigError, match=r"draft\.gguf: no such file: Modelfile names it"):
        verify(gemma4.packed, tmp_path / "ollama")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 320}, "embedding_length_out: 256, this model's is 320: it drafts for another model"),
        ({"head_dim": 32}, "attention.key_length_swa: 64, this model's is 32"),
        ({"global_head_dim": 64, "per_layer_config": None}, "attention.key_length: 128, this model's is 64"),
        ({"sliding_window": 64}, "attention.sliding_window: 32, this model's is 64"),
        ({"vocab_size": 4000}, "tokenizer.ggml.tokens: 4096, this model's is 4000"),
        (
            {"layer_types": ["sliding_attention"] + ["full_attention"] * 3},
            "layer_types ends with .'full_attention', 'f",
        ),
    ],
)
def test_an_ollama_bundle_refuses_anothers_drafter(
    gemma4: Case, clustered: Case, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    plan = gemma4.packed.plan
    model = dataclasses.replace(plan.model, config=plan.model.config | changes)
    other = dataclasses.replace(gemma4.packed, plan=dataclasses.replace(plan, model=model))
    with pytest.raises(ConfigError, match=message):
        export_ollama(other, tmp_path / "ollama", gguf=gemma4.gguf, draft=clustered.gguf)
    assert not list(tmp_path.iterdir())


def test_a_model_is_no_drafter(gemma4: Case, clustered: Case, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"general\.architecture = 'gemma4': expected 'gemma4-assistant'"):
        export_ollama(gemma4.packed, tmp_path / "ollama", draft=gemma4.gguf)
    with pytest.raises(ConfigError, match="a drafter does not run by itself"):
        export_ollama(clustered.packed, tmp_path / "ollama", draft=clustered.gguf)
