"""A prepared model under other people's trainers: transformers' Trainer, accelerate, PEFT's LoRA, TRL's SFTTrainer.

The order that works with PEFT: `get_peft_model` first, then `prepare`. The adapters are merged into the latents before
these are quantized, so that the trained weight is the one that ships. The other order would train fq(W) x + B A x,
which no packed weight computes, and is refused at the first optimizer step.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from intaglio.errors import InputError, MismatchError
from intaglio.formats.checkpoint.write import export_hf
from intaglio.measure.simulate import decoded_model
from intaglio.packed.model import PackedModel
from intaglio.train.grid_optimizer import GridOptimizer
from intaglio.train.latent import BlockLatent
from intaglio.train.latents import Latents, prepare
from intaglio.train.pack import pack_model
from intaglio.train.student import cast_weights
from tests.support.tiny import TOKENIZER
from tests.support.training import plain_fake_quantize, small_corpus, small_model, small_plan

Q_PROJ = "layers.0.self_attn.q_proj"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CORPUS = small_corpus(sequences=16, length=12)
IDS = torch.from_numpy(CORPUS.tokens[:2]).long()


class Sequences(Dataset):
    """A Trainer's dataset: token ids that are their own labels."""

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


def ready(teacher: nn.Module, *overrides: str, dtype: torch.dtype = torch.float32) -> Latents:
    """The teacher's copy, prepared."""
    model: Any = copy.deepcopy(teacher).requires_grad_(True)
    cast_weights(model, dtype)
    return prepare(model, small_plan(*overrides))


def trainer_of(latents: Latents, args: TrainingArguments, kind: type[Trainer] = Trainer, **more: Any) -> Trainer:
    optimizer = GridOptimizer(latents, torch.optim.AdamW, lr=args.learning_rate)
    return kind(model=latents.model, args=args, **({"train_dataset": Sequences()} | more), optimizers=(optimizer, None))


def pack_into(latents: Latents, folder: Path) -> PackedModel:
    (folder / "assets").mkdir(exist_ok=True)
    pack_model(latents, folder / "packed", assets=folder / "assets")
    return PackedModel.open(folder / "packed")


def shipped_logits(latents: Latents, teacher: nn.Module, folder: Path) -> Tensor:
    """Logits of the packed model, in the dtype of the trained one."""
    shipped = decoded_model(teacher, pack_into(latents, folder))
    cast_weights(shipped, latents.model.dtype)
    return logits_of(shipped)


# transformers' Trainer


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.float32),
        ({"gradient_checkpointing": True, "gradient_accumulation_steps": 2}, torch.float32),
        ({"bf16": True}, torch.float32),
        ({}, torch.bfloat16),
    ],
    ids=["plain", "checkpointing", "autocast", "bfloat16 model"],
)
def test_trainer_trains_a_prepared_model_and_it_packs(
    changes: dict, dtype: torch.dtype, teacher: nn.Module, tmp_path: Path
) -> None:
    latents = ready(teacher, dtype=dtype)
    scales = latents.blocks[f"model.{Q_PROJ}.weight"].scale_latent
    before, first = logits_of(latents.model), scales.detach().clone()
    trainer = trainer_of(latents, settings(tmp_path / "run", **changes))
    trainer.train()
    assert_learned(trainer)
    assert not torch.equal(scales, first)
    with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in changes):
        after = logits_of(latents.model.eval())
        assert not torch.equal(after, before)
        assert torch.equal(shipped_logits(latents, teacher, tmp_path), after)


def test_trainer_with_a_loss_of_its_own(teacher: nn.Module, tmp_path: Path) -> None:
    latents = ready(teacher)
    trainer = trainer_of(latents, settings(tmp_path / "run", learning_rate=1e-4), Distiller)
    trainer.teacher = teacher
    trainer.train()
    assert_learned(trainer)
    assert torch.equal(shipped_logits(latents, teacher, tmp_path), logits_of(latents.model.eval()))


def test_trainer_s_schedule_moves_the_rates_of_the_wrapped_optimizer(teacher: nn.Module, tmp_path: Path) -> None:
    trainer = trainer_of(ready(teacher), settings(tmp_path / "run", lr_scheduler_type="linear", max_steps=4))
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_trainer_saves_a_prepared_model_and_goes_on_from_it(teacher: nn.Module, tmp_path: Path) -> None:
    def run(folder: str) -> Trainer:
        return trainer_of(ready(teacher), settings(tmp_path / folder, save_strategy="steps", save_steps=2))

    whole, second = run("a"), run("b")
    whole.train()
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(second) == losses(whole)
    assert torch.equal(logits_of(second.model), logits_of(whole.model))


def test_a_trainer_with_an_optimizer_of_its_own_is_refused_at_packing(teacher: nn.Module, tmp_path: Path) -> None:
    """The likeliest mistake: the weights move off the grid, and the latents stand still."""
    latents = ready(teacher)
    Trainer(model=latents.model, args=settings(tmp_path / "run", max_steps=1), train_dataset=Sequences()).train()
    with pytest.raises(MismatchError, match="train it with GridOptimizer in the place of another optimizer"):
        pack_into(latents, tmp_path)
    assert not (tmp_path / "packed").exists()


# A loop of one's own


def test_a_loop_with_accelerate_trains_and_packs(teacher: nn.Module, tmp_path: Path) -> None:
    latents = ready(teacher)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = torch.utils.data.DataLoader(Sequences(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(latents.model, GridOptimizer(latents, lr=1e-3), loader)
    found = []
    for _ in range(3):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            found.append(float(loss.detach()))
    assert sum(found[-4:]) < sum(found[:4])
    assert torch.equal(shipped_logits(latents, teacher, tmp_path), logits_of(latents.model.eval()))


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adafactor], ids=lambda c: c.__name__
)
def test_any_torch_optimizer_can_be_wrapped(
    optimizer_class: type[torch.optim.Optimizer], teacher: nn.Module, tmp_path: Path
) -> None:
    latents = ready(teacher)
    optimizer = GridOptimizer(latents, optimizer_class, lr=1e-3)
    before = logits_of(latents.model)
    for _ in range(2):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = latents.model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            return loss

        assert float(optimizer.step(closure)) > 0
    assert not torch.equal(logits_of(latents.model), before)
    assert torch.equal(shipped_logits(latents, teacher, tmp_path), logits_of(latents.model))


def test_an_optimizer_s_state_of_another_model_is_refused(teacher: nn.Module) -> None:
    state = GridOptimizer(ready(teacher), lr=1e-3).state_dict()
    other = ready(teacher, "weights.ple_embedding.trainable=true")
    with pytest.raises(InputError, match=r"embed_tokens_per_layer\.weight.*resume with the recipe"):
        GridOptimizer(other, lr=1e-3).load_state_dict(state)


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


def latent_of(latents: Latents, path: str = Q_PROJ) -> BlockLatent:
    return latents.blocks[f"model.{path}.weight"]


def test_lora_sees_the_merged_weight(teacher: nn.Module) -> None:
    latents = prepare(with_lora(teacher), small_plan())
    layer, x = adapted(latents.model), torch.randn(3, 256)
    merged = teacher.get_submodule(f"model.{Q_PROJ}").weight + layer.get_delta_weight("default")
    latent = latent_of(latents)
    torch.testing.assert_close(latent.merged(), merged)
    values, _ = latent.compute()
    assert torch.equal(layer(x), nn.functional.linear(x, values))
    with latents.model.disable_adapter():
        beside = latent.compute()[0] + layer.get_delta_weight("default")
    assert (layer(x) - nn.functional.linear(x, beside)).abs().max() > 1e-3


def test_gradients_reach_adapters_and_scales_and_nothing_frozen(teacher: nn.Module) -> None:
    latents = prepare(with_lora(teacher), small_plan())
    latents.model(input_ids=IDS).logits.square().mean().backward()
    learning = {name for name, p in latents.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name for name in learning if f"{Q_PROJ}." in name} == {
        f"model.{Q_PROJ}.lora_A.default.weight",
        f"model.{Q_PROJ}.lora_B.default.weight",
        f"model.{Q_PROJ}.weight.scale_latent",
    }
    before = {name: latent.latent.detach().clone() for name, latent in latents.trained.items()}
    GridOptimizer(latents, lr=1e-2).step()
    adapted_names = {name for name, latent in latents.blocks.items() if latent.adapter is not None}
    assert adapted_names
    assert all(torch.equal(latents.trained[name].latent, before[name]) for name in adapted_names)


@pytest.mark.parametrize("backwards", [1, 2])
def test_gradients_of_a_and_b_are_those_of_the_merged_weight(backwards: int, teacher: nn.Module) -> None:
    latents = prepare(with_lora(teacher), small_plan())
    layer, latent = adapted(latents.model), latent_of(latents)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    parts = [torch.randn(3, 256, generator=torch.Generator().manual_seed(i)) for i in range(backwards)]
    for x in parts:
        layer(x).sin().sum().backward()
    base, z = latent.latent.detach(), latent.scale_latent.detach().clone().requires_grad_()
    plain_a, plain_b = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    merged = base + layer.scaling["default"] * plain_b @ plain_a
    values = plain_fake_quantize("canonical", latent.grid, merged, z, torch.zeros(0))
    sum(nn.functional.linear(x, values).sin().sum() for x in parts).backward()
    for ours, plain in ((a, plain_a), (b, plain_b), (latent.scale_latent, z)):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-3, atol=1e-5)


def test_a_lora_model_trains_packs_and_loads_as_a_checkpoint(teacher: nn.Module, tmp_path: Path) -> None:
    latents = prepare(with_lora(teacher), small_plan())
    trainer = trainer_of(latents, settings(tmp_path / "run"))
    trainer.train()
    assert_learned(trainer)
    trained = logits_of(latents.model.eval())
    assert torch.equal(shipped_logits(latents, teacher, tmp_path), trained)
    export_hf(PackedModel.open(tmp_path / "packed"), tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert torch.equal(logits_of(loaded), trained)


def test_a_lora_model_goes_on_from_a_trainer_s_checkpoint(teacher: nn.Module, tmp_path: Path) -> None:
    def run(folder: str) -> Trainer:
        latents = prepare(with_lora(teacher), small_plan())
        return trainer_of(latents, settings(tmp_path / folder, save_strategy="steps", save_steps=2, max_steps=4))

    whole, second = run("a"), run("b")
    whole.train()
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(second) == losses(whole)
    assert torch.equal(logits_of(second.model), logits_of(whole.model))


def test_a_plain_optimizer_over_adapters_is_refused_at_packing(teacher: nn.Module, tmp_path: Path) -> None:
    latents = prepare(with_lora(teacher), small_plan())
    adapters = [p for name, p in latents.model.named_parameters() if "lora_" in name]
    latents.model(input_ids=IDS).logits.square().mean().backward()
    torch.optim.SGD(adapters, lr=1.0).step()
    with pytest.raises(MismatchError, match="train it with GridOptimizer"):
        pack_into(latents, tmp_path)


def test_disabled_and_merged_adapters_mean_what_they_mean_to_peft(teacher: nn.Module, tmp_path: Path) -> None:
    latents = prepare(with_lora(teacher), small_plan())
    model, plain = latents.model, ready(teacher).model
    both, alone = logits_of(model), logits_of(plain)
    assert not torch.equal(both, alone)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), alone)
    assert torch.equal(logits_of(model), both)
    model.merge_adapter()
    assert torch.equal(logits_of(model), both)
    model.unmerge_adapter()
    torch.testing.assert_close(logits_of(model), both, rtol=0, atol=0.5)  # W + BA - BA is not quite W
    merged = model.merge_and_unload()
    assert torch.equal(logits_of(merged), both)
    assert torch.equal(shipped_logits(latents, teacher, tmp_path), both)


@pytest.mark.parametrize("forward", [True, False], ids=["after a forward", "at once"])
def test_several_adapters_are_merged_as_far_as_they_are_active(
    forward: bool, teacher: nn.Module, tmp_path: Path
) -> None:
    bare = with_lora(teacher)
    bare.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    latents = prepare(bare, small_plan())
    first = logits_of(latents.model)
    latents.model.base_model.set_adapter(["default", "second"])
    if forward:
        assert not torch.equal(first, logits_of(latents.model))
    packed = shipped_logits(latents, teacher, tmp_path)
    assert torch.equal(packed, logits_of(latents.model))


# What would silently be something else

LATER = {
    "LoRA": LoraConfig(r=4, target_modules=["q_proj"]),
    "IA3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "layer norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "LoHa": peft.LoHaConfig(target_modules=["q_proj"]),
    "modules_to_save": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", LATER)
def test_adapters_around_a_prepared_model_are_refused(kind: str, teacher: nn.Module, tmp_path: Path) -> None:
    latents = ready(teacher)
    latents.model = get_peft_model(latents.model, LATER[kind])
    message = r"adapted after prepare\(\): call get_peft_model\(\) first|plan does not hold|prompt tuning"
    with pytest.raises(InputError, match=message):
        GridOptimizer(latents, lr=1e-3).step()
    with pytest.raises(InputError, match=message):
        pack_into(latents, tmp_path)
    assert not (tmp_path / "packed").exists()


def test_adapters_put_into_the_model_are_found_through_the_latents(teacher: nn.Module) -> None:
    """The PeftModel is another object; what it did to the layers inside is seen all the same."""
    latents = ready(teacher)
    get_peft_model(latents.model, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"q_proj: adapted after prepare\(\)"):
        GridOptimizer(latents, lr=1e-3).step()


def test_adapters_added_later_on_other_layers_are_refused(teacher: nn.Module) -> None:
    latents = prepare(with_lora(teacher, target_modules=["q_proj"]), small_plan())
    latents.model.add_adapter("late", LoraConfig(r=4, target_modules=["up_proj"]))
    with pytest.raises(InputError, match="up_proj: adapted after prepare"):
        GridOptimizer(latents, lr=1e-3).step()


def test_adapters_cannot_be_prepared_twice(teacher: nn.Module) -> None:
    latents = prepare(with_lora(teacher), small_plan())
    with pytest.raises(InputError, match="prepared already: go on with the latents"):
        prepare(latents.model, small_plan())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("attribute", ["bias", "gain"])
def test_an_added_parameter_is_refused(when: str, attribute: str, teacher: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(teacher).requires_grad_(True)
    latents = prepare(model, small_plan()) if when == "after" else None
    model.get_submodule(f"model.{Q_PROJ}").register_parameter(attribute, nn.Parameter(torch.ones(256)))
    with pytest.raises(InputError, match=rf"q_proj\.{attribute}: a parameter that the plan does not hold"):
        pack_into(latents, tmp_path) if latents else prepare(model, small_plan())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_dropout": 0.1}, "more than W"),
        ({"use_dora": True}, "more than W"),
        ({"lora_bias": True}, "more than W"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens: cannot be adapted.*leave it out of target_modules"),
        ({"target_modules": "all-linear"}, "per_layer_model_projection: cannot be adapted"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens: wrapped by PEFT's ModulesToSaveWrapper"),
        ({"modules_to_save": ["lm_head"]}, "lm_head: wrapped by PEFT's ModulesToSaveWrapper"),
        ({"modules_to_save": ["input_layernorm"]}, "input_layernorm: wrapped by PEFT's ModulesToSaveWrapper"),
        ({"trainable_token_indices": [5, 6]}, "embed_tokens: wrapped by PEFT's TrainableTokensWrapper"),
        ({"bias": "all", "use_rslora": True}, None),
    ],
    ids=[
        "dropout", "DoRA", "bias", "embedding", "a float leftover", "a saved embedding", "a saved head", "saved norms",
        "tokens", "no bias to train",
    ],
)  # fmt: skip
def test_adapters_that_no_quantized_weight_holds_are_refused(
    changes: dict, message: str | None, teacher: nn.Module
) -> None:
    model = with_lora(teacher, **changes)
    if message is None:
        assert latent_of(prepare(model, small_plan())).adapter
        return
    with pytest.raises(InputError, match=message):
        prepare(model, small_plan())


OTHERS = {
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ln_tuning": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "vera": peft.VeraConfig(target_modules=["q_proj"]),
    "loha": peft.LoHaConfig(target_modules=["q_proj"]),
    "lokr": peft.LoKrConfig(target_modules=["q_proj"]),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=32),
    "boft": peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4),
    "adalora": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "hra": peft.HRAConfig(target_modules=["q_proj"]),
    "fourierft": peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=10),
    "vblora": peft.VBLoRAConfig(target_modules=["q_proj"], vector_length=64, num_vectors=16),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prompt tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_than_lora_are_refused_by_name(kind: str, teacher: nn.Module) -> None:
    model = get_peft_model(copy.deepcopy(teacher), OTHERS[kind])
    with pytest.raises(InputError, match=rf"{kind}.*expected plain LoRA"):
        prepare(model, small_plan())


def test_adapters_on_weights_that_the_recipe_does_not_train_are_refused(teacher: nn.Module) -> None:
    with pytest.raises(InputError, match="cannot be adapted"):
        prepare(with_lora(teacher), small_plan("weights.linear.trainable=false"))


def test_all_linears_but_the_float_one_can_be_adapted(teacher: nn.Module) -> None:
    model = with_lora(teacher, target_modules="all-linear", exclude_modules=["per_layer_model_projection"])
    assert latent_of(prepare(model, small_plan()), "layers.0.per_layer_input_gate").adapter


# TRL


def test_sft_trainer_trains_a_prepared_model_and_it_packs(teacher: nn.Module, tmp_path: Path) -> None:
    from datasets import Dataset as Table
    from trl import SFTConfig, SFTTrainer

    latents = ready(teacher)
    before = logits_of(latents.model)
    table = Table.from_dict({"input_ids": CORPUS.tokens.tolist()})
    common = {"max_steps": 8, "learning_rate": 1e-3, "logging_steps": 1, "per_device_train_batch_size": 8}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "seed": 0, "bf16": False}
    args = SFTConfig(output_dir=str(tmp_path / "run"), max_length=None, **common, **quiet)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    trainer = trainer_of(latents, args, SFTTrainer, train_dataset=table, processing_class=tokenizer)
    trainer.train()
    assert_learned(trainer)
    after = logits_of(latents.model.eval())
    assert not torch.equal(after, before)
    assert torch.equal(shipped_logits(latents, teacher, tmp_path), after)
