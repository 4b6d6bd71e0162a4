"""Models of PEFT and of other hands in training: packed with the forward's values, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from intaglio.errors import IntaglioError
from intaglio.packed.checkpoint import load_model
from intaglio.packed.decoded import load_packed
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import make_plan
from intaglio.train.latents import prepare
from intaglio.train.pack import pack_model
from tests.support.strange import IDS
from tests.support.tiny import GEMMA4, make_checkpoint

PACKED = "packed"
MORE, COPY, NONE_OF_OURS = "is more than W \\+ BA", "trains a copy beside", "cannot be trained on a grid"
BEHIND, ELSE, PLANNED = "changed or cast behind them", "computes something else", "but not in this model"


class Trained(NamedTuple):
    """before, after: what is done to a model before it is prepared, and after. right, found: as in `Input`."""

    before: Callable[[Any], Any]
    right: str
    found: str = "right"
    after: Callable[[Any], Any] = lambda model: None


def lora(**more: Any) -> Callable[[Any], Any]:
    config: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    return lambda model: get_peft_model(model, LoraConfig(**config | more))


def other(make: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda model: get_peft_model(model, make())


def two(*active: str) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        adapted = lora()(model)
        adapted.add_adapter("second", LoraConfig(r=2, target_modules=["down_proj"]))
        adapted.base_model.set_adapter(list(active))
        return adapted

    return make


def done(*calls: Callable[[Any], Any], first: Callable[[Any], Any] = lambda model: model) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        model = first(model)
        for call in calls:
            call(model)
        return model

    return make


def scale(factor: float) -> Callable[[Any], Any]:
    return lambda model: [layer.scale_layer(factor) for layer in model.modules() if hasattr(layer, "scale_layer")]


PLAIN = done()
ONE = ["q_proj"]
CASES: dict[str, Trained] = {
    "LoRA": Trained(lora(), PACKED),
    "rank-stabilized": Trained(lora(use_rslora=True), PACKED),
    "ranks by module": Trained(lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 16}), PACKED),
    "some layers": Trained(lora(layers_to_transform=[1]), PACKED),
    "PiSSA": Trained(lora(init_lora_weights="pissa"), PACKED),
    "OLoRA": Trained(lora(init_lora_weights="olora"), PACKED),
    "biases that are not there": Trained(lora(bias="all"), PACKED),
    "a second that rests": Trained(two("default"), PACKED),
    "two at once": Trained(two("default", "second"), PACKED),
    "scaled": Trained(done(scale(0.5), first=lora()), PACKED),
    "merged": Trained(done(lambda model: model.base_model.merge_adapter(), first=lora()), PACKED),
    "switched off": Trained(done(lambda model: model.base_model.disable_adapter_layers(), first=lora()), PACKED),
    "switched later": Trained(two("default"), PACKED, after=lambda model: model.set_adapter("second")),
    "merged later": Trained(lora(), PACKED, after=lambda model: model.merge_adapter()),
    "scaled later": Trained(lora(), BEHIND, after=scale(3.0)),
    "added later": Trained(PLAIN, "adapted after prepare", after=lora()),
    "DoRA": Trained(lora(use_dora=True), MORE),
    "a bias of its own": Trained(lora(lora_bias=True), MORE),
    "dropout": Trained(lora(lora_dropout=0.1), MORE),
    "a head to save": Trained(lora(modules_to_save=["lm_head"]), COPY),
    "some tokens": Trained(lora(trainable_token_indices=[5, 6]), COPY),
    "embeddings": Trained(lora(target_modules=["embed_tokens"]), "cannot be adapted"),
    "every linear": Trained(lora(target_modules="all-linear"), "per_layer_model_projection: cannot be adapted"),
    "parameters": Trained(lora(target_modules=[], target_parameters=["mlp.up_proj.weight"]), NONE_OF_OURS),
    "IA3": Trained(other(lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])), NONE_OF_OURS),
    "LoHa": Trained(other(lambda: peft.LoHaConfig(target_modules=ONE)), NONE_OF_OURS),
    "LoKr": Trained(other(lambda: peft.LoKrConfig(target_modules=ONE)), NONE_OF_OURS),
    "VeRA": Trained(other(lambda: peft.VeraConfig(target_modules=ONE)), NONE_OF_OURS),
    "HRA": Trained(other(lambda: peft.HRAConfig(target_modules=ONE)), NONE_OF_OURS),
    "MiSS": Trained(other(lambda: peft.MissConfig(target_modules=ONE)), NONE_OF_OURS),
    "AdaLoRA": Trained(other(lambda: peft.AdaLoraConfig(target_modules=ONE, total_step=10)), NONE_OF_OURS),
    "norms": Trained(
        other(lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"])), NONE_OF_OURS
    ),
    "prompts": Trained(
        other(lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)), "prompt tuning adds inputs"
    ),
    "a hook": Trained(
        done(lambda m: m.model.layers[1].mlp.register_forward_hook(lambda module, inputs, found: found * 1.01)), ELSE
    ),
    "an added bias": Trained(
        done(lambda m: setattr(m.model.layers[0].mlp.up_proj, "bias", nn.Parameter(torch.ones(256)))),
        "up_proj.bias: a parameter that the plan does not hold",
    ),
    "a sequence in a module's place": Trained(
        done(lambda m: setattr(m.model.layers[0], "mlp", nn.Sequential(m.model.layers[0].mlp))), PLANNED
    ),
    "a weight changed later": Trained(
        PLAIN, BEHIND, after=lambda m: m.model.layers[0].mlp.up_proj.weight.data.mul_(1.1)
    ),
    "a softcap changed later": Trained(PLAIN, ELSE, after=lambda m: setattr(m.config, "final_logit_softcapping", 9.0)),
    "tokens added": Trained(done(lambda m: m.resize_token_embeddings(4100)), "planned as"),
    "tokens added later": Trained(
        PLAIN, "prepared as .* resized", "traceback", lambda model: model.resize_token_embeddings(4100)
    ),
    "a layer removed later": Trained(
        PLAIN, "no longer in the model", "traceback", lambda m: setattr(m.model, "layers", m.model.layers[:3])
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("strange") / "base", GEMMA4)


@pytest.mark.parametrize("name", CASES)
def test_adapters(name: str, checkpoint: Path, tmp_path: Path) -> None:
    case, generator = CASES[name], torch.Generator().manual_seed(0)
    model = case.before(load_model(checkpoint))
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    try:
        latents = prepare(model, make_plan(checkpoint, "q4_0"))
        case.after(model)
        pack_model(latents, tmp_path / "packed", assets=checkpoint)
    except IntaglioError as error:
        assert case.right != PACKED, error
        assert re.search(case.right, str(error)), error
        return
    assert case.right == PACKED
    with torch.no_grad():
        trained, packed = model(input_ids=IDS).logits, load_packed(PackedModel.open(tmp_path / "packed"))(IDS).logits
    assert torch.equal(trained, packed)
