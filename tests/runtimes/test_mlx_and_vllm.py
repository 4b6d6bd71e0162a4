"""Exported folders in mlx-lm and in vLLM, each in its own environment, against transformers.

The models are the suite's random ones: chaos would show in their logits at once.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.runners.start import HERE as RUNNERS
from benchmarks.runners.start import Output, agreement, python_of, start
from benchmarks.runners.vllm_scales import fuse_scales
from intaglio.errors import InputError
from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.speech import read_speech
from intaglio.formats.texts import CHATS
from intaglio.formats.words.write_mlx import export_mlx
from intaglio.formats.words.write_vllm import export_vllm, vllm_config
from intaglio.measure.evaluate import logits_of
from intaglio.measure.simulate import decoded_model
from intaglio.packed.checkpoint import load_model
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.runs.quantize import quantize_model
from intaglio.sizing.planning import bundled_spec
from intaglio.train.static import switch_static
from tests.support.cases import Case, make_case
from tests.support.tiny import GEMMA2, GEMMA4, GEMMA4_MOE, ROPES, VOCABULARY, make_checkpoint, pack, with_rope

IDS = np.random.default_rng(0).integers(3, VOCABULARY, (2, 80)).astype(np.int32)  # two windows and a half
PROMPTS = IDS[:, :16]


def forward(model: Any) -> np.ndarray:
    """[N, T - 1, V]"""
    return np.stack([logits[:-1].numpy() for logits in logits_of(model, torch.from_numpy(IDS).long())])


def simulated(packed: PackedModel, checkpoint: Path) -> np.ndarray:
    """Logits of the training forward with float activations: [N, T - 1, V]."""
    model = decoded_model(load_model(checkpoint), packed)
    switch_static(model, activations=False, kv_cache=False)
    return forward(model)


def run(name: str, artifact: Path, out: Path) -> Output:
    return start(name, name, artifact, IDS, PROMPTS, out, new_tokens=8)


def test_a_missing_environment_fails_and_names_its_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"make \.runtimes/nonsense/\.done"):
        run("nonsense", tmp_path, tmp_path)


def test_a_runner_that_fails_says_why(gemma4: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)run_transformers\.py failed with exit code 1.*config\.json"):
        start("transformers", "", tmp_path, IDS, PROMPTS, tmp_path / "out", new_tokens=2)


@pytest.mark.environment
@pytest.mark.parametrize("name", ["gemma4", "gemma4-dense", "gemma3"])
def test_mlx_computes_q4_0(cases: dict[str, Case], name: str, tmp_path: Path) -> None:
    case = cases[name]
    export_mlx(case.packed, tmp_path / "mlx")
    found, expected = run("mlx", tmp_path / "mlx", tmp_path / "out"), simulated(case.packed, case.checkpoint)
    assert agreement(expected, found.logits, IDS).max_difference < 1e-3
    assert found.runtime.startswith("mlx-lm")


@pytest.mark.environment
def test_mlx_computes_a_gemma2_whose_window_is_the_longest_text(tmp_path: Path) -> None:
    case = make_case("gemma2", tmp_path, GEMMA2 | {"sliding_window": 128, "max_position_embeddings": 128})
    export_mlx(case.packed, tmp_path / "mlx")
    found, expected = run("mlx", tmp_path / "mlx", tmp_path / "out"), simulated(case.packed, case.checkpoint)
    assert agreement(expected, found.logits, IDS).max_difference < 1e-3


@pytest.mark.environment
def test_mlx_computes_two_four_and_eight_bits(mobile_packed: PackedModel, tmp_path: Path) -> None:
    export_mlx(mobile_packed, tmp_path / "mlx")
    expected = simulated(mobile_packed, mobile_packed.path.parent / "checkpoint")
    found = run("mlx", tmp_path / "mlx", tmp_path / "out")
    assert agreement(expected, found.logits, IDS).max_difference < 1e-3


def vllm(name: str, artifact: Path, out: Path, dtype: str, *, kernels: bool = True) -> Output:
    """name: of the runner. dtype: of activations. kernels: whether vLLM's own for 4-bit linears are used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTAGLIO_VLLM_DTYPE", dtype)
        patch.setenv("VLLM_DISABLED_KERNELS", "" if kernels else "CPUWNA16LinearKernel")
        return start(name, "vllm", artifact, IDS, PROMPTS, out, new_tokens=8)


@pytest.mark.environment
def test_vllm_computes_w4a16_as_it_does_the_decoded_weights(gemma4: Case, tmp_path: Path) -> None:
    """Half of the groups have negative scales. In 16 bits runs differ by the rounding of activations, not more."""
    export_vllm(gemma4.packed, tmp_path / "vllm")
    scales = load_file(tmp_path / "vllm" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight_scale"]
    assert 0.3 < float((scales < 0).float().mean()) < 0.7
    exact = simulated(gemma4.packed, gemma4.checkpoint)
    for dtype, difference, kl in (("bfloat16", 0.3, 3e-5), ("float16", 0.04, 1e-6)):
        dense, found = (vllm("vllm", path, tmp_path / "out", dtype) for path in (gemma4.hf, tmp_path / "vllm"))
        assert found.kernels == ["CompressedTensorsWNA16 in CPUWNA16LinearKernel"] and not dense.kernels
        for a, b in ((dense.logits, found.logits), (exact, found.logits), (exact, dense.logits)):
            agreed = agreement(a, b, IDS)
            print(dtype, agreed)
            assert agreed.max_difference < difference and agreed.kl_nats < kl
    assert np.array_equal(dense.tokens, found.tokens)  # of the last, in float16: no near tie of these turns over


@pytest.mark.environment
def test_vllm_computes_a_gemma2_as_it_does_the_decoded_weights(cases: dict[str, Case], tmp_path: Path) -> None:
    """bfloat16, since vLLM runs no Gemma 2 in float16."""
    case = cases["gemma2"]
    export_vllm(case.packed, tmp_path / "vllm")
    dense, found = (vllm("vllm", path, tmp_path / "out", "bfloat16") for path in (case.hf, tmp_path / "vllm"))
    assert found.kernels == ["CompressedTensorsWNA16 in CPUWNA16LinearKernel"] and not dense.kernels
    exact = simulated(case.packed, case.checkpoint)
    for a, b in ((dense.logits, found.logits), (exact, found.logits), (exact, dense.logits)):
        print(agreement(a, b, IDS))
        assert agreement(a, b, IDS).max_difference < 0.3 and agreement(a, b, IDS).kl_nats < 3e-5


@pytest.mark.environment
def test_vllm_loads_and_decodes_every_expert(tmp_path: Path) -> None:
    """Its kernels for W4A16 experts are a GPU's; names, order and decoding are vLLM's own, multiplied in floats.

    Rounding to 16 bits may turn a near tie of the router over, on one CPU and not on another. Then one token
    goes to another expert and its logits are off by tenths: few positions may be, and the mean hardly moves.
    """
    packed = pack(make_checkpoint(tmp_path / "checkpoint", GEMMA4_MOE), tmp_path / "packed")
    export_vllm(packed, tmp_path / "vllm")
    export_hf(packed, tmp_path / "hf")
    found = vllm("vllm_decoded", tmp_path / "vllm", tmp_path / "a", "float16")
    dense = vllm("vllm", tmp_path / "hf", tmp_path / "b", "float16")
    model = decoded_model(load_model(tmp_path / "checkpoint"), packed)
    exact = forward(model)
    experts = model.get_parameter("model.layers.0.experts.gate_up_proj")
    with torch.no_grad():
        experts[:2] = experts[:2].flip(0)
    near = {}
    for name, logits in {"vLLM": found.logits, "dense": dense.logits, "two swapped": forward(model)}.items():
        near[name] = float((np.abs(exact - logits).max(-1) < 0.05).mean())
        print(name, near[name], agreement(exact, logits, IDS))
    assert min(near["vLLM"], near["dense"]) > 0.8 and near["two swapped"] < 0.3
    assert agreement(exact, found.logits, IDS).kl_nats < 1e-5


FOUR_BITS = [f"weights.{rule}.grid=int4" for rule in ("mlp_late", "ple_linear")]
FOUR_BITS += [f"weights.{rule}.grid=bf16" for rule in ("token_embedding", "head", "ple_embedding")]


@pytest.mark.environment
@pytest.mark.parametrize("rules", [FOUR_BITS, []], ids=["four bits", "mobile"])
def test_vllm_computes_the_mobile_format(rules: list[str], text: Path, tmp_path: Path) -> None:
    """float32 and products with decoded weights give the same logits but for flipped int8 codes."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    settings = ["channel_scales=bf16", "schedule.calibration_tokens=512", "schedule.sequence_length=64", *rules]
    packed, _ = quantize_model(checkpoint, Recipe.load("mobile", settings), tmp_path / "packed", data=text)
    export_vllm(packed, tmp_path / "vllm")
    found = vllm("vllm_decoded", tmp_path / "vllm", tmp_path / "a", "float32", kernels=False)
    model = decoded_model(load_model(checkpoint), packed)
    switch_static(model, activations=True, kv_cache=False)
    own = forward(model)
    assert fuse_scales(model, packed) > 5
    expected = forward(model)
    near, far = (float((np.abs(x - found.logits) < 1e-4).mean()) for x in (expected, own))
    print(near, far, agreement(expected, found.logits, IDS), agreement(own, found.logits, IDS))
    assert near > 0.9 and far < 0.1
    if rules:  # which vLLM's own kernel for a CPU computes, in 16 bits
        real = vllm("vllm", tmp_path / "vllm", tmp_path / "b", "bfloat16")
        assert real.kernels == ["CompressedTensorsWNA8O8Int in CPUWNA16LinearKernel"]
        print(agreement(expected, real.logits, IDS))
        assert agreement(expected, real.logits, IDS).kl_nats < 1e-4


def schemes_in_vllm(folder: Path, names: list[str]) -> dict[str, Any]:
    command = [python_of("vllm"), RUNNERS / "vllm_schemes.py", folder, *names]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.environment
def test_vllm_finds_the_experts_of_the_published_mixture(tmp_path: Path) -> None:
    """The config alone says which method each module gets; no weights are needed."""
    (tmp_path / "config.json").write_text(json.dumps(vllm_config(make_plan(bundled_spec("gemma-4-26b-a4b"), "q4_0"))))
    layer = "language_model.model.layers.29"  # as vLLM calls it within the multimodal model
    linear = ["CompressedTensorsWNA16", 4, 32]
    assert schemes_in_vllm(tmp_path, [f"{layer}.{name}" for name in MIXTURE]) == {
        f"{layer}.experts": ["CompressedTensorsWNA16MoEMethod", 4, 32],
        f"{layer}.router.proj": None,
        f"{layer}.self_attn.qkv_proj": linear,
        f"{layer}.mlp.gate_up_proj": linear,
        f"{layer}.mlp.down_proj": linear,
    }


MIXTURE = ("experts", "router.proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")


@pytest.mark.environment
def test_vllm_finds_the_schemes_of_the_mobile_format(tmp_path: Path) -> None:
    """2- and 8-bit kernels and packed embeddings need a GPU; what they would be given is asked of vLLM's own code."""
    recipe = Recipe.load("mobile", ["channel_scales=bf16"])
    packed = pack(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "packed", recipe)
    export_vllm(packed, tmp_path / "vllm")
    names = [f"model.layers.{i}.{name}" for i in (0, 2) for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")]
    names += ["model.layers.2.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.layers.3.mlp.down_proj"]
    names += ["model.layers.1.per_layer_input_gate", "model.per_layer_model_projection", "lm_head"]
    names += ["model.embed_tokens", "model.embed_tokens_per_layer"]
    found = schemes_in_vllm(tmp_path / "vllm", names)
    wna8o8 = {bits: ["CompressedTensorsWNA8O8Int", bits, None] for bits in (2, 4, 8)}
    assert found == {
        "model.layers.0.self_attn.qkv_proj": wna8o8[4],
        "model.layers.0.mlp.gate_up_proj": wna8o8[4],
        "model.layers.2.self_attn.qkv_proj": wna8o8[4],
        "model.layers.2.mlp.gate_up_proj": wna8o8[2],
        "model.layers.2.self_attn.q_proj": wna8o8[4],
        "model.layers.0.self_attn.o_proj": wna8o8[4],
        "model.layers.3.mlp.down_proj": wna8o8[2],
        "model.layers.1.per_layer_input_gate": wna8o8[8],
        "model.per_layer_model_projection": None,
        "lm_head": ["CompressedTensorsWNA16", 2, None],
        "model.embed_tokens": ["CompressedTensorsEmbeddingWNA16Int", 2, None],
        "model.embed_tokens_per_layer": ["CompressedTensorsEmbeddingWNA16Int", 4, 64],
    }


FIXED = """
import json, sys
from pathlib import Path
from mlx_lm.utils import load_tokenizer
tokenizer = load_tokenizer(Path(sys.argv[1]))
texts, chats = json.loads(sys.stdin.read())
ids = [list(tokenizer.encode(text)) for text in texts]
written = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=ask) for c, ask in chats]
print(json.dumps([ids, written, sorted(tokenizer.eos_token_ids)]))
"""


@pytest.mark.environment
def test_mlx_reads_and_writes_the_fixed_texts_and_chats(gemma4: Case, tmp_path: Path) -> None:
    export_mlx(gemma4.packed, tmp_path / "mlx")
    speech = read_speech(gemma4.packed.path, gemma4.packed.plan.model.config)
    assert speech is not None
    texts, command = speech.texts(), [str(python_of("mlx")), "-c", FIXED, str(tmp_path / "mlx")]
    done = subprocess.run(command, input=json.dumps([texts, CHATS]), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ids, written, ends = json.loads(done.stdout.splitlines()[-1])
    assert ids == speech.tokens(texts)
    assert written == [
        speech.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask) for chat, ask in CHATS
    ]
    assert set(ends) <= set(speech.end_ids)


@pytest.mark.environment
def test_vllm_reads_and_writes_the_fixed_texts_and_chats(gemma4: Case, tmp_path: Path) -> None:
    export_vllm(gemma4.packed, tmp_path / "vllm")
    speech = read_speech(gemma4.packed.path, gemma4.packed.plan.model.config)
    assert speech is not None
    texts, fixed, out = speech.texts(), tmp_path / "fixed.json", tmp_path / "out.json"
    fixed.write_text(json.dumps([texts, CHATS]), "utf-8")
    command = [python_of("vllm"), RUNNERS / "vllm_tokens.py", tmp_path / "vllm", fixed, out]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    chats = [speech.tokenizer.apply_chat_template(chat, add_generation_prompt=ask)["input_ids"] for chat, ask in CHATS]
    assert json.loads(out.read_text("utf-8")) == speech.tokens(texts) + chats


@pytest.mark.environment
@pytest.mark.parametrize("name", ["proportional, factor 8", "linear, full layers", "linear, sliding layers"])
def test_mlx_turns_as_a_scaled_rotary_embedding_asks(tmp_path: Path, name: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", with_rope(GEMMA4, ROPES[name]))
    packed = pack(checkpoint, tmp_path / "p")
    export_mlx(packed, tmp_path / "mlx")
    found = run("mlx", tmp_path / "mlx", tmp_path / "out")
    assert agreement(simulated(packed, checkpoint), found.logits, IDS).max_difference < 1e-3
