"""Every verb that takes a model says the same of a path, and its advice works."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from intaglio.errors import ConfigError
from intaglio.formats.words.write_mlx import export_mlx
from intaglio.formats.words.write_vllm import export_vllm
from intaglio.measure.evaluate import logits_of
from intaglio.packed.checkpoint import load_model
from intaglio.packed.identity import look
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import make_plan
from intaglio.train.latents import prepare
from intaglio.train.pack import pack_model
from intaglio.train.quantize import quantize
from tests.support.cases import Case
from tests.support.cli import contents, intaglio
from tests.support.tiny import GEMMA3, GEMMA4, MULTIMODAL, TOKENIZER, add_unused, build, fill, make_checkpoint

WEIGHT = "model.layers.2.mlp.up_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Tensors = dict[str, Tensor]


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), "utf-8")


@pytest.fixture
def checkpoint(gemma4: Case, tmp_path: Path) -> Path:
    """A tiny model that a test may change."""
    return Path(shutil.copytree(gemma4.checkpoint, tmp_path / "model"))


# Kinds that no verb takes: how such a folder is made of a checkpoint, and what is said of it.


def with_tensors(**more: Tensor) -> Callable[[Path], None]:
    """Tensors by their names, in which a double underscore stands for a dot, beside or in place of a weight's."""
    return lambda folder: edit_tensors(
        folder, lambda tensors: tensors.update({name.replace("__", "."): tensor for name, tensor in more.items()})
    )


def with_codes(method: str | None, dtype: torch.dtype, *beside: str) -> Callable[[Path], None]:
    """A weight in another dtype with tensors beside it, and a quantization_config that names the method."""

    def make(folder: Path) -> None:
        def change(tensors: Tensors) -> None:
            tensors[WEIGHT] = torch.ones(tensors[WEIGHT].shape).to(dtype)
            tensors.update({WEIGHT.removesuffix("weight") + name: torch.ones(4) for name in beside})

        edit_tensors(folder, change)
        if method is not None:
            edit_config(folder, quantization_config={"quant_method": method})

    return make


def adapter_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    adapter_beside(folder)


def adapter_beside(folder: Path) -> None:
    settings = {"base_model_name_or_path": "google/gemma-4-E2B-it", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors")


def only(name: str, data: bytes = b"x") -> Callable[[Path], None]:
    """A folder with this file in place of the weights."""

    def make(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return make


def stale(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})


FLOATS_INSTEAD = "its codes are no weights to train or to fit: take the checkpoint of floats that it was made from"
INT8, U8, I32, FP8 = torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "int8 of bitsandbytes": (with_codes("bitsandbytes", INT8, "SCB"), r"codes of bitsandbytes \(.*SCB, F32\)"),
    "int8 without a config of it": (with_codes(None, INT8, "SCB"), r"codes of bitsandbytes"),
    "nf4 of bitsandbytes": (
        with_codes("bitsandbytes", U8, "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
        r"codes of bitsandbytes \(.*weight\.absmax",
    ),
    "fp8 with scales": (with_codes("fp8", FP8, "weight_scale_inv"), r"codes of an FP8 quantizer \(.*weight_scale_inv"),
    "fp8 of compressed-tensors": (
        with_codes("compressed-tensors", FP8, "weight_scale"),
        r"codes of compressed-tensors",
    ),
    "fp8 and nothing else": (with_codes(None, FP8), r"codes of an FP8 quantizer \(.*up_proj\.weight, F8_E4M3\)"),
    "fp8 of modelopt": (with_codes("modelopt", FP8, "weight_scale", "input_scale"), r"codes of an FP8 quantizer"),
    "gptq": (with_codes("gptq", I32, "qweight", "qzeros", "scales", "g_idx"), r"codes of GPTQ"),
    "awq": (with_codes("awq", I32, "qweight", "qzeros", "scales"), r"codes of AWQ"),
    "hqq": (with_codes("hqq", U8, "W_q"), r"codes of HQQ"),
    "quanto": (with_codes(None, INT8, "weight._data", "weight._scale"), r"codes of quanto"),
    "mlx": (with_codes(None, I32, "scales", "biases"), r"codes of MLX"),
    "a method unheard of": (with_codes("spqr", I32), r"codes of spqr \(.*up_proj\.weight, I32\)"),
    "integers": (with_codes(None, INT8), r"up_proj\.weight in I8, which is no float"),
    "a stale quantization_config": (stale, r"are codes of 'bitsandbytes', but all of them are floats: remove"),
    "a stale quantization of MLX": (
        lambda folder: edit_config(folder, quantization={"group_size": 32, "bits": 4}),
        r"are codes of 'mlx', but all of them are floats: remove quantization from config\.json",
    ),
    "a prepared model": (
        with_tensors(model__layers__0__mlp__up_proj__quantizer__scale_latent=torch.ones(4)),
        r"a prepared model \(model\.layers\.0\.mlp\.up_proj\.quantizer\.scale_latent\).*: pack the model with",
    ),
    "lora beside whole weights": (
        with_tensors(model__layers__0__mlp__up_proj__lora_A__weight=torch.ones(4, 4)),
        r"an adapter that is not merged \(.*lora_A\.weight\): merge it before saving, with model\.merge_and_unload\(\)",
    ),
    "ia3 beside whole weights": (
        with_tensors(model__layers__0__mlp__up_proj__ia3_l=torch.ones(4)),
        r"an adapter that is not merged \(.*ia3_l",
    ),
    "wrapped by PEFT": (
        with_tensors(base_model__model__model__layers__0__mlp__up_proj__base_layer__weight=torch.ones(4, 4)),
        r"an adapter that is not merged \(.*base_layer\.weight",
    ),
    "modules_to_save": (
        with_tensors(lm_head__modules_to_save__default__weight=torch.ones(4)),
        r"an adapter that is not merged \(.*modules_to_save",
    ),
    "an adapter beside a model": (
        adapter_beside,
        r"a whole model and beside it an adapter \(LORA, adapter",
    ),
    "an adapter alone": (
        adapter_only,
        r"an adapter \(LORA\) without its model: merge it into its base, google/",
    ),
    "a pickle": (only("pytorch_model.bin", b"PK"), r"pytorch_model\.bin is a pickle: pickles are not read"),
    "an ONNX folder": (
        only("onnx/model.onnx"),
        r"holds an ONNX folder: give the packed model that it was",
    ),
    "a LiteRT bundle": (only("model.litertlm"), r"holds a LiteRT bundle: give the packed model"),
    "a release": (only("SHA256SUMS"), r"a release: give the packed model that it was exported from"),
    "a run": (
        only("run.json", b"{}"),
        r"the folder of a run: it has no packed model yet: continue it with",
    ),
}


def takes_a_model(model: Path, sound: Case, tmp_path: Path) -> dict[str, list[object]]:
    """Every verb that takes a model, with one where it belongs."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The whale swam past the ship.\n" * 40)
    more = [f"--text={text}", "--eval-tokens=256"]
    return {
        "plan": ["plan", model],
        "quantize": ["quantize", model, f"--out={out}"],
        "train": ["train", model, f"--data={text}", f"--out={out}"],
        "train from a teacher": ["train", sound.packed.path, f"--teacher={model}", f"--data={text}", f"--out={out}"],
        "inspect": ["inspect", model],
        "convert": ["convert", model, f"--out={out}"],
        "export": ["export", model, "hf", f"--out={out}"],
        "verify": ["verify", model, sound.gguf],
        "eval": ["eval", sound.packed.path, f"--original={model}", *more],
        "eval it": ["eval", model, f"--original={sound.checkpoint}", *more],
        "report": ["report", sound.packed.path.parent, f"--original={model}", *more],
        "train-drafter": ["train-drafter", model, f"--out={out}"],
    }


@pytest.mark.parametrize("kind", REFUSED)
def test_every_verb_says_the_same_of_a_folder(kind: str, checkpoint: Path, gemma4: Case, tmp_path: Path) -> None:
    make, says = REFUSED[kind]
    make(checkpoint)
    commands = takes_a_model(checkpoint, gemma4, tmp_path)
    if look(checkpoint).kind == "quantized":
        del commands["eval it"]  # which transformers may be able to read
    before, errors = contents(tmp_path), {}
    for verb, command in commands.items():
        outcome = intaglio(*command)
        assert outcome.code == 2, verb
        errors[verb] = outcome.error
    assert len(set(errors.values())) == 1, errors
    error = errors["quantize"]
    assert re.search(rf"^{re.escape(str(checkpoint))}(/\S+)?: (holds )?.*{says}", error), error
    assert contents(tmp_path) == before
    if "holds codes of" in error:
        assert FLOATS_INSTEAD in error


def test_formats_of_ours_are_named(gemma4: Case, mobile_packed: PackedModel, tmp_path: Path) -> None:
    """Each is told by its tensors; what the message advises is done, and works."""
    export_mlx(gemma4.packed, tmp_path / "mlx")
    export_vllm(gemma4.packed, tmp_path / "vllm")
    for folder, says in (
        (tmp_path / "mlx", rf"holds codes of MLX \(.*\): {FLOATS_INSTEAD}"),
        (tmp_path / "vllm", r"holds codes of compressed-tensors \(.*\): `(intaglio convert \S+ --out packed)` makes"),
        (gemma4.gguf, r"a GGUF file: `(intaglio convert \S+ --config DIR --out packed)` makes a packed model of it"),
        (gemma4.packed.path, r"a packed model: .*`(intaglio export \S+ hf --out DIR)` makes one"),
    ):
        out = tmp_path / f"out-{folder.name}"
        outcome = intaglio("quantize", folder, f"--out={out}")
        assert outcome.code == 2
        found = re.search(says, outcome.error)
        assert found, outcome.error
        if found.groups():
            command = found[1].replace("DIR", str(gemma4.checkpoint if "--config" in found[1] else out))
            advised = [str(out) if word == "packed" else word for word in command.split()[1:]]
            assert intaglio(*advised).code == 0
    assert intaglio("quantize", tmp_path / "out-packed", f"--out={tmp_path / 'again'}").code == 0


def run_python(message: str, folder: Path) -> None:
    """Do in this process what a message tells people to paste into a shell."""
    found = re.search(r'python -c "([^"]+)"', message)
    assert found, message
    with contextlib.chdir(folder):
        exec(found[1], {})


def adapter_of(model_dir: Path, folder: Path) -> Tensors:
    """Save a LoRA adapter with weights that do something; return the merged weights."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    )
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.1, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    merged: Tensors = model.merge_and_unload().state_dict()
    return merged


def test_the_advice_for_an_adapter_works(checkpoint: Path, tmp_path: Path) -> None:
    """Alone, it is merged into its base; beside a whole model, one of the two is removed or merged."""
    merged = adapter_of(checkpoint, tmp_path / "adapter")
    outcome = intaglio("quantize", tmp_path / "adapter", f"--out={tmp_path / 'out'}")
    assert f"merge it into its base, {checkpoint}, and give the result" in outcome.error
    run_python(outcome.error, tmp_path)
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[WEIGHT], merged[WEIGHT])
    assert intaglio("quantize", tmp_path / "merged", f"--out={tmp_path / 'out'}").code == 0

    whole = Path(shutil.copytree(checkpoint, tmp_path / "whole"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, whole)
    shutil.rmtree(tmp_path / "merged")
    outcome = intaglio("quantize", whole, f"--out={tmp_path / 'out2'}")
    run_python(outcome.error, tmp_path)
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[WEIGHT], merged[WEIGHT])
    remove = re.search(r"take the model as it is, remove (\S+) and (\S+);", outcome.error)
    assert remove
    for name in remove.groups():
        (whole / name).unlink()
    assert intaglio("quantize", whole, f"--out={tmp_path / 'out2'}").code == 0


def test_a_base_that_is_no_name_becomes_no_part_of_a_command(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    settings = {"base_model_name_or_path": "x'); import os; os.system('id", "peft_type": "LO\x1b[31mRA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    error = intaglio("plan", tmp_path / "adapter").error
    assert "from_pretrained('BASE')" in error and "os.system" not in error and "\x1b" not in error


def test_the_advice_for_a_pickle_works(checkpoint: Path, tmp_path: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    outcome = intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}")
    run_python(outcome.error, tmp_path)
    assert intaglio("quantize", tmp_path / "safe", f"--out={tmp_path / 'out'}").code == 0


def test_the_advice_for_a_prepared_model_works(gemma4: Case, tmp_path: Path) -> None:
    plan = make_plan(gemma4.checkpoint, "q4_0")
    latents = prepare(load_model(gemma4.checkpoint), plan)
    pack_model(latents, tmp_path / "packed", assets=gemma4.checkpoint)
    assert intaglio("export", tmp_path / "packed", "hf", f"--out={tmp_path / 'hf'}").code == 0


def test_the_advice_for_a_stale_config_works(checkpoint: Path, tmp_path: Path) -> None:
    stale(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}").code == 0


# The head, said twice


def test_a_head_that_contradicts_its_config_is_refused_with_both_ways_out(checkpoint: Path, tmp_path: Path) -> None:
    """Merges of PEFT and Unsloth leave a config that ties the head, and files that hold another one."""
    head = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    edit_tensors(checkpoint, lambda tensors: tensors.update({HEAD: head}))
    says = (
        r'config\.json says "tie_word_embeddings": true, but lm_head\.weight has other values than model\.embed_'
        r'tokens\.weight: set "tie_word_embeddings": false in config\.json to keep this head, or remove lm_head\.weight'
    )
    for command in (["plan", checkpoint], ["quantize", checkpoint, f"--out={tmp_path / 'out'}"]):
        outcome = intaglio(*command)
        assert outcome.code == 2 and re.search(says, outcome.error), outcome.error
    with pytest.raises(ConfigError, match=says):
        load_model(checkpoint)

    dropped = Path(shutil.copytree(checkpoint, tmp_path / "dropped"))
    edit_tensors(dropped, lambda tensors: tensors.pop(HEAD))
    assert intaglio("quantize", dropped, f"--out={tmp_path / 'tied'}").code == 0
    edit_config(checkpoint, tie_word_embeddings=False)
    assert intaglio("quantize", checkpoint, f"--out={tmp_path / 'untied'}").code == 0  # the preset has a grid for it
    packed = PackedModel.open(tmp_path / "untied")
    assert packed.plan[HEAD].grid.name == "q6_k"
    assert float((packed.decode(HEAD) - head.float()).norm() / head.float().norm()) < 0.03
    assert intaglio("export", tmp_path / "untied", "gguf", f"--out={tmp_path / 'untied.gguf'}").code == 0


def test_a_head_that_repeats_the_embedding_is_no_contradiction(checkpoint: Path, tmp_path: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}").code == 0
    assert PackedModel.open(tmp_path / "out").plan.model.tied_head


def test_a_missing_head_says_how_to_tie_it(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, tie_word_embeddings=False)
    says = (
        r'the first is lm_head\.weight: if the head is the embedding, set "tie_word_embeddings": true in config\.json'
    )
    outcome = intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}")
    assert outcome.code == 2 and re.search(says, outcome.error), outcome.error
    edit_config(checkpoint, tie_word_embeddings=True)
    assert intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}").code == 0


@pytest.mark.parametrize("preset", ["q4_0", "q4_0-free", "q4_0-stock"])
def test_presets_cover_an_untied_head(preset: str) -> None:
    plan = make_plan(GEMMA4 | {"tie_word_embeddings": False}, preset)
    assert plan[HEAD].grid == plan[EMBEDDING].grid
    assert make_plan(GEMMA4, preset).portable == plan.portable


# Tensors and dtypes that are not in the plan


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.up_proj.bias",
        "v_head.summary.weight",
        "score.weight",
        "model.layers.4.input_layernorm.weight",
        "model.layers.0.self_attn.k_proj.k_scale",
        "model.layers.0.self_attn.sinks",
        "lm_head.bias",
    ],
)
def test_tensors_without_a_place_are_refused(name: str, checkpoint: Path, tmp_path: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: torch.ones(4)}))
    says = rf"1 tensors have no place in a gemma4_text of this config and would be lost: {re.escape(name)}: expected"
    for command in (["plan", checkpoint], ["quantize", checkpoint, f"--out={tmp_path / 'out'}"]):
        outcome = intaglio(*command)
        assert outcome.code == 2 and re.search(says, outcome.error), outcome.error
    edit_tensors(checkpoint, lambda tensors: tensors.pop(name))  # as the message has it
    assert intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}").code == 0


def test_tensors_that_are_known_to_be_unused_are_not(checkpoint: Path, tmp_path: Path) -> None:
    add_unused(checkpoint)
    known = ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq")
    known += ("model.rotary_emb.sliding_attention_original_inv_freq", "model.embed_tokens.embed_scale")
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: torch.ones(4) for name in known}))
    assert intaglio("plan", checkpoint).code == 0
    assert intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}").code == 0
    load_model(checkpoint)


def test_a_vector_of_integers_is_no_vector_of_floats(checkpoint: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    outcome = intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}")
    assert outcome.code == 2 and "model.norm.weight is of type I8: expected floats" in outcome.error


# Names that a wrapper made

WRAPPINGS: dict[str, Callable[[str], str]] = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
    "_fsdp_wrapped_module.": lambda name: f"_fsdp_wrapped_module.{name}".replace(
        "layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."
    ),
    "model._orig_mod.": lambda name: name.replace(".mlp.", ".mlp._orig_mod."),
}


def rename(folder: Path, new: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    save_file({new(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_prefixes_of_wrappers_are_taken_off(wrapping: str, checkpoint: Path, gemma4: Case, tmp_path: Path) -> None:
    rename(checkpoint, WRAPPINGS[wrapping])
    outcome = intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}")
    assert outcome.code == 0
    assert re.search(r"model: names hold '\S+', which a wrapper put there: it is taken off", outcome.err)
    found = (tmp_path / "out" / "packed.safetensors").read_bytes()
    assert found[-1000:] == (gemma4.packed.path / "packed.safetensors").read_bytes()[-1000:]
    assert intaglio("plan", checkpoint).code == 0 and intaglio("inspect", checkpoint).code == 0
    mine, theirs = load_model(checkpoint).state_dict(), load_model(gemma4.checkpoint).state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("prefix", ["policy.", "student.model."])
def test_a_prefix_of_something_else_is_named(prefix: str, checkpoint: Path, tmp_path: Path) -> None:
    rename(checkpoint, lambda name: prefix + name)
    outcome = intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}")
    says = f"names begin with {prefix!r}, which belongs to another program: save the model that it wraps"
    assert outcome.code == 2 and says in outcome.error


def test_one_tensor_under_two_names(checkpoint: Path, tmp_path: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({f"module.{WEIGHT}": tensors[WEIGHT] + 1}))
    outcome = intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}")
    assert outcome.code == 2 and "are one tensor: expected one of them" in outcome.error


# Multimodal models


def test_a_multimodal_config_without_its_text_model(checkpoint: Path, tmp_path: Path) -> None:
    for kind in ("gemma4", "gemma4_unified", "gemma3"):
        edit_config(checkpoint, model_type=kind)
        outcome = intaglio("plan", checkpoint)
        says = (
            rf"model: model_type '{kind}' is that of a multimodal model, but its text_config is missing: "
            rf'download config.json again, or say "model_type": "{kind}_text"'
        )
        assert outcome.code == 2 and re.search(says, outcome.error), outcome.error
    edit_config(checkpoint, model_type="gemma4_text")
    assert intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}").code == 0


@pytest.mark.parametrize(
    ("key", "whole", "text"),
    [("tie_word_embeddings", False, None), ("vocab_size", 4097, 4096), ("final_logit_softcapping", 50.0, 30.0)],
)
def test_two_configs_of_a_multimodal_model_say_the_same(key: str, whole: Any, text: Any, tmp_path: Path) -> None:
    config = MULTIMODAL | {key: whole, "text_config": GEMMA4 | ({} if text is None else {key: text})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    outcome = intaglio("plan", tmp_path)
    says = rf"config\.json says {key} = \S+, and its text_config \S+: set both to the one that is right"
    assert outcome.code == 2 and re.search(says, outcome.error), outcome.error
    both = MULTIMODAL | {"text_config": GEMMA4 | {key: GEMMA4.get(key, True)}, key: GEMMA4.get(key, True)}
    (tmp_path / "config.json").write_text(json.dumps(both))
    assert intaglio("plan", tmp_path).code == 0


def test_towers_that_are_left_out_are_named(tmp_path: Path) -> None:
    """Gemma 3's always, Gemma 4's where the text alone is asked for."""
    model = build(GEMMA3).to(torch.bfloat16)
    fill(model, 0)
    folder = tmp_path / "gemma3"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    plain = load_model(folder).state_dict()
    text = json.loads((folder / "config.json").read_text())
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": vision})
    )
    rename(folder, lambda name: f"language_model.{name}")
    tower = {"vision_tower.vision_model.x.weight": torch.ones(2), "multi_modal_projector.y": torch.ones(2)}
    edit_tensors(folder, lambda tensors: tensors.update(tower))
    says = "the text model alone is taken: vision towers are left out, since intaglio reads no towers of gemma3"
    for command in (["plan", folder], ["quantize", folder, f"--out={tmp_path / 'out'}"]):
        outcome = intaglio(*command)
        assert outcome.code == 0 and says in outcome.err
    found = load_model(folder).state_dict()
    assert all(torch.equal(plain[name], found[name]) for name in plain)

    make_checkpoint(tmp_path / "gemma4", MULTIMODAL)
    said = intaglio("plan", tmp_path / "gemma4", "--text-only")
    assert "the text model alone is taken: vision and audio towers are left out" in said.err
    assert "towers" not in intaglio("plan", tmp_path / "gemma4").err


# Files that contradict each other


def test_a_whole_model_beside_shards(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "model-00001-of-00001.safetensors")
    listed = dict.fromkeys(load_file(checkpoint / "model.safetensors"), "model-00001-of-00001.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    outcome = intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}")
    says = r"model\.safetensors is a whole model, and model\.safetensors\.index\.json lists other files .*: remove the"
    assert outcome.code == 2 and re.search(says, outcome.error), outcome.error
    (checkpoint / "model.safetensors").unlink()
    assert intaglio("plan", checkpoint).code == 0
    shutil.copy(checkpoint / "model-00001-of-00001.safetensors", checkpoint / "model-00002-of-00002.safetensors")
    outcome = intaglio("plan", checkpoint)
    assert outcome.code == 2 and "model-00002-of-00002.safetensors is a shard that" in outcome.error
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    assert intaglio("plan", checkpoint).code == 0
    del listed[WEIGHT]
    index.write_text(json.dumps({"weight_map": listed}))
    outcome = intaglio("plan", checkpoint)
    assert (
        outcome.code == 2 and f"does not list {WEIGHT}, which model-00001-of-00001.safetensors holds" in outcome.error
    )


def test_a_link_out_of_the_folder_is_not_copied(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (checkpoint / "tokenizer.model").symlink_to(tmp_path / "secret")
    outcome = intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}")
    says = r"tokenizer\.model: is a link to \S+/secret, outside of the model's folder: put a copy in its place"
    assert outcome.code == 2 and re.search(says, outcome.error), outcome.error
    assert not (tmp_path / "out").exists()
    (checkpoint / "tokenizer.model").unlink()
    (checkpoint / "tokenizer.model").write_text("a copy")
    assert intaglio("quantize", checkpoint, f"--out={tmp_path / 'out'}").code == 0


def test_links_of_the_hubs_cache_are_followed(gemma4: Case, tmp_path: Path) -> None:
    """There, a snapshot's files are links to blobs beside it; a folder may be a link itself, too."""
    repository = tmp_path / "hub" / "models--google--gemma"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in gemma4.checkpoint.iterdir():
        shutil.copy(file, repository / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    (tmp_path / "link").symlink_to(snapshot)
    quantize(tmp_path / "link", make_plan(tmp_path / "link", "q4_0"), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (gemma4.checkpoint / "tokenizer.json").read_bytes()


def test_logits_are_those_of_the_weights(checkpoint: Path, gemma4: Case) -> None:
    """The model computes the same without what is taken off or passed over."""
    rename(checkpoint, lambda name: f"module.{name}")
    ids = torch.arange(32).reshape(1, 32)
    first, second = (next(logits_of(load_model(path), ids)) for path in (checkpoint, gemma4.checkpoint))
    assert torch.equal(first, second)
