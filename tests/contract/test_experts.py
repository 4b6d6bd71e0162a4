"""Mixture of experts: each expert's rows on grids of their own, trained, exported, and run in llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from intaglio.errors import RecipeError
from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.gguf.read import read_gguf
from intaglio.formats.gguf.write import export_gguf
from intaglio.formats.verify import verify
from intaglio.measure.simulate import decoded_model
from intaglio.numerics.fit import fit_mse
from intaglio.numerics.grid import Q4_0, Quantized
from intaglio.packed.checkpoint import load_model
from intaglio.packed.decoded import load_packed
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.latents import Latents, prepare
from intaglio.train.loop import train
from intaglio.train.pack import pack_model
from intaglio.train.start import plan_to_go_on
from tests.support.cli import intaglio
from tests.support.tiny import GEMMA4_MOE, make_checkpoint, pack
from tests.support.training import SMALL_MOE, moe, plain_fake_quantize, small_corpus, small_plan, weigh_experts

IDS = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(3))
EXPERTS = "model.layers.1.experts"


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def packed_of(latents: Latents, folder: Path) -> PackedModel:
    (folder / "assets").mkdir(exist_ok=True)
    pack_model(latents, folder / "packed", assets=folder / "assets")
    return PackedModel.open(folder / "packed")


def test_every_expert_is_quantized_by_itself() -> None:
    """The forward multiplies by the values that plain code gives for one expert alone; gradients are autograd's."""
    latent = prepare(moe(), small_plan(config=SMALL_MOE)).blocks[f"{EXPERTS}.gate_up_proj"]
    assert latent.scale_latent.shape == (16, 128, 8)
    upstream = torch.randn(latent.latent.shape, generator=torch.Generator().manual_seed(0))
    latent.weight.grad = upstream.clone()
    latent.pull()
    for expert in (0, 7, 15):
        alone = latent.latent.detach()[expert].clone().requires_grad_()
        z = latent.scale_latent.detach()[expert].clone().requires_grad_()
        plain = plain_fake_quantize("canonical", Q4_0, alone, z, z)
        assert torch.equal(plain, latent.weight[expert])
        plain.backward(upstream[expert])
        torch.testing.assert_close(latent.latent.grad[expert], alone.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(latent.scale_latent.grad[expert], z.grad, rtol=1e-4, atol=1e-6)


def test_the_forward_is_that_of_the_packed_weights(tmp_path: Path) -> None:
    model = moe()
    latents = prepare(moe(), small_plan(config=SMALL_MOE))
    found = logits_of(latents.model.eval())
    assert not torch.equal(found, logits_of(model))
    packed = packed_of(latents, tmp_path)
    assert torch.equal(found, logits_of(decoded_model(model, packed)))
    value = packed.read(f"{EXPERTS}.down_proj")
    assert isinstance(value, Quantized) and value.codes.shape == (16, 256, 64) and value.scale.shape == (16, 256, 2)


@pytest.mark.parametrize("change", ["grid=f32", "trainable=false"])
def test_experts_that_stay_floats_or_still_are_what_ships(change: str, tmp_path: Path) -> None:
    latents = prepare(moe(), small_plan(f"weights.expert.{change}", config=SMALL_MOE))
    latents.model.eval()(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    weight = latents.model.get_parameter(f"{EXPERTS}.down_proj")
    assert (weight.grad is not None) == (change == "grid=f32")
    found, packed = logits_of(latents.model), packed_of(latents, tmp_path)
    assert torch.equal(found, logits_of(load_packed(packed)))
    original = dict(moe().named_parameters())[f"{EXPERTS}.down_proj"].detach()
    rows = fit_mse(original.flatten(0, 1), Q4_0).decode().view_as(original)
    expected = original.to(torch.bfloat16).float() if change == "grid=f32" else rows
    assert torch.equal(packed.decode(f"{EXPERTS}.down_proj"), expected)


def test_gradients_reach_experts_that_tokens_went_to_and_their_router() -> None:
    latents = prepare(moe(), small_plan(config=SMALL_MOE))
    latents.model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    latents.pull()
    experts = latents.blocks[f"{EXPERTS}.down_proj"]
    used = experts.latent.grad.flatten(1).any(-1)
    assert used.sum() > 4
    assert torch.equal(used, experts.scale_latent.grad.flatten(1).any(-1))
    for name in ("scale", "per_expert_scale", "proj.weight"):
        assert latents.trained[f"model.layers.1.router.{name}"].latent.grad.any()


def test_frozen_codes_of_experts_stand_still() -> None:
    latents = prepare(moe(), small_plan(config=SMALL_MOE))
    before = logits_of(latents.model)
    latents.freeze_codes()
    latents.decode()
    assert torch.equal(logits_of(latents.model), before)
    learned = [name for name, _ in latents.blocks[f"{EXPERTS}.down_proj"].named_parameters()]
    assert learned == [f"{EXPERTS}.down_proj.scale_latent"]


def test_training_gains_and_goes_on_from_what_was_packed(tmp_path: Path) -> None:
    settings = ("schedule.tokens=5120", "schedule.batch_size=8", "schedule.sequence_length=16", "schedule.lr=1e-3")
    plan = small_plan(*settings, "schedule.frozen_tail=0.4", config=SMALL_MOE)
    losses: list[float] = []
    latents = train(moe(), plan, small_corpus(), tmp_path / "run", on_step=lambda info: losses.append(info.loss))
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:2])
    trained = logits_of(latents.model.eval())
    packed = packed_of(latents, tmp_path)
    assert torch.equal(trained, logits_of(load_packed(packed)))
    again = prepare(load_packed(packed), plan_to_go_on(packed), start=packed)
    assert torch.equal(logits_of(again.model.eval()), trained)


# Files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    make_checkpoint(folder / "checkpoint", GEMMA4_MOE)
    model = weigh_experts(load_model(folder / "checkpoint"), 1)
    model.to(torch.bfloat16).save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


@pytest.mark.parametrize("recipe", ["q4_0", "q4_0-stock"])
def test_files_hold_the_codes_of_every_expert(recipe: str, checkpoint: Path, tmp_path: Path) -> None:
    packed = pack(checkpoint, tmp_path / "packed", recipe)
    for target, name in (("gguf", "model.gguf"), ("hf", "hf")):
        made = intaglio("export", packed.path, target, f"--out={tmp_path / name}")
        assert made.code == 0, made.err
        assert verify(packed, tmp_path / name).exact
    types = {
        t.name: (t.tensor_type.name, tuple(int(n) for n in t.shape)) for t in read_gguf(tmp_path / "model.gguf").tensors
    }
    assert types["blk.2.ffn_gate_up_exps.weight"] == ("Q4_0", (256, 128, 16))
    assert types["blk.2.ffn_down_exps.weight"] == ("Q4_0", (64, 256, 16))
    assert types["blk.2.ffn_gate_inp.weight"] == ("F32", (256, 16)) and types["blk.2.ffn_gate_inp.scale"][0] == "F32"
    assert {"blk.2.pre_ffw_norm_2.weight", "blk.2.post_ffw_norm_1.weight", "blk.2.ffn_down_exps.scale"} <= set(types)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ids = torch.randint(3, 4089, (1, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits_of(loaded, ids), logits_of(load_packed(packed), ids))


def test_a_changed_code_of_one_expert_is_found(checkpoint: Path, tmp_path: Path) -> None:
    packed = pack(checkpoint, tmp_path / "packed")
    assert intaglio("export", packed.path, "gguf", f"--out={tmp_path / 'model.gguf'}").code == 0
    tensor = next(t for t in read_gguf(tmp_path / "model.gguf").tensors if t.name == "blk.3.ffn_down_exps.weight")
    with open(tmp_path / "model.gguf", "r+b") as file:
        file.seek(int(tensor.data_offset) + int(tensor.n_bytes) - 1)
        file.write(bytes([int(tensor.data.reshape(-1)[-1]) ^ 0x10]))
    found = verify(packed, tmp_path / "model.gguf")
    assert found.differing_codes == 1 and not found.exact


def test_the_mobile_recipes_refuse_experts(checkpoint: Path) -> None:
    for recipe in ("mobile", "mobile-e2b"):
        with pytest.raises(RecipeError, match=r"recipe mobile.* has no grid for experts.*for example q4_0"):
            make_plan(checkpoint, recipe)


@pytest.mark.runtime
def test_llamacpp_computes_what_was_packed(checkpoint: Path, tmp_path: Path) -> None:
    """Measured: 7e-6 nats, nearly all of it in a twentieth of the tokens, and 8e-11 where llama.cpp computes in floats.

    So what is left is its 8-bit rounding of activations. The model before it was quantized is 1.5e-4 away.
    """
    from intaglio.measure.evaluate import Candidate, evaluate_many, transformers_source
    from intaglio.measure.llamacpp import LlamaCpp

    packed = pack(checkpoint, tmp_path / "packed")
    export_hf(packed, tmp_path / "hf")
    rules = [f"weights.{rule}.grid=f32" for rule in ("linear", "expert", "token_embedding")]
    floats = pack(tmp_path / "hf", tmp_path / "floats", Recipe.load("q4_0", rules))
    windows = torch.randint(3, 4089, (4, 64), generator=torch.Generator().manual_seed(0))

    def kl(model: nn.Module, shipped: PackedModel) -> float:
        export_gguf(shipped, tmp_path / "model.gguf", replace=True)
        with LlamaCpp(tmp_path / "model.gguf") as runtime:
            source = transformers_source(model)
            candidate = Candidate(source=runtime.logits, runtime="llama.cpp", simulated=False)
            return evaluate_many(source, {"": candidate}, windows)[""].kl_mean_nats

    found, original = kl(load_packed(packed), packed), kl(load_model(checkpoint), packed)
    assert found < 3e-5 and found < 0.2 * original
    assert kl(load_packed(packed), floats) < 1e-8
