"""Static activations and KV cache in training: the runtime's forward, honest gradients, shared scales."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from transformers.integrations.gemma_quant import apply_srq

from intaglio.errors import InputError, MismatchError, WeightError
from intaglio.measure.int8_cache import decode_windows, int8_cache
from intaglio.packed.checkpoint import load_model
from intaglio.packed.decoded import load_packed
from intaglio.packed.model import PackedModel
from intaglio.plan.family import build_meta_model
from intaglio.plan.plan import Plan, make_plan
from intaglio.plan.recipe import Recipe
from intaglio.progress import Progress, StepInfo
from intaglio.train.calibrate import calibrate
from intaglio.train.latents import Latents, prepare
from intaglio.train.loop import train
from intaglio.train.options import Options
from intaglio.train.pack import pack_model
from intaglio.train.run_folder import read_losses
from intaglio.train.static import (
    StaticQuantize,
    put_scales,
    read_scales,
    scale_of,
    static,
    switch_static,
)
from tests.support.tiny import GEMMA2, make_checkpoint, pack
from tests.support.training import small_corpus, small_model, small_plan, straight_through

PLAN = small_plan(recipe="mobile")
CORPUS = small_corpus(sequences=8)
IDS, POSITIONS = (torch.from_numpy(a).long() for a in (CORPUS.tokens, CORPUS.positions))


def student(plan: Plan = PLAN) -> Any:
    return prepare(small_model(), plan).model


@pytest.fixture(scope="module")
def calibrated_latents() -> Latents:
    latents = prepare(small_model(), PLAN)
    calibrate(latents.model, PLAN, [(IDS, POSITIONS)])
    return latents


@pytest.fixture(scope="module")
def calibrated(calibrated_latents: Latents) -> Any:
    return calibrated_latents.model


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def plain_static(x: Tensor, latent: Tensor) -> Tensor:
    """Static quantization with autograd's own gradients: straight through the rounding of codes and scale."""
    scale = straight_through(scale_of(latent).double(), latent.exp())
    clipped = (x / scale).clamp(-128.5, 127.5)
    return straight_through(clipped.round().clamp(-128, 127), clipped) * scale


@pytest.mark.parametrize("latent", [-3.0, -1.0, 0.5])
def test_gradients_are_those_of_straight_through_rounding(latent: float) -> None:
    x = torch.randn(500, dtype=torch.float64) * 20
    grad = torch.randn(500, dtype=torch.float64)
    ours = [x.float().requires_grad_(), torch.tensor(latent).requires_grad_()]
    plain = [x.clone().requires_grad_(), torch.tensor(latent, dtype=torch.float64).requires_grad_()]
    StaticQuantize.apply(*ours).backward(grad.float())
    plain_static(*plain).backward(grad)
    torch.testing.assert_close(ours[0].grad.double(), plain[0].grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1].grad.double(), plain[1].grad, rtol=2e-2, atol=1e-3)


def test_compilation_leaves_every_parameter_its_gradient(calibrated: Any) -> None:
    layer = calibrated.model.layers[0]
    norm, linear = layer.input_layernorm, layer.self_attn.q_proj
    x = torch.randn(4, linear.in_features)

    def gradients(run: Any) -> tuple[Tensor, ...]:
        learned = norm.weight, linear.static.latents["input"], linear.static.latents["output"]
        return torch.autograd.grad(run(x).square().sum(), learned)

    def layers(x: Tensor) -> Tensor:
        return static(linear, "output", linear.weight @ static(linear, "input", norm(x)).T)

    expected, compiled = gradients(layers), gradients(torch.compile(layers, backend="aot_eager"))
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-6)


def test_a_linear_computes_again_what_it_does_not_keep(calibrated: Any) -> None:
    linear = copy.deepcopy(calibrated.model.layers[0].mlp.down_proj)
    x = torch.randn(2, 5, linear.in_features)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(2, 5, linear.out_features)
    y = linear(ours)
    y.backward(grad)
    gradients = {name: parameter.grad.clone() for name, parameter in linear.named_parameters()}
    linear.zero_grad()
    static = linear.static.latents
    expected = StaticQuantize.apply(StaticQuantize.apply(plain, static["input"]) @ linear.weight.T, static["output"])
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours.grad, plain.grad)
    for name, parameter in linear.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def test_nothing_quantized_is_kept_for_the_backward(calibrated: Any) -> None:
    kept: list[Tensor] = []
    linear = calibrated.model.layers[0].mlp.down_proj
    x = torch.randn(2, 5, linear.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x)
    own = {p.data_ptr() for p in linear.parameters()} | {x.data_ptr()}
    assert {t.data_ptr() for t in kept} <= own


def test_the_forward_is_that_of_transformers_layer(calibrated: Any) -> None:
    linear = calibrated.model.layers[0].self_attn.q_proj
    scales = read_scales(calibrated, PLAN)
    name = "model.layers.0.self_attn.q_proj"
    x = torch.randn(3, linear.in_features)
    inside = apply_srq(x, torch.tensor(scales[f"{name}.input_activation_scale"]))
    product = torch.nn.functional.linear(inside, linear.weight)
    expected = apply_srq(product, torch.tensor(scales[f"{name}.output_activation_scale"]))
    assert torch.equal(linear(x), expected)


def test_until_calibrated_and_when_off_nothing_is_quantized() -> None:
    model = student()
    before = logits(model)
    calibrate(model, PLAN, [(IDS, POSITIONS)])
    on = logits(model)
    switch_static(model, activations=False, kv_cache=False)
    assert torch.equal(logits(model), before)
    assert not torch.equal(on, before)
    for kind in ({"activations": True, "kv_cache": False}, {"activations": False, "kv_cache": True}):
        switch_static(model, **kind)
        assert not torch.equal(logits(model), before)
        assert not torch.equal(logits(model), on)


def test_every_scale_is_found_and_shared_as_planned(calibrated: Any) -> None:
    values = read_scales(calibrated, PLAN)
    assert set(values) == {scale.name for scale in PLAN.static_scales}
    assert all(value > 0 for value in values.values())
    assert all(values[scale.name] == values[scale.owner] for scale in PLAN.static_scales)
    parameters = [n for n, _ in calibrated.named_parameters() if "static" in n]
    assert len(parameters) == sum(scale.owned for scale in PLAN.static_scales)
    assert len([n for n in calibrated.state_dict() if "static" in n]) == len(parameters)


def test_the_first_token_is_not_calibrated_on() -> None:
    """Its activations are made a thousand times larger: without effect on the scales."""
    plain, loud = small_model(), small_model()
    found = []
    with torch.no_grad():
        loud.model.embed_tokens.weight[2] *= 1000
    ids = IDS.clone()
    ids[POSITIONS == 0] = 2
    for model in (plain, loud):
        prepared = prepare(model, small_plan("weights.ple_embedding.trainable=true", recipe="mobile"))
        name = "model.layers.0.self_attn.q_proj.input_activation_scale"
        found.append(calibrate(prepared.model, PLAN, [(ids, POSITIONS)])[name])
    assert found[0] == found[1]


def test_calibration_does_not_depend_on_how_text_is_cut(calibrated: Any) -> None:
    model = student()
    pieces = [(IDS[i : i + 3], POSITIONS[i : i + 3]) for i in range(0, len(IDS), 3)]
    heard = Mock()
    values = calibrate(model, PLAN, pieces, progress=Progress(heard))
    expected = read_scales(calibrated, PLAN)
    assert all(values[name] == pytest.approx(expected[name], rel=0.1) for name in values)
    assert heard.part.call_args.args[:2] == (IDS.numel(), IDS.numel())
    assert heard.part.call_count == len(pieces)


def test_a_process_without_data_changes_nothing(calibrated: Any) -> None:
    """Two processes, the second with no text: each ends with the first one's scales."""
    first, second = student(), student()
    counts: list[Tensor] = []
    calibrate(first, PLAN, [(IDS, POSITIONS)], reduce=lambda c: counts.append(c) or c)
    remaining = iter(counts)
    values = calibrate(second, PLAN, [], reduce=lambda c: c + next(remaining))
    assert values == {name: v for name, v in read_scales(first, PLAN).items() if name in values}


def test_observers_are_gone_after_calibration(calibrated: Any) -> None:
    assert not any(m._forward_hooks for m in calibrated.modules() if isinstance(m, torch.nn.Linear))
    assert all(m.static.observer is None for m in calibrated.modules() if hasattr(m, "static"))


def test_activations_that_are_not_finite_are_refused() -> None:
    model = student()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("nan"))
    with pytest.raises(WeightError, match=r"layers\.1\.self_attn.*NaN or Inf"):
        calibrate(model, PLAN, [(IDS, POSITIONS)])


def test_packed_scales_are_those_of_the_forward(calibrated_latents: Latents, gemma4: Any, tmp_path: Any) -> None:
    calibrated = calibrated_latents.model
    pack_model(calibrated_latents, tmp_path / "packed", assets=gemma4.checkpoint)
    assert PackedModel.open(tmp_path / "packed").read_static() == read_scales(calibrated, PLAN)


def test_an_int8_cache_decodes_what_training_simulates(calibrated: Any) -> None:
    switch_static(calibrated, activations=True, kv_cache=True)
    simulated = logits(calibrated, IDS[:1])[0]
    switch_static(calibrated, activations=True, kv_cache=False)
    cache = int8_cache(calibrated, read_scales(calibrated, PLAN))
    decoded = decode_windows(calibrated, IDS[:1], cache)[0]
    floats = logits(calibrated, IDS[:1])[0]
    switch_static(calibrated, activations=True, kv_cache=True)
    assert {layer.keys.dtype for layer in cache.layers if layer.is_initialized} == {torch.int8}
    # the order of sums differs, and a value that lies between two codes may fall on either side
    assert float((decoded - simulated).abs().mean()) < 0.1 * float((floats - simulated).abs().mean())


def test_another_attention_is_refused() -> None:
    model = small_model()
    model.set_attn_implementation("eager")
    with pytest.raises(InputError, match="attends by 'eager', expected 'sdpa'"):
        prepare(model, PLAN)


def test_gradient_reaches_every_scale(calibrated: Any) -> None:
    model = copy.deepcopy(calibrated)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    silent = [n for n, p in model.named_parameters() if "static" in n and (p.grad is None or not p.grad.abs().sum())]
    assert not silent


def test_training_learns_the_scales_and_dropout_leaves_steps_out(tmp_path: Any) -> None:
    plans = [small_plan(*overrides(d), recipe="mobile") for d in (0, 1)]
    teacher = small_model()
    with_static, without = (
        read_scales(train(teacher, plan, CORPUS, tmp_path / str(i), options=Options(precision="no")).model, plan)
        for i, plan in enumerate(plans)
    )
    start = prepare(copy.deepcopy(teacher), plans[0])
    first = calibrate(start.model, plans[0], [(IDS, POSITIONS)])
    moved, still = ([abs(math.log(found[name] / first[name])) for name in first] for found in (with_static, without))
    assert max(moved) > 0.04  # the rate is 0.05, in logarithms
    assert max(still) < 0.02


def test_a_resumed_run_goes_on_with_its_scales(tmp_path: Any) -> None:
    """Bit for bit: losses, and the scales that come out."""
    plan = small_plan(*overrides(0.5), "schedule.tokens=384", "schedule.frozen_tail=0.3", recipe="mobile")
    options, teacher = Options(precision="no", checkpoint_every=2), small_model()

    def stop(info: StepInfo) -> None:
        if info.step == 5:
            raise KeyboardInterrupt

    whole = train(teacher, plan, CORPUS, tmp_path / "whole", options=options)
    with pytest.raises(KeyboardInterrupt):
        train(teacher, plan, CORPUS, tmp_path / "cut", options=options, on_step=stop)
    resumed = train(teacher, plan, CORPUS, tmp_path / "cut", options=options, resume=True)
    assert read_losses(tmp_path / "cut") == read_losses(tmp_path / "whole")
    assert read_scales(resumed.model, plan) == read_scales(whole.model, plan)
    assert len(read_losses(tmp_path / "whole")) == 6


def overrides(dropout: float) -> list[str]:
    schedule = {"tokens": 192, "batch_size": 4, "sequence_length": 16, "scale_lr": 0.05, "calibration_tokens": 128}
    return [f"schedule.{k}={v}" for k, v in schedule.items()] + [f"activations.dropout={dropout}"]


def test_scales_that_are_put_by_hand_are_used() -> None:
    model = student()
    owner = next(scale for scale in PLAN.static_scales if scale.owned)
    put_scales(model, PLAN, {owner.name: 0.25})
    assert read_scales(model, PLAN)[owner.name] == pytest.approx(0.25, rel=2**-8)


def test_without_scales_it_is_a_plain_linear() -> None:
    linear = student().model.layers[0].mlp.gate_proj
    x = torch.randn(4, linear.in_features)
    assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_calibrated_model_that_was_cast_packs_the_scales_of_its_forward(
    dtype: torch.dtype, calibrated_latents: Latents, gemma4: Any, tmp_path: Any
) -> None:
    latents = copy.deepcopy(calibrated_latents)
    latents.model.to(dtype)
    try:
        pack_model(latents, tmp_path / "packed", assets=gemma4.checkpoint)
    except MismatchError as error:
        assert "cast" in str(error)
    else:
        assert PackedModel.open(tmp_path / "packed").read_static() == read_scales(latents.model, PLAN)


def test_a_soft_cap_of_attention_is_computed_or_refused(tmp_path: Path) -> None:
    """Every model that intaglio builds or loads attends with the cap; one that was given without it is refused."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", GEMMA2)
    loaded, built = load_model(checkpoint), build_meta_model(GEMMA2)
    packed = load_packed(pack(checkpoint, tmp_path / "packed", Recipe.load("q4_0")))
    assert [model.config._attn_implementation for model in (loaded, built, packed)] == ["eager"] * 3
    loaded.config._attn_implementation = "sdpa"  # as transformers before 5.23 chose by itself
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    with pytest.raises(InputError, match=r"leave out the soft cap.*set_attn_implementation\('eager'\)"):
        prepare(loaded, make_plan(GEMMA2, "q4_0"))
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
