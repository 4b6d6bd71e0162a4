"""Exports that are refused, and outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType

from intaglio.errors import ConfigError, OutputError
from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.gguf.write import check_supported, export_gguf
from intaglio.formats.verify import verify
from intaglio.formats.words.write_mlx import export_mlx
from intaglio.packed.model import PackedModel
from intaglio.plan.family import check_settings, describe
from intaglio.plan.rope import check_rope
from tests.support.cases import Case, fields
from tests.support.samples import forget
from tests.support.tiny import GEMMA2, GEMMA3, GEMMA4, TOKENIZER, VOCABULARY, make_checkpoint, pack

LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
GEMMA2_27B = {"num_hidden_layers": 46, "layer_types": ["sliding_attention", "full_attention"] * 23, "hidden_size": 512}


def edit_tokenizer(packed: PackedModel, change: Callable[[dict[str, Any]], Any]) -> None:
    path = packed.path / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    change(tokenizer)
    path.write_text(json.dumps(tokenizer), "utf-8")


def added_token(index: int, **changes: Any) -> dict[str, Any]:
    return {"id": index, "content": "<extra>", "special": False, "normalized": False} | changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"]["vocab"].update({"extra": VOCABULARY}), "has id 4096, but the model has 4096"),
        (lambda t: t["added_tokens"].append(added_token(VOCABULARY)), "has id 4096, but the model has 4096"),
        (lambda t: t["model"].update(type="Unigram"), "not a byte-fallback BPE"),
        (lambda t: t["model"].update(byte_fallback=False), "not a byte-fallback BPE"),
        (lambda t: t.pop("model"), "not a tokenizer.json"),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused(
    packed_copy: PackedModel, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_tokenizer(packed_copy, change)
    with pytest.raises(ConfigError, match=message):
        export_gguf(packed_copy, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == [packed_copy.path]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_malformed_tokenizer_files_are_refused(packed_copy: PackedModel, tmp_path: Path, name: str) -> None:
    (packed_copy.path / name).write_bytes(b"{\xff")
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        export_gguf(packed_copy, tmp_path / "x.gguf")


def test_a_model_without_tokenizer_is_refused(packed_copy: PackedModel, tmp_path: Path) -> None:
    (packed_copy.path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no such file"):
        export_gguf(packed_copy, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == [packed_copy.path]


def test_missing_ids_are_filled(packed_copy: PackedModel, tmp_path: Path) -> None:
    edit_tokenizer(packed_copy, lambda tokenizer: forget(tokenizer, [VOCABULARY - 1]))
    export_gguf(packed_copy, tmp_path / "x.gguf")
    found = fields(tmp_path / "x.gguf")
    assert len(found["tokenizer.ggml.tokens"]) == VOCABULARY
    assert found["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCABULARY - 1}]"
    assert found["tokenizer.ggml.token_type"][-1] == TokenType.UNUSED
    assert verify(packed_copy, tmp_path / "x.gguf").exact


def test_placeholders_without_an_embedding_are_left_out(packed_copy: PackedModel, tmp_path: Path) -> None:
    placeholder = added_token(VOCABULARY, content="<image_soft_token>", special=True)
    edit_tokenizer(packed_copy, lambda tokenizer: tokenizer["added_tokens"].append(placeholder))
    export_gguf(packed_copy, tmp_path / "x.gguf")
    assert "<image_soft_token>" not in fields(tmp_path / "x.gguf")["tokenizer.ggml.tokens"]
    found = verify(packed_copy, tmp_path / "x.gguf")
    assert not found.missing and found.differing_codes == 0


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (GEMMA4, {"layer_types": ["full_attention", "sliding_attention"] * 2}, "shares KV correctly only"),
        (GEMMA4, {"num_kv_shared_layers": 1}, "shares KV correctly only"),
        (GEMMA4, {"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        (GEMMA4, {"vocab_size_per_layer_input": 512}, "vocab_size_per_layer_input = 512"),
        (GEMMA3, {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar = 32"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        (GEMMA2, {"attn_logit_softcapping": None}, "attn_logit_softcapping = None: .* with a number only"),
        (GEMMA2, {"final_logit_softcapping": None}, "final_logit_softcapping = None"),
        (GEMMA2, {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        (GEMMA2, {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar = 32: .* with 64 only"),
        (GEMMA2 | GEMMA2_27B, {}, "query_pre_attn_scalar = 64: .* with 128 only"),
        (GEMMA2, {"rope_parameters": LINEAR}, "would compute another rotary embedding"),
    ],
)
def test_what_llamacpp_computes_otherwise_is_refused(config: dict[str, Any], changes: Any, message: str) -> None:
    spec = describe(config | changes)
    with pytest.raises(ConfigError, match=message):
        check_supported(spec)


@pytest.mark.parametrize(
    ("config", "changes", "runtime"),
    [
        (GEMMA4, {"hidden_activation": "silu"}, "mlx-lm"),
        (GEMMA3, {"final_logit_softcapping": 30.0}, "mlx-lm"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "vLLM"),
        (GEMMA2, {"hidden_activation": "silu"}, "vLLM"),
    ],
)
def test_what_another_runtime_does_not_ask_is_refused(config: dict[str, Any], changes: Any, runtime: str) -> None:
    check_settings(describe(config), runtime)
    ((name, value),) = changes.items()
    with pytest.raises(ConfigError, match=rf"{name} = {value!r}: {runtime} computes this model with"):
        check_settings(describe(config | changes), runtime)


def test_gemma2_in_mlx_has_no_windows_and_no_scaled_angles(tmp_path: Path) -> None:
    packed = pack(make_checkpoint(tmp_path / "c", GEMMA2), tmp_path / "p")
    with pytest.raises(ConfigError, match=r"sliding_window = 32: .*max_position_embeddings = 32 .*which says 2048"):
        export_mlx(packed, tmp_path / "mlx")
    short = GEMMA2 | {"max_position_embeddings": 32}
    packed = pack(make_checkpoint(tmp_path / "short", short), tmp_path / "q")
    export_mlx(packed, tmp_path / "mlx")
    assert verify(packed, tmp_path / "mlx").exact
    with pytest.raises(ConfigError, match="mlx-lm would compute another rotary embedding"):
        check_rope(describe(short | {"rope_parameters": LINEAR}), "mlx-lm")


def test_kv_donors_need_to_be_right_for_shared_layers_only() -> None:
    # three full layers before one that is shared: llama.cpp's rule and transformers' agree
    kinds = ["sliding_attention", "full_attention", "full_attention", "full_attention"]
    check_supported(describe(GEMMA4 | {"layer_types": kinds, "num_kv_shared_layers": 1}))


def test_an_irregular_gemma3_is_refused(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    packed = pack(make_checkpoint(tmp_path / "c", GEMMA3 | {"layer_types": kinds}), tmp_path / "p")
    with pytest.raises(ConfigError, match="every n-th layer"):
        export_gguf(packed, tmp_path / "x.gguf")


def test_gemma3_merges_that_scores_cannot_say_are_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", GEMMA3)
    shutil.copyfile(TOKENIZER / "tokenizer.json", checkpoint / "tokenizer.json")  # one merge a token
    with pytest.raises(ConfigError, match="cannot say what these merges do"):
        export_gguf(pack(checkpoint, tmp_path / "p"), tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("export", [export_gguf, export_hf])
def test_existing_output_is_kept_unless_replaced(gemma4: Case, tmp_path: Path, export: Any) -> None:
    target = tmp_path / "out"
    export(gemma4.packed, target)
    with pytest.raises(OutputError, match="already exists"):
        export(gemma4.packed, target)
    export(gemma4.packed, target, replace=True)
    assert verify(gemma4.packed, target).exact


def test_an_interrupted_export_leaves_nothing(gemma4: Case, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(gemma4.packed, tmp_path / "x.gguf", on_progress=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), OSError("100 requested and 7 written")])
def test_a_full_disk_is_named_and_leaves_nothing(
    gemma4: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def full(self: GGUFWriter, tensor: np.ndarray) -> None:
        raise error

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OutputError, match="disk is full"):
        export_gguf(gemma4.packed, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
