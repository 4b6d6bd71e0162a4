"""Verification compares more than weights: config, tokenizer, template, settings, and what lies beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from intaglio.errors import ConfigError
from intaglio.formats import speech
from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.gguf.read_text import llamacpp_tokens
from intaglio.formats.gguf.write import check_exportable, export_gguf
from intaglio.formats.texts import fixed_texts
from intaglio.formats.verify import verify
from intaglio.formats.words.write_mlx import export_mlx
from intaglio.formats.words.write_vllm import export_vllm
from intaglio.packed.model import PackedModel
from intaglio.packed.template import Renderer
from tests.support.cases import Case, fields
from tests.support.cli import intaglio
from tests.support.corpora import ENDLESS
from tests.support.tiny import GEMMA4, make_checkpoint, pack

Change = Callable[[dict[str, Any]], Any]


def edit_json(path: Path, change: Change) -> None:
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    change(found)
    path.write_text(json.dumps(found), "utf-8")


def test_the_fixed_texts_are_many_and_the_same_everywhere() -> None:
    texts = fixed_texts()
    assert len(texts) >= 290 and len(set(texts)) == len(texts)
    joined = "".join(texts)
    assert all(piece in joined for piece in ("\r\n", "日本語", "e\u0301", "😀", "   ", "\t", "def f(x):", "\u200b"))


# Folders


@pytest.fixture(scope="module")
def folders(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each kind of folder of one model. Shared: not to be changed."""
    out, packed = tmp_path_factory.mktemp("folders"), cases["gemma4"].packed
    export_mlx(packed, out / "mlx")
    export_vllm(packed, out / "vllm")
    return {"hf": cases["gemma4"].hf, "mlx": out / "mlx", "vllm": out / "vllm"}


def set_text(**values: Any) -> Change:
    return lambda config: config.update(values)


ROPE = {"rope_theta": 1e6, "rope_type": "proportional", "partial_rotary_factor": 0.25}
CONFIG_CHANGES: dict[str, tuple[Change, str]] = {
    "eps": (set_text(rms_norm_eps=1e-5), "rms_norm_eps is 1e-05, the model's is 1e-06"),
    "soft-cap": (set_text(final_logit_softcapping=15.0), "final_logit_softcapping is 15.0"),
    "window": (set_text(sliding_window=16), "sliding_window is 16"),
    "pattern": (
        set_text(layer_types=["sliding_attention"] * 3 + ["full_attention"], per_layer_config={"3": {"head_dim": 128}}),
        "layer_types is",
    ),
    "sharing": (set_text(num_kv_shared_layers=0), "num_kv_shared_layers is 0"),
    "activation": (set_text(hidden_activation="silu"), "hidden_activation is 'silu'"),
    "rope base": (
        lambda c: c["rope_parameters"]["sliding_attention"].update(rope_theta=5e3),
        "rope of sliding_attention is",
    ),
    "rope factor": (
        lambda c: c["rope_parameters"]["full_attention"].update(factor=8.0),
        "rope of full_attention is",
    ),
    "rope share": (
        lambda c: c["rope_parameters"]["full_attention"].update(partial_rotary_factor=0.5),
        "rope of full_attention is",
    ),
    "ends": (set_text(eos_token_id=5), "eos_token_id is 5"),
    "tie": (set_text(tie_word_embeddings=False), "tie_word_embeddings is False"),
    "code": (set_text(auto_map={"AutoModelForCausalLM": "evil.Model"}), "config.json has auto_map, which runs code"),
}


@pytest.mark.parametrize("kind", ["hf", "mlx", "vllm"])
@pytest.mark.parametrize("name", CONFIG_CHANGES)
def test_another_config_round_the_same_weights_is_noticed(
    gemma4: Case, folders: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / kind))
    assert verify(gemma4.packed, folder).exact
    change, said = CONFIG_CHANGES[name]
    edit_json(folder / "config.json", change)
    found = verify(gemma4.packed, folder)
    assert not found.exact and any(said in text for text in found.differing_facts), found.differing_facts
    assert found.differing_values == found.differing_codes == 0


def test_halved_layers_are_noticed(gemma4: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gemma4.hf, tmp_path / "hf"))

    def halve(config: dict[str, Any]) -> None:
        config.update(num_hidden_layers=2, layer_types=config["layer_types"][:2], num_kv_shared_layers=0)
        config["per_layer_config"] = {"1": {"head_dim": 128}}

    edit_json(folder / "config.json", halve)
    outcome = intaglio("verify", gemma4.packed.path, folder)
    assert outcome.code == 3 and "num_hidden_layers is 2, the model's is 4" in outcome.error


def test_a_field_that_only_other_programs_read_is_compared(
    gemma4: Case, folders: dict[str, Path], tmp_path: Path
) -> None:
    """mlx-lm and Ollama take global_head_dim where transformers takes per_layer_config."""
    folder = Path(shutil.copytree(folders["mlx"], tmp_path / "mlx"))
    edit_json(folder / "config.json", set_text(global_head_dim=64))
    assert "global_head_dim is 64, the model's is 128" in verify(gemma4.packed, folder).summary()


TEXT_CHANGES: dict[str, tuple[str, Change, str]] = {
    "another normalizer": (
        "tokenizer.json",
        lambda t: t.update(normalizer={"type": "Lowercase"}) or None,
        "fixed texts have other tokens",
    ),
    "another merge": ("tokenizer.json", lambda t: t["model"]["merges"].pop(0), "vocabulary, merges and steps is"),
    "another end": ("tokenizer_config.json", lambda t: t.update(eos_token="<turn|>"), "eos_token_id is 6"),
    "more ends": ("generation_config.json", lambda t: t.update(eos_token_id=[1, 7]), "end tokens is [1, 7]"),
    "sampling": ("generation_config.json", lambda t: t.update(temperature=0.01), "temperature is 0.01"),
    "code": ("tokenizer_config.json", lambda t: t.update(auto_map={"AutoTokenizer": ["evil.T", None]}), "has auto_map"),
}


@pytest.mark.parametrize("name", TEXT_CHANGES)
def test_another_tokenizer_or_other_settings_are_noticed(gemma4: Case, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(gemma4.hf, tmp_path / "hf"))
    file, change, said = TEXT_CHANGES[name]
    if name == "another normalizer":  # transformers' Gemma class has a normalizer of its own
        edit_json(folder / "tokenizer_config.json", lambda t: t.update(tokenizer_class="PreTrainedTokenizerFast"))
    edit_json(folder / file, change)
    found = verify(gemma4.packed, folder)
    assert not found.exact and any(said in text for text in found.differing_facts), found.differing_facts


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "chat_template.jinja", "tokenizer_config.json"]
)
def test_a_file_that_is_gone_is_noticed(gemma4: Case, tmp_path: Path, name: str) -> None:
    packed = PackedModel.open(shutil.copytree(gemma4.packed.path, tmp_path / "packed"))
    (packed.path / "generation_config.json").write_text('{"eos_token_id": [1, 6], "temperature": 0.5}')
    export_hf(packed, tmp_path / "hf")
    assert verify(packed, tmp_path / "hf").exact
    (tmp_path / "hf" / name).unlink()
    assert not verify(packed, tmp_path / "hf").exact


def test_templates_are_compared_by_what_they_write(gemma4: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gemma4.hf, tmp_path / "hf"))
    template = folder / "chat_template.jinja"
    text = template.read_text("utf-8")
    template.write_text("{#- the same with a comment -#}" + text, "utf-8")
    assert verify(gemma4.packed, folder).exact
    template.write_text(text.replace("<|turn>", "<|TURN>"), "utf-8")
    found = verify(gemma4.packed, folder)
    assert "5 of 5 fixed chats are written otherwise" in found.summary()


def test_a_template_that_does_not_end_differs(gemma4: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "Renderer", partial(Renderer, seconds=1))
    folder = Path(shutil.copytree(gemma4.hf, tmp_path / "hf"))
    (folder / "chat_template.jinja").write_text(ENDLESS, "utf-8")
    found = verify(gemma4.packed, folder)
    assert not found.exact and "took more than 1 s for one chat and was stopped" in found.summary()


@pytest.mark.parametrize(
    "name", ["modeling_evil.py", "pytorch_model.bin", "adapter_config.json", "extra/x.pkl", "more.safetensors"]
)
def test_what_a_runtime_could_load_beside_the_weights_is_noticed(gemma4: Case, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(gemma4.hf, tmp_path / "hf"))
    for allowed in ("README.md", "LICENSE", "NOTICE.txt", ".gitattributes"):
        (folder / allowed).write_text("for people")
    assert verify(gemma4.packed, folder).exact
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    outcome = intaglio("verify", gemma4.packed.path, folder)
    assert outcome.code == 3 and f"{name}: a file that no export writes" in outcome.error


def test_what_was_compared_is_said(gemma4: Case) -> None:
    for artifact in (gemma4.hf, gemma4.gguf):
        outcome = intaglio("verify", gemma4.packed.path, artifact)
        assert outcome.code == 0
        assert "0 bits differ; compared: weights, config, tokenizer, texts, template" in outcome.out
        said = json.loads(intaglio("verify", gemma4.packed.path, artifact, "--json").out)
        assert said["facts"]["texts"] > 300 and said["differing_facts"] == []


# GGUF


def with_keys(source: Path, target: Path, change: Callable[[str, Any], Any], **more: Any) -> Path:
    """A copy of a GGUF in which `change` gives another value to a key, or None to leave it out."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = change(name, field.contents())
        if value is not None:
            kind = GGUFValueType.ARRAY if isinstance(value, list) else field.types[0]
            writer.add_key_value(name, value, kind, sub_type=field.types[-1] if isinstance(value, list) else None)
    for name, (value, kind) in more.items():
        writer.add_key_value(name.replace("__", "."), value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def swap(values: list[Any], one: int, other: int) -> list[Any]:
    copy = list(values)
    copy[one], copy[other] = copy[other], copy[one]
    return copy


KEY_CHANGES: dict[str, Callable[[Any], Any]] = {
    "gemma4.block_count": lambda v: v // 2,
    "gemma4.attention.layer_norm_rms_epsilon": lambda v: 1e-5,
    "gemma4.final_logit_softcapping": lambda v: 0.0,
    "gemma4.rope.freq_base": lambda v: v / 2,
    "gemma4.rope.freq_base_swa": lambda v: v / 2,
    "gemma4.rope.dimension_count": lambda v: v // 2,
    "gemma4.rope.dimension_count_swa": lambda v: v // 2,
    "gemma4.attention.sliding_window": lambda v: v * 2,
    "gemma4.attention.sliding_window_pattern": lambda v: [not kind for kind in v],
    "gemma4.attention.shared_kv_layers": lambda v: 0,
    "gemma4.attention.head_count": lambda v: v * 2,
    "gemma4.attention.head_count_kv": lambda v: v * 2,
    "gemma4.attention.key_length_swa": lambda v: v * 2,
    "gemma4.attention.value_length": lambda v: v * 2,
    "gemma4.context_length": lambda v: v * 2,
    "gemma4.embedding_length_per_layer_input": lambda v: 0,
    "gemma4.feed_forward_length": lambda v: None,
    "tokenizer.ggml.tokens": lambda v: swap(v, 700, 800),
    "tokenizer.ggml.token_type": lambda v: [1 if kind == 3 else kind for kind in v],
    "tokenizer.ggml.merges": lambda v: swap(v, 0, 50),
    "tokenizer.ggml.bos_token_id": lambda v: 5,
    "tokenizer.ggml.eos_token_id": lambda v: 5,
    "tokenizer.ggml.add_bos_token": lambda v: None,
    "tokenizer.chat_template": lambda v: v.replace("<|turn>", "<|TURN>"),
    "intaglio.plan": lambda v: "0" * 64,
}


@pytest.mark.parametrize("key", KEY_CHANGES)
def test_another_key_round_the_same_tensors_is_noticed(gemma4: Case, tmp_path: Path, key: str) -> None:
    assert key in fields(gemma4.gguf)
    path = with_keys(gemma4.gguf, tmp_path / "x.gguf", lambda name, v: KEY_CHANGES[key](v) if name == key else v)
    found = verify(gemma4.packed, path)
    assert not found.exact and found.differing_facts
    assert found.differing_codes == found.differing_values == 0 and not found.missing


# None: llama.cpp takes a cap of its own, 50 and 30, of which the second is the model's.
GEMMA2_CHANGES: dict[str, Callable[[Any], Any]] = {
    "gemma2.attn_logit_softcapping": lambda v: None,
    "gemma2.final_logit_softcapping": lambda v: v / 2,
    "gemma2.attention.sliding_window": lambda v: v - 1,
    "gemma2.attention.sliding_window_pattern": lambda v: 4,
    "gemma2.attention.layer_norm_rms_epsilon": lambda v: 1e-5,
    "gemma2.attention.key_length": lambda v: v * 2,
    "gemma2.rope.freq_base": lambda v: v / 2,
    "gemma2.rope.freq_base_swa": lambda v: v / 2,
    "tokenizer.ggml.scores": lambda v: swap(v, 700, 800),
    "tokenizer.chat_template": lambda v: v.replace("<|turn>", "<|TURN>"),
}


@pytest.mark.parametrize("key", GEMMA2_CHANGES)
def test_another_key_of_a_gemma2_is_noticed(cases: dict[str, Case], tmp_path: Path, key: str) -> None:
    made = cases["gemma2"]
    path = with_keys(made.gguf, tmp_path / "x.gguf", lambda name, v: GEMMA2_CHANGES[key](v) if name == key else v)
    found = verify(made.packed, path)
    assert not found.exact and found.differing_facts and found.differing_codes == 0


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("gemma4__rope__scaling__factor", 8.0, GGUFValueType.FLOAT32),
        ("gemma4__rope__scaling__type", "yarn", GGUFValueType.STRING),
        ("gemma4__attn_logit_softcapping", 50.0, GGUFValueType.FLOAT32),
        ("tokenizer__ggml__eot_token_id", 9, GGUFValueType.UINT32),
        ("tokenizer__chat_template__tool", "x", GGUFValueType.STRING),
        ("general__sampling__temp", 0.1, GGUFValueType.FLOAT32),
    ],
)
def test_a_key_that_the_model_does_not_have_is_noticed(
    gemma4: Case, tmp_path: Path, key: str, value: Any, kind: GGUFValueType
) -> None:
    same = with_keys(gemma4.gguf, tmp_path / "same.gguf", lambda name, v: v)
    assert verify(gemma4.packed, same).exact
    path = with_keys(gemma4.gguf, tmp_path / "x.gguf", lambda name, v: v, **{key: (value, kind)})
    assert not verify(gemma4.packed, path).exact


# Tokenizers as people bring them


def exported(packed: PackedModel, tmp_path: Path) -> dict[str, Any]:
    export_gguf(packed, tmp_path / "x.gguf")
    found = verify(packed, tmp_path / "x.gguf")
    assert found.exact, found.summary()
    return fields(tmp_path / "x.gguf")


def test_ids_come_from_the_loaded_tokenizer(packed_copy: PackedModel, tmp_path: Path) -> None:
    """Without bos_token in tokenizer_config.json transformers' class has it; llama.cpp would end at the first text."""
    edit_json(
        packed_copy.path / "tokenizer_config.json", lambda t: [t.pop(f"{kind}_token") for kind in ("bos", "eos", "pad")]
    )
    found = exported(packed_copy, tmp_path)
    assert [found[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "padding")] == [2, 1, 0]


def test_a_tokenizer_without_a_first_token_is_refused(packed_copy: PackedModel, tmp_path: Path) -> None:
    change = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None}
    edit_json(packed_copy.path / "tokenizer_config.json", lambda t: t.update(change))
    with pytest.raises(ConfigError, match=r"no bos_token, and llama\.cpp puts one"):
        export_gguf(packed_copy, tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer is"),
        ({"normalizer": {"type": "NFC"}}, "normalizer is"),
        ({"normalizer": None}, "normalizer is None"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer is"),
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": True}}, "pre_tokenizer is"),
    ],
)
def test_steps_that_llamacpp_does_not_have_are_refused(
    packed_copy: PackedModel, tmp_path: Path, change: Any, said: str
) -> None:
    edit_json(packed_copy.path / "tokenizer_config.json", lambda t: t.update(tokenizer_class="PreTrainedTokenizerFast"))
    edit_json(packed_copy.path / "tokenizer.json", lambda t: t.update(change))
    for attempt in (
        lambda: export_gguf(packed_copy, tmp_path / "x.gguf"),
        lambda: check_exportable(packed_copy.plan.model, packed_copy.path),
    ):
        with pytest.raises(ConfigError, match=f"{said}.*export it to hf, vllm or mlx"):
            attempt()
    export_hf(packed_copy, tmp_path / "hf")  # what the message advises
    assert verify(packed_copy, tmp_path / "hf").exact


def test_steps_that_transformers_does_not_take_from_the_file_do_not_matter(
    packed_copy: PackedModel, tmp_path: Path
) -> None:
    """Its class for Gemma has a normalizer of its own; llama.cpp does the same."""
    edit_json(packed_copy.path / "tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"}))
    exported(packed_copy, tmp_path)


def test_tokens_that_take_spaces_are_refused(packed_copy: PackedModel, tmp_path: Path) -> None:
    edit_json(packed_copy.path / "tokenizer.json", lambda t: t["added_tokens"][-1].update(lstrip=True))
    with pytest.raises(ConfigError, match=r"is lstrip: llama\.cpp has no such tokens"):
        export_gguf(packed_copy, tmp_path / "x.gguf")


def test_every_end_token_is_named_as_far_as_llamacpp_can(packed_copy: PackedModel, tmp_path: Path) -> None:
    """It ends at some by their text, and at the end token and two more by their ids."""
    ends = [1, 6, 700, 800]
    (packed_copy.path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    found = exported(packed_copy, tmp_path)
    assert [found[f"tokenizer.ggml.{kind}_token_id"] for kind in ("eos", "eot", "eom")] == [1, 700, 800]
    (packed_copy.path / "generation_config.json").write_text(json.dumps({"eos_token_id": [*ends, 900]}))
    (tmp_path / "x.gguf").unlink()
    exported(packed_copy, tmp_path)
    said = verify(packed_copy, tmp_path / "x.gguf").unsaid
    assert any("llama.cpp goes on after it" in text for text in said)
    assert any("llama.cpp ends at '<|tool_response>' too" in text for text in said)


def test_sampling_settings_go_into_the_file(packed_copy: PackedModel, tmp_path: Path) -> None:
    settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "suppress_tokens": [9, 11], "typical_p": 0.9}
    (packed_copy.path / "generation_config.json").write_text(json.dumps(settings))
    found = exported(packed_copy, tmp_path)
    assert found["general.sampling.temp"] == pytest.approx(0.7) and found["general.sampling.top_k"] == 20
    assert found["tokenizer.ggml.suppress_tokens"] == [9, 11]
    assert "generation setting typical_p" in verify(packed_copy, tmp_path / "x.gguf").unsaid


def test_a_template_of_a_processor_reaches_every_artifact(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", GEMMA4)
    template = (checkpoint / "chat_template.jinja").read_text("utf-8")
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": template}), "utf-8")
    packed = pack(checkpoint, tmp_path / "p")
    assert exported(packed, tmp_path)["tokenizer.chat_template"] == template
    export_hf(packed, tmp_path / "hf")
    for folder in (packed.path, tmp_path / "hf"):
        assert (folder / "chat_template.jinja").read_text("utf-8") == template
        assert (folder / "chat_template.json").is_file()


def test_named_templates_reach_the_artifact(packed_copy: PackedModel, tmp_path: Path) -> None:
    (packed_copy.path / "additional_chat_templates").mkdir()
    (packed_copy.path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    found = exported(packed_copy, tmp_path)
    assert found["tokenizer.chat_template.tool_use"] == "{{ messages }}"
    assert found["tokenizer.chat_templates"] == ["tool_use"]
    export_hf(packed_copy, tmp_path / "hf")
    assert verify(packed_copy, tmp_path / "hf").exact
    assert (tmp_path / "hf" / "additional_chat_templates" / "tool_use.jinja").is_file()


def test_llamacpp_reads_the_fixed_texts_as_transformers_does(case: Case) -> None:
    pytest.importorskip("llama_cpp")
    found = verify(case.packed, case.gguf)
    assert found.exact and found.facts["texts"] > 300 and not any("not run" in text for text in found.unsaid)


def test_a_file_that_llamacpp_does_not_load_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no model")
    assert llamacpp_tokens(tmp_path / "x.gguf", ["a"]) is None
