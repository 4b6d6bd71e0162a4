"""The mobile format from end to end: what transformers computes from the folder is what was packed and trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear, _unpack_int2, _unpack_int4

import intaglio.tiny as tiny
from intaglio.formats.gguf.read import read_gguf
from intaglio.formats.mobile.read_packed import import_mobile
from intaglio.formats.mobile.write import export_mobile
from intaglio.formats.verify import verify
from intaglio.measure.simulate import decoded_model
from intaglio.numerics.grid import Quantized
from intaglio.packed.checkpoint import checkpoint_spec, load_model, load_quantized
from intaglio.packed.model import PackedModel
from intaglio.plan.carried import whole_name
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.latents import prepare
from intaglio.train.pack import pack_model
from intaglio.train.quantize import quantize
from intaglio.train.static import put_scales, switch_static
from tests.support.cli import intaglio
from tests.support.tiny import GEMMA4, GEMMA4_DENSE, MULTIMODAL, add_unused, make_checkpoint, pack

IDS = torch.randint(3, 4089, (2, 48), generator=torch.Generator().manual_seed(0))
E2B_SPLIT = ["weights.mlp_early.layers=0-1"]  # mobile-e2b, for a model of four layers


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**({"input_ids": IDS, "use_cache": False} | inputs)).logits


def exported(packed: PackedModel, folder: Path) -> Any:
    """The model that transformers makes of the exported folder."""
    export_mobile(packed, folder)
    assert verify(packed, folder).exact
    return load_quantized(folder)


# The bundled model


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return pack(tiny.MODEL_DIR, tmp_path_factory.mktemp("bundled") / "packed", "mobile")


def test_transformers_computes_what_was_packed_bit_for_bit(bundled: PackedModel, tmp_path: Path) -> None:
    model = exported(bundled, tmp_path / "mobile")
    expected = logits(decoded_model(load_model(tiny.MODEL_DIR), bundled))
    assert torch.equal(logits(model), expected)
    assert (tmp_path / "mobile/generation_config.json").is_file() and (tmp_path / "mobile/tokenizer.json").is_file()


def test_codes_and_scales_in_transformers_are_those_packed(bundled: PackedModel, tmp_path: Path) -> None:
    modules = dict(exported(bundled, tmp_path / "mobile").named_modules())
    for tensor, value in bundled:
        if not isinstance(value, Quantized):
            continue
        names = [tensor.name.removesuffix(".weight")]
        names += ["lm_head"] if tensor.spec.role == "token_embedding" else []
        for module in (modules[name] for name in names):
            assert isinstance(module, QuantizedLinear | QuantizedEmbedding)
            linear = isinstance(module, QuantizedLinear)
            stored = module.weight if linear else module.embedding_quantized
            unpack = {2: _unpack_int2, 4: _unpack_int4, 8: lambda x, width: x}[value.grid.code_bits]
            assert torch.equal(unpack(stored, tensor.spec.shape[1]), value.codes)
            assert torch.equal(module.weight_scale if linear else module.embedding_scale, value.scale)


def test_static_scales_compute_as_in_training(tmp_path: Path) -> None:
    """The reader leaves keys and values as they are, whatever their scales."""
    plan = make_plan(tiny.MODEL_DIR, "mobile")
    latents = prepare(load_model(tiny.MODEL_DIR), plan)
    student = latents.model
    owned = [scale for scale in plan.static_scales if scale.owned]
    put_scales(student, plan, {s.name: 0.02 + 0.001 * (i % 7) for i, s in enumerate(owned)})
    pack_model(latents, tmp_path / "packed", assets=tiny.MODEL_DIR)
    packed = PackedModel.open(tmp_path / "packed")
    model = exported(packed, tmp_path / "mobile")
    switch_static(student, activations=True, kv_cache=False)
    found = logits(model)
    assert torch.equal(found, logits(student))
    switch_static(student, activations=False, kv_cache=False)
    assert not torch.equal(found, logits(student))


def test_the_scale_that_transformers_refuses_is_that_of_the_slices_alone(bundled: PackedModel, tmp_path: Path) -> None:
    """Until transformers opens [V, L] scales again, Google's files are refused like ours; see `load_quantized`."""
    export_mobile(bundled, tmp_path / "mobile")
    try:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "mobile", dtype=torch.float32)
    except RuntimeError as error:
        assert "mismatched_sizes" in str(error)
    else:
        assert torch.equal(logits(model), logits(load_quantized(tmp_path / "mobile")))
    options: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "mobile", **options)
    assert {name for name, *_ in info["mismatched_keys"]} <= {"model.embed_tokens_per_layer.embedding_scale"}
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("config", [GEMMA4_DENSE, GEMMA4], ids=["no table", "one scale a row"])
def test_stock_from_pretrained_opens_a_model_without_slices(config: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.load("mobile", ["weights.ple_embedding.slices=false"])
    packed = pack(make_checkpoint(tmp_path / "checkpoint", config), tmp_path / "packed", recipe)
    export_mobile(packed, tmp_path / "mobile")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mobile", dtype=torch.float32)
    expected = decoded_model(load_model(tmp_path / "checkpoint"), packed)
    assert torch.equal(logits(model), logits(expected))
    imported = import_mobile(tmp_path / "mobile", tmp_path / "imported")
    assert verify(imported, tmp_path / "mobile").exact and imported.plan.tensors == packed.plan.tensors


# A multimodal model


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PackedModel]:
    folder = tmp_path_factory.mktemp("multimodal")
    checkpoint = make_checkpoint(folder / "checkpoint", MULTIMODAL)
    add_unused(checkpoint)
    plan = make_plan(checkpoint_spec(checkpoint), Recipe.load("mobile-e2b", E2B_SPLIT))
    return checkpoint, quantize(checkpoint, plan, folder / "packed")


def decoded_whole(checkpoint: Path, packed: PackedModel) -> Any:
    """The multimodal original with every weight as it was packed."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    state = model.state_dict()
    for tensor in packed.plan.everything:
        if whole_name(tensor.name) in state:
            state[whole_name(tensor.name)].copy_(packed.decode(tensor.name))
    return model


def test_a_multimodal_folder_computes_what_was_packed(multimodal: tuple[Path, PackedModel], tmp_path: Path) -> None:
    checkpoint, packed = multimodal
    model, expected = exported(packed, tmp_path / "mobile"), decoded_whole(checkpoint, packed)
    assert type(model).__name__ == "Gemma4ForConditionalGeneration"
    assert torch.equal(logits(model), logits(expected))
    generator = torch.Generator().manual_seed(0)
    places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1).reshape(1, 36, 2)
    image = {"pixel_values": torch.rand(1, 36, 768, generator=generator), "image_position_ids": places}
    sound = {"input_features": torch.randn(1, 64, 128, generator=generator)}
    sound["input_features_mask"] = torch.ones(1, 64, dtype=torch.bool)
    with torch.no_grad():
        for kind, inputs in (("get_image_features", image), ("get_audio_features", sound)):
            found, wanted = (torch.cat(list(getattr(m.model, kind)(**inputs).pooler_output)) for m in (model, expected))
            assert found.numel() and torch.equal(found, wanted)


def test_towers_have_their_bits_and_no_activation_scales(multimodal: tuple[Path, PackedModel]) -> None:
    packed = multimodal[1]
    bits = {t.name: t.grid.name for t in packed.plan.carried}
    assert bits["model.vision_tower.encoder.layers.1.mlp.down_proj.linear.weight"] == "int8"
    assert bits["model.vision_tower.patch_embedder.input_proj.weight"] == "bf16"
    assert bits["model.audio_tower.layers.0.feed_forward1.ffw_layer_1.linear.weight"] == "int2"
    assert bits["model.audio_tower.layers.1.lconv1d.linear_start.linear.weight"] == "int4"
    assert (
        bits["model.audio_tower.output_proj.weight"] == bits["model.embed_audio.embedding_projection.weight"] == "f32"
    )
    assert bits["model.layers.2.self_attn.k_proj.weight"] == "int4"
    static = packed.read_static()
    assert packed.plan.carried_scales and not any(static[name] for name in packed.plan.carried_scales)


def test_text_only_loads_as_a_text_model(multimodal: tuple[Path, PackedModel], tmp_path: Path) -> None:
    _, packed = multimodal
    model = exported(packed.text_only(), tmp_path / "mobile")
    assert type(model).__name__ == "Gemma4ForCausalLM"
    assert torch.equal(logits(model), logits(exported(packed, tmp_path / "whole")))
    assert verify(packed, tmp_path / "mobile").exact


def test_towers_join_a_trained_text_model(multimodal: tuple[Path, PackedModel], tmp_path: Path) -> None:
    checkpoint, packed = multimodal
    plan = make_plan(checkpoint, packed.plan.recipe)
    latents = prepare(load_model(checkpoint), plan)
    put_scales(latents.model, plan, {scale.name: 0.05 for scale in plan.static_scales if scale.owned})
    with torch.no_grad():
        for _, parameter in latents.named_parameters():
            parameter.mul_(1.1)
    latents.decode()
    pack_model(latents, tmp_path / "text", assets=checkpoint)
    joined = intaglio("quantize", checkpoint, f"--trained={tmp_path / 'text'}", f"--out={tmp_path / 'whole'}")
    assert joined.code == 0, joined.err
    text, whole = PackedModel.open(tmp_path / "text"), PackedModel.open(tmp_path / "whole")
    for tensor in whole.plan.everything:
        origin = text if tensor in text.plan.tensors else packed
        assert torch.equal(whole.decode(tensor.name), origin.decode(tensor.name))
    assert whole.read_static() == packed.read_static() | text.read_static()
    other = intaglio("quantize", checkpoint, f"--trained={pack_dense(tmp_path)}", f"--out={tmp_path / 'other'}")
    assert other.code == 2 and "of another text model or with other grids" in other.error


def test_towers_join_a_calibrated_text_model(multimodal: tuple[Path, PackedModel], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The whale swam past the ship, and nobody on it said a word.\n" * 60)
    few = ["--set=schedule.calibration_tokens=128", "--set=schedule.sequence_length=32", "--recipe=mobile"]
    made = intaglio("quantize", multimodal[0], f"--data={tmp_path / 'text.txt'}", f"--out={tmp_path / 'packed'}", *few)
    assert made.code == 0, made.err
    packed = PackedModel.open(tmp_path / "packed")
    static = packed.read_static()
    assert all(static[scale.name] for scale in packed.plan.static_scales)
    assert packed.plan.carried and not any(static[name] for name in packed.plan.carried_scales)
    refused = intaglio("quantize", multimodal[0], "--data=x", f"--trained={packed.path}", f"--out={tmp_path / 'other'}")
    assert refused.code == 2 and "not both" in refused.err


def pack_dense(folder: Path) -> Path:
    """Another model, packed."""
    return pack(make_checkpoint(folder / "dense", GEMMA4_DENSE), folder / "packed-dense", "mobile").path


def test_gguf_takes_the_text_alone(multimodal: tuple[Path, PackedModel], tmp_path: Path) -> None:
    checkpoint, _ = multimodal
    for name, options in (("whole", []), ("text", ["--text-only"])):
        assert intaglio("quantize", checkpoint, f"--out={tmp_path / name}", *options).code == 0
        exported = intaglio("export", tmp_path / name, "gguf", f"--out={tmp_path / name}.gguf")
        assert exported.code == 0 and ": exact" in exported.out
    tensors = [
        [(t.name, t.data.tobytes()) for t in read_gguf(tmp_path / f"{n}.gguf").tensors] for n in ("whole", "text")
    ]
    assert tensors[0] == tensors[1]


def test_a_checkpoint_without_its_towers_needs_to_be_told(multimodal: tuple[Path, PackedModel], tmp_path: Path) -> None:
    text = Path(shutil.copytree(multimodal[0], tmp_path / "text"))
    tensors = load_file(text / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "tower" not in name}
    save_file(kept, text / "model.safetensors", {"format": "pt"})
    refused = intaglio("quantize", text, f"--out={tmp_path / 'packed'}")
    assert refused.code == 2 and "tensors are missing" in refused.error and "--text-only" in refused.error
    assert intaglio("quantize", text, f"--out={tmp_path / 'packed'}", "--text-only").code == 0
