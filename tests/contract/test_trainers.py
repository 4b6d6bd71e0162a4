"""A prepared model under other people's trainers: transformers' Trainer, PEFT's LoRA, and TRL's SFTTrainer.

The order that works with PEFT: `get_peft_model` first, then `prepare`. The adapters are merged into
the latents before these are quantized, so that what is trained is what ships. The other order would
train fq(W) x + B A x, which no packed weight computes, and is refused at the first forward.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from intaglio.train.attach import prepare
from intaglio.train.decode import StepWeights
from intaglio.train.modules import merged_latent
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from intaglio.errors import InputError
from intaglio.export.hf import export_hf
from intaglio.measure.simulate import decoded_model
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import Plan
from intaglio.train.pack import pack_model
from tests.support.tiny import TOKENIZER
from tests.support.training import small_corpus, small_model, small_plan

Q_PROJ = "layers.0.self_attn.q_proj"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CORPUS = small_corpus(sequences=16, length=12)
IDS = torch.from_numpy(CORPUS.tokens[:2]).long()


class Sequences(Dataset):
    """What a Trainer reads: token ids that are their own labels."""

    def __len__(self) -> int:
        return len(CORPUS.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(CORPUS.tokens[index]).long()
        return {"input_ids": ids, "labels": ids}


class Distiller(Trainer):
    """A Trainer with a loss of one's own: KL to a teacher."""

    teacher: nn.Module

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **rest: Any) -> Tensor:
        with torch.no_grad():
            target = self.teacher(input_ids=inputs["input_ids"]).logits.log_softmax(-1)
        log_q = model(input_ids=inputs["input_ids"]).logits.log_softmax(-1)
        return nn.functional.kl_div(log_q, target, log_target=True, reduction="batchmean")


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return small_model().requires_grad_(False)


def settings(folder: Path, **changes: Any) -> TrainingArguments:
    common = {"max_steps": 8, "learning_rate": 1e-3, "logging_steps": 1, "per_device_train_batch_size": 8}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "seed": 0}
    return TrainingArguments(output_dir=str(folder), **(common | quiet | changes))


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def assert_learned(trainer: Trainer) -> None:
    """The last epoch over a few random sequences goes better than the first."""
    found, steps = losses(trainer), len(CORPUS.tokens) // 8
    assert sum(found[-steps:]) < sum(found[:steps])


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def shipped_logits(model: nn.Module, plan: Plan, teacher: nn.Module, folder: Path) -> Tensor:
    """Logits of what `pack_model` wrote."""
    (folder / "assets").mkdir()
    pack_model(model, plan, folder / "packed", assets=folder / "assets")
    return logits_of(decoded_model(teacher, PackedModel.open(folder / "packed")))


# transformers' Trainer


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}, {"bf16": True}],
    ids=["plain", "checkpointing", "bf16"],
)
def test_trainer_trains_a_prepared_model_and_it_packs(changes: dict, teacher: nn.Module, tmp_path: Path) -> None:
    plan = small_plan()
    model = prepare(copy.deepcopy(teacher).requires_grad_(True), plan)
    before, scales = logits_of(model), model.get_submodule(f"model.{Q_PROJ}").quantizer.scale_latent.detach().clone()
    trainer = Trainer(model=model, args=settings(tmp_path / "run", **changes), train_dataset=Sequences())
    trainer.train()
    assert_learned(trainer)
    assert not torch.equal(model.get_submodule(f"model.{Q_PROJ}").quantizer.scale_latent, scales)
    with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in changes):
        after = logits_of(model.eval())
        assert not torch.equal(after, before)
        assert torch.equal(shipped_logits(model, plan, teacher, tmp_path), after)


def test_trainer_with_a_loss_of_its_own(teacher: nn.Module, tmp_path: Path) -> None:
    plan = small_plan()
    model = prepare(copy.deepcopy(teacher).requires_grad_(True), plan)
    trainer = Distiller(model=model, args=settings(tmp_path / "run", learning_rate=1e-4), train_dataset=Sequences())
    trainer.teacher = teacher
    trainer.train()
    assert_learned(trainer)
    assert torch.equal(shipped_logits(model, plan, teacher, tmp_path), logits_of(model.eval()))


def test_trainer_saves_a_prepared_model_and_goes_on_from_it(teacher: nn.Module, tmp_path: Path) -> None:
    def run(folder: str, **changes: Any) -> Trainer:
        model = prepare(copy.deepcopy(teacher).requires_grad_(True), small_plan())
        args = settings(tmp_path / folder, save_strategy="steps", save_steps=2, **changes)
        return Trainer(model=model, args=args, train_dataset=Sequences())

    whole, second = run("a"), run("b")
    whole.train()
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(second) == losses(whole)
    assert torch.equal(logits_of(second.model), logits_of(whole.model))


# PEFT


def with_lora(teacher: nn.Module, **changes: Any) -> PeftModel:
    """LoRA whose B is not zero, as if trained."""
    config = LoraConfig(**({"r": 4, "lora_alpha": 32, "target_modules": LINEARS, "lora_dropout": 0.0} | changes))
    model = get_peft_model(copy.deepcopy(teacher), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def adapted(model: PeftModel, path: str = Q_PROJ) -> Any:
    return model.get_submodule(f"base_model.model.model.{path}")


def test_lora_sees_the_merged_weight(teacher: nn.Module) -> None:
    model = prepare(with_lora(teacher), small_plan())
    layer, x = adapted(model), torch.randn(3, 256)
    merged = teacher.get_submodule(f"model.{Q_PROJ}").weight + layer.get_delta_weight("default")
    fq = layer.base_layer.quantizer
    assert torch.equal(layer(x), nn.functional.linear(x, fq(merged, torch.float32)))
    beside = fq(layer.base_layer.weight, torch.float32) + layer.get_delta_weight("default")
    assert (layer(x) - nn.functional.linear(x, beside)).abs().max() > 1e-3


def test_gradients_reach_adapters_and_scales_and_nothing_frozen(teacher: nn.Module) -> None:
    model = prepare(with_lora(teacher), small_plan())
    model(input_ids=IDS).logits.square().mean().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.rpartition("self_attn.q_proj.")[2] for name in learning if f"{Q_PROJ}." in name} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
        "base_layer.quantizer.scale_latent",
    }
    assert all("lora_" in name or name.endswith("scale_latent") for name in learning)


def test_the_gradient_of_b_is_that_of_the_merged_weight(teacher: nn.Module) -> None:
    layer, x = adapted(prepare(with_lora(teacher), small_plan())), torch.randn(3, 256)
    layer(x).sin().sum().backward()
    merged = merged_latent(layer).detach().requires_grad_()
    nn.functional.linear(x, layer.base_layer.quantizer(merged, torch.float32)).sin().sum().backward()
    by_b = layer.scaling["default"] * merged.grad @ layer.lora_A["default"].weight.T
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, by_b, rtol=1e-4, atol=1e-6)


def test_a_lora_model_trains_packs_and_loads_as_a_checkpoint(teacher: nn.Module, tmp_path: Path) -> None:
    plan = small_plan()
    model = prepare(with_lora(teacher), plan)
    trainer = Trainer(model=model, args=settings(tmp_path / "run"), train_dataset=Sequences())
    trainer.train()
    assert_learned(trainer)
    trained = logits_of(model.eval())
    assert torch.equal(shipped_logits(model, plan, teacher, tmp_path), trained)
    export_hf(PackedModel.open(tmp_path / "packed"), tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert torch.equal(logits_of(loaded), trained)


def test_a_tied_head_is_quantized_beside_frozen_weights(teacher: nn.Module) -> None:
    model = prepare(with_lora(teacher), small_plan())
    embedding = model.get_input_embeddings()
    decoded = embedding.quantizer.compute(embedding.weight)[0]
    head = model.get_output_embeddings()
    assert torch.equal(head(torch.eye(256)), decoded.T)


def test_a_cache_does_not_hide_adapters(teacher: nn.Module) -> None:
    model = prepare(with_lora(teacher), small_plan())
    expected = logits_of(model)
    StepWeights(model).decode(torch.float32)
    assert torch.equal(logits_of(model), expected)
    StepWeights(model).drop()


def test_disabled_and_merged_adapters_mean_what_they_mean_to_peft(teacher: nn.Module) -> None:
    plan = small_plan()
    model, plain = prepare(with_lora(teacher), plan), prepare(copy.deepcopy(teacher), plan)
    both, alone = logits_of(model), logits_of(plain)
    assert not torch.equal(both, alone)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), alone)
    model.merge_adapter()
    assert torch.equal(logits_of(model), both)
    model.unmerge_adapter()
    torch.testing.assert_close(logits_of(model), both, rtol=0, atol=0.5)  # W + BA - BA is not quite W
    merged = model.merge_and_unload()
    assert torch.equal(logits_of(merged), both)


def test_several_adapters_are_merged_as_far_as_they_are_active(teacher: nn.Module, tmp_path: Path) -> None:
    bare = with_lora(teacher)
    bare.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model = prepare(bare, small_plan())
    first = logits_of(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits_of(model)
    assert not torch.equal(first, both)
    assert torch.equal(shipped_logits(model, small_plan(), teacher, tmp_path), both)


# What would silently be something else


def test_adapters_around_a_prepared_model_are_refused(teacher: nn.Module, tmp_path: Path) -> None:
    plan = small_plan()
    prepared = prepare(copy.deepcopy(teacher), plan)
    logits_of(prepared)
    model = get_peft_model(prepared, LoraConfig(r=4, target_modules=["q_proj"]))
    message = r"q_proj: adapted after prepare\(\): call get_peft_model\(\) first"
    with pytest.raises(InputError, match=message):
        logits_of(model)
    with pytest.raises(InputError, match=message):
        pack_model(model, plan, tmp_path / "packed", assets=tmp_path)
    assert not list(tmp_path.iterdir())


def test_adapters_added_later_on_other_layers_are_refused(teacher: nn.Module) -> None:
    model = prepare(with_lora(teacher, target_modules=["q_proj"]), small_plan())
    model.add_adapter("late", LoraConfig(r=4, target_modules=["up_proj"]))
    with pytest.raises(InputError, match="up_proj: adapted after prepare"):
        logits_of(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_dropout": 0.1}, "more than W"),
        ({"use_dora": True}, "more than W"),
        ({"lora_bias": True}, "more than W"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens: cannot be adapted.*leave it out of target_modules"),
        ({"target_modules": "all-linear"}, "per_layer_model_projection: cannot be adapted"),
    ],
    ids=["dropout", "DoRA", "bias", "embedding", "a float leftover"],
)
def test_adapters_that_no_quantized_weight_holds_are_refused(changes: dict, message: str, teacher: nn.Module) -> None:
    model = with_lora(teacher, **changes)
    with pytest.raises(InputError, match=message):
        prepare(model, small_plan())


def test_adapters_on_weights_that_the_recipe_does_not_train_are_refused(teacher: nn.Module) -> None:
    with pytest.raises(InputError, match="cannot be adapted"):
        prepare(with_lora(teacher), small_plan("weights.linear.trainable=false"))


def test_all_linears_but_the_float_one_can_be_adapted(teacher: nn.Module) -> None:
    model = with_lora(teacher, target_modules="all-linear", exclude_modules=["per_layer_model_projection"])
    assert adapted(prepare(model, small_plan()), "layers.0.per_layer_input_gate").lora_A


# TRL


def test_sft_trainer_trains_a_prepared_model_and_it_packs(teacher: nn.Module, tmp_path: Path) -> None:
    from datasets import Dataset as Table
    from trl import SFTConfig, SFTTrainer

    plan = small_plan()
    model = prepare(copy.deepcopy(teacher).requires_grad_(True), plan)
    before = logits_of(model)
    table = Table.from_dict({"input_ids": CORPUS.tokens.tolist()})
    common = {"max_steps": 8, "learning_rate": 1e-3, "logging_steps": 1, "per_device_train_batch_size": 8}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "seed": 0, "bf16": False}
    args = SFTConfig(output_dir=str(tmp_path / "run"), max_length=None, **common, **quiet)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    trainer = SFTTrainer(model=model, args=args, train_dataset=table, processing_class=tokenizer)
    trainer.train()
    assert_learned(trainer)
    after = logits_of(model.eval())
    assert not torch.equal(after, before)
    assert torch.equal(shipped_logits(model, plan, teacher, tmp_path), after)
