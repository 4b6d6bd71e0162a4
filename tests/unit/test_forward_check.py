"""Before a model is packed it must compute what its weights and scales alone would."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn

from intaglio.errors import MismatchError
from intaglio.packed.model import PackedModel
from intaglio.train.grid_optimizer import GridOptimizer
from intaglio.train.latents import Latents, prepare
from intaglio.train.pack import pack_model
from intaglio.train.static import put_scales
from intaglio.train.student import cast_weights
from tests.support.training import small_model, small_plan

GATE, NORM = "model.layers.1.mlp.gate_proj", "model.layers.0.post_attention_layernorm"


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return small_model()


def ready(teacher: nn.Module, dtype: torch.dtype = torch.float32, recipe: str = "q4_0") -> Latents:
    model: Any = copy.deepcopy(teacher).requires_grad_(True)
    cast_weights(model, dtype)
    plan = small_plan(recipe=recipe)
    latents = prepare(model, plan)
    put_scales(model, plan, {scale.name: 0.05 for scale in plan.static_scales if scale.owned})
    return latents


def pack(latents: Latents, folder: Path) -> PackedModel:
    pack_model(latents, folder / "packed", assets=folder)
    return PackedModel.open(folder / "packed")


def hook(model: Any, path: str = GATE, factor: float = 1.05) -> None:
    model.get_submodule(path).register_forward_hook(lambda module, inputs, output: output * factor)


def hook_input(model: Any) -> None:
    model.get_submodule(GATE).register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1,))


def patch(model: Any) -> None:
    norm = model.get_submodule(NORM)
    norm.forward = lambda x: type(norm).forward(norm, x) + 0.1


def patch_whole(model: Any) -> None:
    plain = model.forward
    model.forward = lambda **inputs: types.SimpleNamespace(logits=plain(**inputs).logits * 1.1)


def replace_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def add_module(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.act_fn = nn.Sequential(mlp.act_fn, nn.Tanh())


def drop_always(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, i, o: nn.functional.dropout(o, 0.1, True))


def other_cap(model: Any) -> None:
    model.config.final_logit_softcapping = 5.0


def other_window(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 0.5


def fail(model: Any) -> None:
    def broken(*inputs: Any, **named: Any) -> Any:
        raise RuntimeError("not while it is packed")

    model.get_submodule(GATE).forward = broken


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "a hook": (hook, rf"^{GATE}: computes something else"),
    "a hook by a thousandth": (lambda model: hook(model, factor=1.001), rf"^{GATE}: computes something else"),
    "a hook before": (hook_input, rf"^{GATE}: "),
    "a patched forward": (patch, rf"^{NORM}: "),
    "a patched forward of the whole": (patch_whole, r"^Gemma4ForCausalLM: "),
    "another activation": (replace_activation, r"^model\.layers\.1\.mlp\.act_fn: "),
    "an added module": (add_module, r"^model\.layers\.1\.mlp\.act_fn: "),
    "dropout that never ends": (drop_always, r"^model\.layers\.1\.mlp\.down_proj: "),
    "another cap": (other_cap, r"^Gemma4ForCausalLM: "),
    "another scale of attention": (other_window, r"^model\.layers\.0\.self_attn"),
    "a forward that fails": (fail, "cannot run a text of 24 tokens.*RuntimeError: not while it is packed"),
}


@pytest.mark.parametrize("recipe", ["q4_0", "mobile"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_no_packed_model_holds_stops_it(name: str, recipe: str, teacher: nn.Module, tmp_path: Path) -> None:
    latents = ready(teacher, recipe=recipe)
    change, message = CHANGES[name]
    change(latents.model)
    with pytest.raises(MismatchError, match=message):
        pack(latents, tmp_path)
    assert not (tmp_path / "packed").exists()


def test_a_hook_in_bfloat16_stops_it(teacher: nn.Module, tmp_path: Path) -> None:
    latents = ready(teacher, torch.bfloat16)
    hook(latents.model, factor=1.05)
    with pytest.raises(MismatchError, match=GATE):
        pack(latents, tmp_path)


def add_dropout(latents: Latents) -> None:
    mlp = latents.model.model.layers[1].mlp
    mlp.act_fn = nn.Sequential(mlp.act_fn, nn.Dropout(0.5))


def compile_layers(latents: Latents) -> None:
    for layer in latents.model.model.layers:
        layer.compile()
    latents.model.compile()


@pytest.fixture(autouse=True)
def no_accelerator_before() -> Iterator[None]:
    """accelerate keeps one state a process; another test's, of another precision, would be refused."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def autocast(latents: Latents) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    accelerator.prepare(latents.model, GridOptimizer(latents, lr=1e-3))


def eager_attention(latents: Latents) -> None:
    latents.model.set_attn_implementation("eager")


def sum_in_another_order(latents: Latents) -> None:
    """Fused kernels, such as Liger's, do this."""
    linear = latents.model.get_submodule(GATE)
    linear.forward = lambda x: (x.double() @ linear.weight.double().T).to(x.dtype)


def checkpointing(latents: Latents) -> None:
    latents.model.gradient_checkpointing_enable()
    latents.model.train()


def see(latents: Latents) -> None:
    latents.model.get_submodule(GATE).register_forward_hook(lambda module, inputs, output: None)


@pytest.mark.parametrize(
    "change",
    [add_dropout, compile_layers, autocast, eager_attention, sum_in_another_order, checkpointing, see],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_computes_the_same_is_packed(
    change: Callable[[Latents], None], dtype: torch.dtype, teacher: nn.Module, tmp_path: Path
) -> None:
    latents = ready(teacher, dtype)
    change(latents)
    modes = [module.training for module in latents.model.modules()]
    assert pack(latents, tmp_path).plan.recipe.name == "q4_0"
    assert [module.training for module in latents.model.modules()] == modes


def test_a_hook_on_an_adapter_stops_it(teacher: nn.Module, tmp_path: Path) -> None:
    model = get_peft_model(copy.deepcopy(teacher), LoraConfig(r=2, target_modules=["gate_proj"]))
    latents = prepare(model, small_plan())
    pack(latents, tmp_path)
    hook(model, f"base_model.model.{GATE}", factor=1.01)
    with pytest.raises(MismatchError, match=f"^{GATE}: "):
        pack_model(latents, tmp_path / "again", assets=tmp_path)


def test_a_hook_under_autocast_stops_it(teacher: nn.Module, tmp_path: Path) -> None:
    latents = ready(teacher)
    autocast(latents)
    hook(latents.model, factor=1.05)
    with pytest.raises(MismatchError, match=GATE):
        pack(latents, tmp_path)
