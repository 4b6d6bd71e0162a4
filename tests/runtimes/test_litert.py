"""The LiteRT-LM bundle in LiteRT's interpreter and in LiteRT-LM's own engine, against the training forward.

Two sums of the same numbers in another order differ in their last bits, and now and then such a bit moves an
activation across the border between two int8 codes, which all later layers see: even the training forward, run in
float64, equals itself in float32 in nine tenths of these logits only. So rows either agree in all logits or show
such a step; a wrong scale, a wrong rounding or a wrong operation would leave no row equal.
"""

from __future__ import annotations

import filecmp
import json
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.runners.codes import Comparison, litert_codes
from benchmarks.runners.start import HERE, agreement, python_of, start
from intaglio.formats.litert.read_facts import compare_litert_facts
from intaglio.formats.litert.read_tflite import TOKENIZER_SECTION, read_bundle, unzip_tokenizer
from intaglio.formats.litert.write import export_litert
from intaglio.formats.speech import read_speech
from intaglio.formats.tally import Tally
from intaglio.formats.verify import verify
from intaglio.measure.simulate import decoded_model
from intaglio.packed.assets import load_tokenizer
from intaglio.packed.checkpoint import TextModel, load_model
from intaglio.packed.model import PackedModel
from intaglio.plan import rope
from intaglio.plan.family import read_spec
from intaglio.plan.recipe import Recipe
from intaglio.runs.proof import Evaluation
from intaglio.runs.quantize import quantize_model
from intaglio.runs.texts import read_windows
from intaglio.tiny import HELDOUT_TEXT, MODEL_DIR

pytestmark = pytest.mark.environment

ENVIRONMENT = "litert"
CONTEXT_TOKENS, PREFILL_TOKENS = 128, 16
WINDOWS, WINDOW_TOKENS, NEW_TOKENS = 8, 17, 40
PROMPT = "It was a bright morning, and the whole family"
EQUAL = 1e-3  # of logits, as for any runtime in float32


@dataclass(frozen=True)
class Bundle:
    """A packed model, its bundle, and what computes as it does."""

    packed: PackedModel
    path: Path
    forward: TextModel


def make(folder: Path, recipe: Recipe, data: Path | None) -> Bundle:
    packed, _ = quantize_model(MODEL_DIR, recipe, folder / "packed", data=data)
    path = folder / "model.litertlm"
    export(packed, path)
    return Bundle(packed, path, decoded_model(load_model(MODEL_DIR), packed))


def export(packed: PackedModel, path: Path) -> None:
    python = python_of(ENVIRONMENT)
    export_litert(packed, path, python=python, context_tokens=CONTEXT_TOKENS, prefill_tokens=PREFILL_TOKENS)


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundled model by recipe `mobile`, static scales calibrated."""
    recipe = Recipe.load("mobile", ["schedule.calibration_tokens=8192", "schedule.sequence_length=256"])
    return make(tmp_path_factory.mktemp("mobile"), recipe, HELDOUT_TEXT)


@pytest.fixture(scope="module")
def q4_0(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundled model by recipe `q4_0-litert`: weights alone."""
    return make(tmp_path_factory.mktemp("q4_0"), Recipe.load("q4_0-litert"), None)


def windows() -> np.ndarray:
    evaluation = Evaluation(text=HELDOUT_TEXT, tokens=WINDOWS * WINDOW_TOKENS, window=WINDOW_TOKENS)
    return read_windows(evaluation, 4096, load_tokenizer(MODEL_DIR))


@torch.no_grad()
def logits_of(model: TextModel, ids_NT: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(ids_NT).long(), use_cache=False).logits[:, :-1].float().numpy()


@torch.no_grad()
def chosen_share(model: TextModel, ids: np.ndarray) -> float:
    """Share of the tokens after the prompt that the training forward chooses too after the same tokens.

    Greedy texts part at the first token that is another, so they are not compared as a whole: whether two sums of
    one model's own numbers, by one thread or by two, choose the same 40 tokens depends on the prompt.
    """
    tops = model(torch.from_numpy(ids).long()[None], use_cache=False).logits[0, :-1].argmax(-1).numpy()
    new = slice(len(prompt_ids()) - 1, None)
    return float((tops[new] == ids[1:][new]).mean())


def prompt_ids() -> np.ndarray:
    return np.array(load_tokenizer(MODEL_DIR)(PROMPT).input_ids)


def test_codes_and_scales_are_those_of_the_packed_model(mobile: Bundle, q4_0: Bundle) -> None:
    for bundle in (mobile, q4_0):
        result = verify(bundle.packed, bundle.path)
        assert result.exact, result.summary()
        assert result.codes and result.scales and result.values
    assert verify(mobile.packed, mobile.path).static_scales > 2 * len(mobile.packed.plan.static_scales) * 0.6


def test_a_single_code_that_differs_is_found(mobile: Bundle, tmp_path: Path) -> None:
    data = bytearray(mobile.path.read_bytes())
    data[-2] ^= 1  # in the last row of the last layer's table
    (tmp_path / "x.litertlm").write_bytes(data)
    result = verify(mobile.packed, tmp_path / "x.litertlm")
    assert (result.differing_codes, result.differing_scales, result.exact) == (1, 0, False)


def test_what_lies_beside_the_weights_is_compared(mobile: Bundle) -> None:
    result = verify(mobile.packed, mobile.path)
    assert result.compared == "weights, config, tokenizer, texts, template, generation settings"
    assert result.facts["texts"] >= 300


def ropes(kind: str) -> np.ndarray:
    """float32 angles of the bundled model's layers."""
    return np.array(rope.ropes(read_spec(MODEL_DIR).layer_config)[f"{kind}_attention"].angles, np.float32)


# Bytes of the bundle, what takes their place, and what is said of it. A length stays as it is.
FACTS = {
    "eps": (np.float32(1e-6), np.float32(1e-5), "eps of all norms is"),
    "cap": (np.float32(30), np.float32(29), "cap of the logits is"),
    "share of the cap": (np.float32(1 / 30), np.float32(1 / 29), "share of the cap is"),
    "rope of sliding layers": (ropes("sliding"), ropes("sliding") * np.float32(1.01), "angles of the rotary"),
    "rope of full layers": (ropes("full"), ropes("full") * np.float32(1.01), "angles of the rotary"),
    "template": (b"<|turn>model", b"<|turn>robot", "fixed chats are written otherwise"),
    "an operator": (b"odml.rms_norm", b"odml.rms_nerm", "intaglio.graphs is"),
    "start token": (b"\n\x05\n\x03\n\x01\x02", b"\n\x05\n\x03\n\x01\x03", "bos_token_id is 3"),
    "end token": (b"\x12\x05\n\x03\n\x01\x01", b"\x12\x05\n\x03\n\x01\x07", "end tokens is"),
    "tokens that fit": (b"\x28\x80\x01", b"\x28\x81\x01", "tokens that fit is 129"),
    "plan": (b"intaglio.plan", b"intaglio.plon", "intaglio.plan is None"),
}


@pytest.mark.parametrize("name", FACTS)
def test_another_fact_is_noticed(name: str, mobile: Bundle, tmp_path: Path) -> None:
    old, new, said = FACTS[name]
    before, after = (value if isinstance(value, bytes) else value.tobytes() for value in (old, new))
    data = mobile.path.read_bytes()
    assert before in data
    (tmp_path / "x.litertlm").write_bytes(data.replace(before, after))
    result = verify(mobile.packed, tmp_path / "x.litertlm")
    assert not result.exact
    assert any(said in text for text in result.differing_facts), result.differing_facts


def change_merges(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"].reverse()


def change_normalizer(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("change", [change_merges, change_normalizer])
def test_another_tokenizer_is_noticed(change: Callable[[dict[str, Any]], None], mobile: Bundle) -> None:
    found = read_bundle(mobile.path)
    tokenizer = json.loads(unzip_tokenizer(found.other[TOKENIZER_SECTION][0]))
    change(tokenizer)
    text = json.dumps(tokenizer).encode()
    section = np.frombuffer(len(text).to_bytes(8, "little") + zlib.compress(text), np.uint8)
    tally = Tally()
    compare_litert_facts(mobile.packed, replace(found, other=found.other | {TOKENIZER_SECTION: [section]}), tally)
    said = " ".join(tally.unlike_facts)
    assert "vocabulary, merges and steps is" in said and "fixed texts have other tokens" in said


def test_litert_lm_reads_the_fixed_texts_as_transformers_does(mobile: Bundle, tmp_path: Path) -> None:
    speech = read_speech(mobile.packed.path, {})
    assert speech is not None
    texts = [text for text in speech.texts() if "\0" not in text]  # where its Python interface ends a text
    (tmp_path / "texts.json").write_text(json.dumps(texts), "utf-8")
    command = [python_of(ENVIRONMENT), HERE / "litert_lm_tokens.py", mobile.path, tmp_path / "texts.json"]
    subprocess.run([*map(str, command), str(tmp_path / "out")], check=True, capture_output=True, text=True)
    found = json.loads((tmp_path / "out").read_text("utf-8"))
    expected = speech.tokens(texts, add_special=False)
    wrong = [(text, a, b) for text, a, b in zip(texts, expected, found, strict=True) if a != b]
    assert not wrong, wrong[:5]


def test_two_exports_are_the_same_file(mobile: Bundle, tmp_path: Path) -> None:
    export(mobile.packed, tmp_path / "again.litertlm")
    assert filecmp.cmp(mobile.path, tmp_path / "again.litertlm", shallow=False)


def on_the_codes_of(bundle: Bundle, ids_NT: np.ndarray, folder: Path) -> tuple[Comparison, np.ndarray]:
    """The training forward on LiteRT's own int8 codes, and LiteRT's logits [N, T, V]."""
    codes, logits = litert_codes(bundle.path, bundle.packed.plan, ids_NT, folder)
    return Comparison(bundle.forward, bundle.packed.plan, codes, ids_NT), logits


def test_on_litert_s_int8_codes_the_training_forward_computes_the_same(mobile: Bundle, tmp_path: Path) -> None:
    """Every code in its place, all logits, and 40 greedy tokens: see `benchmarks/runners/codes.py`."""
    comparison, logits = on_the_codes_of(mobile, windows(), tmp_path)
    print(comparison)
    assert set(comparison.counts) == {scale.owner for scale in mobile.packed.plan.static_scales}
    assert comparison.equal_share > 0.9999 and comparison.furthest == 1
    assert (np.abs(comparison.logits - logits) < 1e-4).all()
    out = start("litert", ENVIRONMENT, mobile.path, windows()[:1], prompt_ids()[None], tmp_path / "out", NEW_TOKENS)
    ids = np.concatenate([prompt_ids(), out.tokens[0]])
    comparison, _ = on_the_codes_of(mobile, ids[None], tmp_path)
    assert (comparison.logits[0, len(prompt_ids()) - 1 : -1].argmax(-1) == out.tokens[0]).all()


def test_static_int8_computes_the_training_forward(mobile: Bundle, tmp_path: Path) -> None:
    ids_NT = windows()
    found = start("litert", ENVIRONMENT, mobile.path, ids_NT, prompt_ids()[None], tmp_path / "out", NEW_TOKENS)
    expected = logits_of(mobile.forward, ids_NT)
    equal = np.abs(found.logits - expected) < EQUAL
    print(f"equal: {equal.mean():.1%} of logits, {equal.all(-1).mean():.1%} of rows")
    print(agreement(expected, found.logits, ids_NT))
    assert equal[:, 0].mean() > 0.999
    assert equal.all(-1).mean() > 0.5
    assert agreement(expected, found.logits, ids_NT).same_top_share > 0.9
    assert chosen_share(mobile.forward, np.concatenate([prompt_ids(), found.tokens[0]])) > 0.85


def test_litert_lm_writes_what_the_training_forward_would(mobile: Bundle, tmp_path: Path) -> None:
    command = [python_of(ENVIRONMENT), HERE / "litert_lm_text.py", mobile.path, PROMPT, NEW_TOKENS, tmp_path / "text"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    text = (tmp_path / "text").read_text("utf-8")
    ids = np.array(load_tokenizer(MODEL_DIR)(PROMPT + text).input_ids)
    assert len(ids) > len(prompt_ids()) + NEW_TOKENS // 2
    assert chosen_share(mobile.forward, ids) > 0.85


def test_q4_0_differs_by_what_the_kernel_rounds(q4_0: Bundle, tmp_path: Path) -> None:
    ids_NT = windows()
    found = start("litert", ENVIRONMENT, q4_0.path, ids_NT, prompt_ids()[None], tmp_path / "out", NEW_TOKENS)
    result = agreement(logits_of(q4_0.forward, ids_NT), found.logits, ids_NT)
    print(result)
    assert result.kl_nats < 5e-3
    assert result.same_top_share > 0.9
