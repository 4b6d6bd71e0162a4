"""Import of mobile folders: the same bytes come out again, and what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from intaglio.errors import ConfigError
from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.mobile.read_packed import import_mobile
from intaglio.formats.mobile.write import export_mobile
from intaglio.formats.verify import verify
from intaglio.packed.checkpoint import checkpoint_spec, load_model
from intaglio.packed.model import FILE_NAME, PackedModel
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.quantize import quantize
from tests.support.cli import contents, intaglio
from tests.support.tiny import GEMMA3, GEMMA4, MULTIMODAL, add_unused, make_checkpoint, pack

WEIGHTS = "model.safetensors"
Q_INPUT = "model.layers.0.self_attn.q_proj.input_activation_scale"


@pytest.fixture
def folder(mobile_packed: PackedModel, tmp_path: Path) -> Path:
    export_mobile(mobile_packed, tmp_path / "mobile")
    return tmp_path / "mobile"


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def set_config(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def comes_out_again(folder: Path, tmp_path: Path) -> PackedModel:
    made = import_mobile(folder, tmp_path / "imported")
    export_mobile(made, tmp_path / "again")
    assert verify(made, folder).exact
    old, new = contents(folder), contents(tmp_path / "again")
    assert set(old) == set(new)
    assert old[WEIGHTS] == new[WEIGHTS]
    assert json.loads(old["config.json"]) == json.loads(new["config.json"])
    return made


def test_a_folder_of_ours(folder: Path, mobile_packed: PackedModel, tmp_path: Path) -> None:
    made = comes_out_again(folder, tmp_path)
    assert made.plan.recipe == mobile_packed.plan.recipe
    old, new = (load_file(model.path / FILE_NAME) for model in (mobile_packed, made))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_a_folder_like_googles(tmp_path: Path) -> None:
    """Towers with activation scales of their own and float32 parts, unused k and v, a head of its own."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", MULTIMODAL)
    add_unused(checkpoint)
    plan = make_plan(checkpoint_spec(checkpoint), Recipe.load("mobile-e2b", ["weights.mlp_early.layers=0-1"]))
    export_mobile(quantize(checkpoint, plan, tmp_path / "packed"), tmp_path / "mobile")

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"][7] ^= 3
        tensors["model.audio_tower.output_proj.bias"] += 1 / 3
        unlike = ("lm_head.", "_proj.input_activation", "_cache_scale")
        scalars = [name for name, t in tensors.items() if t.ndim == 0 and name.endswith("_scale")]
        for i, name in enumerate(n for n in scalars if not any(part in n for part in unlike)):
            tensors[name].fill_(0.01 + 0.001 * i)
        assert "model.language_model.layers.3.self_attn.v_proj.output_activation_scale" in tensors

    made = comes_out_again(change(tmp_path / "mobile", edit), tmp_path)
    assert not made.plan.model.tied_head
    assert made.plan.recipe.name == "mobile-imported"
    static = made.read_static()
    assert all(static[name] for name in made.plan.carried_scales if "vision_tower" in name and "output" in name)


def test_what_is_imported_goes_on(folder: Path, mobile_packed: PackedModel, tmp_path: Path) -> None:
    """The import becomes floats for further training, also through the command line."""
    assert intaglio("convert", folder, f"--out={tmp_path / 'imported'}").code == 0
    assert intaglio("convert", folder, f"--out={tmp_path / 'imported'}").code == 2
    made = PackedModel.open(tmp_path / "imported")
    export_hf(made, tmp_path / "hf")
    weights = load_model(tmp_path / "hf").state_dict()
    for tensor in mobile_packed.plan:
        assert torch.equal(weights[tensor.name], mobile_packed.decode(tensor.name))
    exported = intaglio("export", made.path, "gemma-mobile", f"--out={tmp_path / 'again'}")
    assert exported.code == 0 and "again: exact" in exported.out
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


# What does not fit


def fill(name: str, value: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[name][1:2].fill_(value) if tensors[name].ndim else tensors[name].fill_(value)


DOWN = "model.layers.2.mlp.down_proj"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(f"{DOWN}.weight_scale"), rf"1 tensors are missing: {DOWN}\.weight_scale: download"),
    "extra": (lambda t: t.update(surprise=torch.zeros(2)), "1 tensors are not part of this model: surprise: download"),
    "another dtype": (
        lambda t: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"].half()}),
        rf"{DOWN}\.weight_scale is F16 \[256, 1\], expected F32 \[256, 1\] by its config\.json",
    ),
    "another shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(3, dtype=torch.bfloat16)}),
        r"model\.norm\.weight is BF16 \[3\], expected F32 or BF16 or F16 \[256\]",
    ),
    "a zero scale": (fill(f"{DOWN}.weight_scale", 0.0), rf"{DOWN}\.weight_scale: 1 of 256 scales .* at row 1, block 0"),
    "a NaN scale": (fill(f"{DOWN}.weight_scale", float("nan")), rf"{DOWN}\.weight_scale: 1 of 256 scales"),
    "code -128": (
        fill("model.layers.0.per_layer_projection.weight", -128),
        r"per_layer_projection\.weight: has codes below -127, which grid int8 lacks",
    ),
    "a NaN activation scale": (fill(f"{DOWN}.input_activation_scale", float("nan")), "input_activation_scale = nan"),
    "scales of one tensor that differ": (fill(Q_INPUT, 0.5), r"k_proj\.input_activation_scale = 0\.0, but .*q_proj"),
    "a scale of logits": (
        fill("lm_head.output_activation_scale", 0.5),
        r"lm_head\.output_activation_scale = 0\.5: exp",
    ),
    "floats beyond bfloat16": (
        lambda t: t.update({"model.norm.weight": torch.full((256,), 1 / 3)}),
        r"model\.norm\.weight: has float values that bfloat16 does not hold",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_named_and_nothing_is_written(folder: Path, tmp_path: Path, case: str) -> None:
    edit, message = DAMAGE[case]
    change(folder, edit)
    with pytest.raises(ConfigError, match=message):
        import_mobile(folder, tmp_path / "imported")
    assert [path.name for path in tmp_path.iterdir()] == ["mobile"]


BITS = {"quant_method": "gemma", "quantize_embeddings": True, "modules_to_not_convert": []}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "not mobile": ({"quantization_config": {"quant_method": "awq"}}, "no folder in the mobile format"),
    "another family": ({"model_type": "gemma4_unified_text"}, "the mobile format is for gemma4_text, this model is"),
    "odd bits": ({"quantization_config": BITS | {"num_bits": 3}}, "3 bits: expected 2, 4 or 8"),
    "other bits": (
        {"quantization_config": BITS | {"num_bits": 8, "modules_to_not_convert": ["per_layer_model_projection"]}},
        r"is U8 .*, expected I8",
    ),
    "no expression": ({"quantization_config": BITS | {"module_quant_configs": {"(": {}}}}, "cannot be read"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_do_not_fit_are_named(folder: Path, tmp_path: Path, case: str) -> None:
    values, message = CONFIGS[case]
    with pytest.raises(ConfigError, match=message):
        import_mobile(set_config(folder, **values), tmp_path / "imported")
    assert [path.name for path in tmp_path.iterdir()] == ["mobile"]


def test_other_families_have_no_mobile_format(tmp_path: Path) -> None:
    packed = pack(make_checkpoint(tmp_path / "checkpoint", GEMMA3), tmp_path / "packed")
    outcome = intaglio("export", packed.path, "gemma-mobile", f"--out={tmp_path / 'mobile'}")
    assert outcome.code == 2 and "the mobile format is for gemma4_text" in outcome.error
    assert not (tmp_path / "mobile").exists()


def test_grids_of_other_formats_are_refused(tmp_path: Path) -> None:
    packed = pack(make_checkpoint(tmp_path / "checkpoint", GEMMA4), tmp_path / "packed")
    outcome = intaglio("export", packed.path, "gemma-mobile", f"--out={tmp_path / 'mobile'}")
    assert outcome.code == 2
    assert "recipe q4_0 puts it on grid q6_k, which the mobile format does not have" in outcome.error


def test_a_mobile_folder_is_no_checkpoint_to_train(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"holds codes of the Gemma mobile format .*: `intaglio convert .* --out packed`"
    ):
        load_model(folder)


def test_one_flipped_bit_is_found(folder: Path, mobile_packed: PackedModel) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}.weight"][3, 3] ^= 1
        tensors["model.embed_tokens_per_layer.embedding_scale"].view(torch.int32)[5, 1] ^= 1
        tensors[f"{DOWN}.input_activation_scale"] += 1
        tensors["model.norm.weight"].view(torch.int16)[0] ^= 1
        tensors["lm_head.weight"][0, 0] ^= 0b00010001
        del tensors["model.layers.1.self_attn.k_cache_scale"]

    found = verify(mobile_packed, change(folder, edit))
    differing = {kind: getattr(found, f"differing_{kind}") for kind in ("codes", "scales", "static_scales", "values")}
    assert differing == {"codes": 3, "scales": 1, "static_scales": 1, "values": 1}
    assert found.missing == ("model.layers.1.self_attn.k_cache_scale",)
    bits = {"module_quant_configs": {"layers": {"num_bits": 2}}, "num_bits": 4} | BITS
    set_config(folder, quantization_config=bits)
    assert any(name.endswith("in config.json") for name in verify(mobile_packed, folder).unlike)
