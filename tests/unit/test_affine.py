"""Words of codes beside their scales: compressed-tensors for vLLM, and MLX."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from intaglio.errors import ConfigError, RecipeError, WeightError
from intaglio.formats.verify import verify
from intaglio.formats.words.layout import compressed_tensors
from intaglio.formats.words.read import words_unpacked
from intaglio.formats.words.write import pack_words
from intaglio.formats.words.write_mlx import export_mlx, mlx_config
from intaglio.formats.words.write_vllm import export_vllm, vllm_config
from intaglio.numerics.grid import INT2, INT4, INT8, Q4_0, BlockGrid, Quantized
from intaglio.packed.checkpoint import checkpoint_spec, load_quantized
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.sizing.planning import bundled_spec
from intaglio.train.quantize import quantize
from tests.support.cases import Case
from tests.support.tiny import GEMMA4, GEMMA4_DENSE, GEMMA4_MOE, MULTIMODAL, make_checkpoint, pack

Q_PROJ = "model.layers.0.self_attn.q_proj"
SMALL = GEMMA4 | {"vocab_size": 256, "vocab_size_per_layer_input": 256}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """A random Gemma 4 in the mobile format, with scales that bfloat16 holds."""
    folder = tmp_path_factory.mktemp("narrow")
    recipe = Recipe.load("mobile", ["channel_scales=bf16"])
    return pack(make_checkpoint(folder / "checkpoint", SMALL), folder / "packed", recipe)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[PackedModel, Path]:
    """A random mixture of experts by recipe q4_0, and its folder. Shared: not to be changed."""
    folder = tmp_path_factory.mktemp("experts")
    packed = pack(make_checkpoint(folder / "checkpoint", GEMMA4_MOE | {"vocab_size": 256}), folder / "packed")
    export_vllm(packed, folder / "vllm")
    return packed, folder / "vllm"


def edit(folder: Path, name: str, change: Callable[[Tensor], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# The library's own bytes


@pytest.mark.parametrize("grid", [INT2, INT4, INT8, Q4_0], ids=lambda grid: grid.name)
def test_words_are_those_of_compressed_tensors(grid: BlockGrid) -> None:
    codes = torch.randint(grid.code_min, grid.code_max + 1, (5, 64), generator=torch.Generator().manual_seed(3))
    codes = codes.to(torch.int8)
    words = pack_to_int32(codes, grid.code_bits)
    assert pack_words(codes, grid).view(torch.int32).equal(words)
    assert words_unpacked(words, grid.code_bits).equal(codes)


def test_compressed_tensors_unpacks_every_weight(gemma4: Case, narrow: PackedModel, tmp_path: Path) -> None:
    for packed, expected in ((gemma4.packed, 32), (narrow, 35)):
        export_vllm(packed, tmp_path / packed.plan.recipe.name)
        tensors = load_file(tmp_path / packed.plan.recipe.name / "model.safetensors")
        modules = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
        assert len(modules) == expected, modules
        for module in modules:
            source = "model.embed_tokens" if module == "lm_head" else module
            value = packed.read(f"{source}.weight")
            assert isinstance(value, Quantized)
            shape = torch.Size(tensors[f"{module}.weight_shape"].tolist())
            found = unpack_from_int32(tensors[f"{module}.weight_packed"], value.grid.code_bits, shape)
            assert found.equal(value.codes)
            assert tensors[f"{module}.weight_scale"].float().equal(value.step)


# vLLM


def test_w4a16_says_so_in_its_config(gemma4: Case) -> None:
    config = vllm_config(gemma4.packed.plan)
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    (group,) = parsed.config_groups.values()
    assert group.targets == ["Linear"]
    assert (group.weights.num_bits, group.weights.group_size, group.weights.symmetric) == (4, 32, True)
    assert config["tie_word_embeddings"] and config["dtype"] == "bfloat16"
    assert parsed.ignore[:2] == ["lm_head", "re:.*per_layer_model_projection$"]


def test_the_mobile_format_has_a_group_for_each_width(narrow: PackedModel) -> None:
    config = vllm_config(narrow.plan)
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    kinds = {
        (g.weights.num_bits, str(g.weights.strategy), g.weights.group_size, g.output_activations is not None)
        for g in parsed.config_groups.values()
    }
    assert kinds == {
        (2, "channel", None, False),  # token embedding and head
        (4, "group", 64, False),  # per-layer embeddings: a scale for each layer's slice
        (4, "channel", None, True),
        (2, "channel", None, True),
        (8, "channel", None, True),
    }
    assert config["tie_word_embeddings"] is False


def test_static_scales_lie_beside_their_linear(narrow: PackedModel, tmp_path: Path) -> None:
    export_vllm(narrow, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    statics = [name for name in tensors if name.endswith(("input_scale", "output_scale"))]
    assert len(statics) == 2 * 32 and all(tensors[name].shape == (1,) for name in statics)
    assert "lm_head.input_scale" not in tensors and not any("cache" in name for name in tensors)


def test_scales_that_bfloat16_does_not_hold_are_refused(mobile_packed: PackedModel, tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"scales of grid int\d are not exact in bfloat16.*channel_scales=bf16"):
        export_vllm(mobile_packed, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_free_scales_are_refused_by_vllm_and_kept_by_mlx(tmp_path: Path) -> None:
    packed = pack(make_checkpoint(tmp_path / "checkpoint", SMALL), tmp_path / "packed", "q4_0-free")
    with pytest.raises(WeightError, match="q4_0-free are not exact in bfloat16"):
        export_vllm(packed, tmp_path / "vllm")
    export_mlx(packed, tmp_path / "mlx")
    assert verify(packed, tmp_path / "mlx").exact
    assert load_file(tmp_path / "mlx" / "model.safetensors")[f"{Q_PROJ}.scales"].dtype == torch.float32


@pytest.mark.parametrize("match", ["k_proj", "gate_proj"])
def test_what_vllm_computes_as_one_must_be_of_one_kind(match: str) -> None:
    table = f'[weights.odd]\nmatch = "layers.1.*{match}"\ngrid = "q8_0"\n\n'
    text = Recipe.load("q4_0").to_toml().replace("[weights.", table + "[weights.", 1)
    with pytest.raises(RecipeError, match=rf"{match}.*quantized differently.*the same grid"):
        vllm_config(make_plan(GEMMA4, Recipe.from_toml(text)))


def test_towers_go_along_as_floats_only(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", MULTIMODAL | {"text_config": SMALL})
    spec = checkpoint_spec(checkpoint)
    packed = quantize(checkpoint, make_plan(spec, "q4_0"), tmp_path / "packed")
    export_vllm(packed, tmp_path / "vllm")
    export_mlx(packed, tmp_path / "mlx")
    assert verify(packed, tmp_path / "vllm").exact and verify(packed, tmp_path / "mlx").exact
    names = load_file(tmp_path / "vllm" / "model.safetensors")
    assert f"model.language_model.{Q_PROJ.removeprefix('model.')}.weight_packed" in names
    assert any(name.startswith("model.vision_tower.") for name in names)
    with pytest.raises(RecipeError, match=r"vLLM reads towers as floats only.*--text-only"):
        vllm_config(make_plan(spec, _with_rule("tower_linear", "int8")))


def test_keys_that_are_values_leave_their_linear_findable(tmp_path: Path) -> None:
    """vLLM fuses q, k and v even where there is no v: the expression has to cover all three."""
    plan = make_plan(GEMMA4_DENSE, Recipe.load("q4_0", ["weights.linear.grid=q8_0"]))
    mixed = make_plan(GEMMA4_DENSE, _with_rule("mlp", "q8_0"))
    for made in (plan, mixed):
        groups = vllm_config(made)["quantization_config"]["config_groups"].values()
        assert all(group["targets"] for group in groups)
    targets = [t for g in vllm_config(mixed)["quantization_config"]["config_groups"].values() for t in g["targets"]]
    assert any("[qkv]_proj" in target for target in targets)


def _with_rule(role: str, grid: str) -> Recipe:
    table = f'[weights.odd]\nroles = ["{role}"]\ngrid = "{grid}"\n\n'
    return Recipe.from_toml(Recipe.load("q4_0").to_toml().replace("[weights.", table + "[weights.", 1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_computes_the_same_bits(gemma4: Case, tmp_path: Path, dtype: torch.dtype) -> None:
    export_vllm(gemma4.packed, tmp_path / "vllm")
    ids = torch.randint(3, 4000, (2, 40), generator=torch.Generator().manual_seed(0))
    floats = AutoModelForCausalLM.from_pretrained(gemma4.hf, dtype=dtype).eval()(input_ids=ids).logits
    assert load_quantized(tmp_path / "vllm", dtype)(input_ids=ids).logits.equal(floats)


# Experts


@pytest.mark.parametrize(
    ("linear", "source", "rows"),
    [
        ("gate_proj", "gate_up_proj", slice(0, 64)),
        ("up_proj", "gate_up_proj", slice(64, 128)),
        ("down_proj", "down_proj", slice(0, 256)),
    ],
)
def test_each_expert_is_three_linears(experts: tuple[PackedModel, Path], linear: str, source: str, rows: slice) -> None:
    packed, folder = experts
    assert verify(packed, folder).exact
    tensors = load_file(folder / "model.safetensors")
    value = packed.read(f"model.layers.2.experts.{source}")
    assert isinstance(value, Quantized)
    for expert in range(16):
        module = f"model.layers.2.experts.{expert}.{linear}"
        shape = torch.Size(tensors[f"{module}.weight_shape"].tolist())
        assert unpack_from_int32(tensors[f"{module}.weight_packed"], 4, shape).equal(value.codes[expert, rows])
        assert tensors[f"{module}.weight_scale"].float().equal(value.step[expert, rows])
    assert not any("experts.gate_up_proj" in name or "experts.down_proj" in name for name in tensors)


@pytest.mark.parametrize(("part", "kind"), [("weight_packed", "codes"), ("weight_scale", "scales")])
@pytest.mark.parametrize("module", ["model.layers.0.experts.0.gate_proj", "model.layers.3.experts.15.down_proj"])
def test_one_bit_of_one_expert_is_found(
    experts: tuple[PackedModel, Path], tmp_path: Path, module: str, part: str, kind: str
) -> None:
    packed, folder = experts
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    edit(copy, f"{module}.{part}", flip)
    result = verify(packed, copy)
    differing = {k: getattr(result, f"differing_{k}") for k in ("codes", "scales", "values")}
    assert differing == {"codes": 0, "scales": 0, "values": 0} | {kind: 1} and not result.exact


def test_gate_and_up_that_are_exchanged_are_found(experts: tuple[PackedModel, Path], tmp_path: Path) -> None:
    packed, folder = experts
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tensors, expert = load_file(copy / "model.safetensors"), "model.layers.1.experts.7"
    for part in ("weight_packed", "weight_scale"):
        gate, up = f"{expert}.gate_proj.{part}", f"{expert}.up_proj.{part}"
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert verify(packed, copy).differing_codes > 1000


def test_experts_that_stay_floats_are_one_tensor(experts: tuple[PackedModel, Path], tmp_path: Path) -> None:
    packed = pack(experts[0].path.parent / "checkpoint", tmp_path / "packed", _with_rule("expert", "bf16"))
    export_vllm(packed, tmp_path / "vllm")
    assert verify(packed, tmp_path / "vllm").exact
    assert load_file(tmp_path / "vllm" / "model.safetensors")["model.layers.0.experts.down_proj"].shape == (16, 256, 64)
    patterns = QuantizationConfig.model_validate(vllm_config(packed.plan)["quantization_config"]).ignore
    assert r"re:.*\blayers\.(0|1|2|3)\.experts\.\d+\.(gate|up)_proj$" in patterns


def test_experts_of_one_layer_must_be_of_one_kind() -> None:
    table = '[weights.odd]\nmatch = "layers.1.experts.down_proj"\ngrid = "bf16"\n\n'
    text = Recipe.load("q4_0").to_toml().replace("[weights.", table + "[weights.", 1)
    with pytest.raises(RecipeError, match=r"experts\.0\.gate_proj and .*experts\.0\.down_proj are quantized diff"):
        vllm_config(make_plan(GEMMA4_MOE, Recipe.from_toml(text)))


def test_the_published_mixture_has_a_name_for_each_linear_of_each_expert() -> None:
    plan = make_plan(bundled_spec("gemma-4-26b-a4b"), "q4_0")
    names = {tensor.name for tensor in compressed_tensors(plan)}
    experts = [name for name in names if re.search(r"\.layers\.\d+\.experts\.\d+\.\w+_proj\.weight_packed$", name)]
    assert len(experts) == 30 * 128 * 3
    quantization = vllm_config(plan)["quantization_config"]
    assert [group["targets"] for group in quantization["config_groups"].values()] == [["Linear"]]
    assert any(r"\.router\.proj$" in pattern for pattern in quantization["ignore"])


# MLX


def test_mlx_groups_divide_rows_and_slices(mobile_packed: PackedModel, gemma4: Case) -> None:
    said = mlx_config(mobile_packed.plan)["quantization"]
    assert (said["bits"], said["group_size"]) == (4, 128)
    assert said["model.embed_tokens_per_layer"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert said["model.embed_tokens"]["bits"] == 2
    assert mlx_config(gemma4.packed.plan)["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}


def test_mlx_has_no_group_for_a_narrow_row() -> None:
    plan = make_plan(GEMMA4 | {"hidden_size_per_layer_input": 16}, "mobile")
    with pytest.raises(
        RecipeError, match=r"scales of grid int. are for 16 columns each: MLX has groups of 32, 64 and 128"
    ):
        mlx_config(plan)


def test_mlx_would_take_other_heads(gemma4: Case) -> None:
    config = GEMMA4 | {
        "num_global_key_value_heads": 1,
        "per_layer_config": {layer: {"num_key_value_heads": 1, "head_dim": 128} for layer in "13"},
    }
    with pytest.raises(ConfigError, match="mlx-lm takes num_key_value_heads for every layer"):
        mlx_config(make_plan(config, "q4_0"))


def test_a_quantized_embedding_is_packed_for_mlx(tmp_path: Path) -> None:
    recipe = Recipe.load("q4_0", ["weights.token_embedding.grid=q4_0"])
    packed = pack(make_checkpoint(tmp_path / "checkpoint", SMALL), tmp_path / "packed", recipe)
    export_mlx(packed, tmp_path / "mlx")
    assert load_file(tmp_path / "mlx" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.uint32
    assert verify(packed, tmp_path / "mlx").exact


# Reading back


def flip(tensor: Tensor) -> None:
    """The lowest bit of the first element."""
    tensor.view(-1).view(torch.uint8)[0] ^= 1


@pytest.mark.parametrize(
    ("target", "name", "kind"),
    [
        ("vllm", f"{Q_PROJ}.weight_packed", "codes"),
        ("vllm", f"{Q_PROJ}.weight_scale", "scales"),
        ("vllm", f"{Q_PROJ}.output_scale", "static_scales"),
        ("vllm", "model.norm.weight", "values"),
        ("mlx", f"{Q_PROJ}.weight", "codes"),
        ("mlx", f"{Q_PROJ}.scales", "scales"),
        ("mlx", f"{Q_PROJ}.biases", "scales"),
        ("mlx", "model.norm.weight", "values"),
    ],
)
def test_a_single_bit_is_found(narrow: PackedModel, tmp_path: Path, target: str, name: str, kind: str) -> None:
    {"vllm": export_vllm, "mlx": export_mlx}[target](narrow, tmp_path / "out")
    assert verify(narrow, tmp_path / "out").exact
    edit(tmp_path / "out", name, flip)
    result = verify(narrow, tmp_path / "out")
    assert not result.exact
    assert {k: getattr(result, f"differing_{k}") for k in ("codes", "scales", "static_scales", "values")} == {
        k: int(k == kind) for k in ("codes", "scales", "static_scales", "values")
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["quantization_config"]["config_groups"]["group_1"]["weights"].update(num_bits=8),
        lambda c: c["quantization_config"]["config_groups"]["group_1"]["targets"].pop(0),
        lambda c: c["quantization_config"]["config_groups"]["group_1"].update(input_activations=None),
        lambda c: c["quantization_config"]["ignore"].append("re:.*o_proj"),
    ],
)
def test_a_config_that_says_otherwise_is_found(
    narrow: PackedModel, tmp_path: Path, change: Callable[[dict], Any]
) -> None:
    export_vllm(narrow, tmp_path / "out")
    edit_config(tmp_path / "out", change)
    result = verify(narrow, tmp_path / "out")
    assert not result.exact and "in config.json" in result.unlike[0]


def test_mlx_groups_that_say_otherwise_are_found(narrow: PackedModel, tmp_path: Path) -> None:
    export_mlx(narrow, tmp_path / "out")
    edit_config(tmp_path / "out", lambda c: c["quantization"].pop("model.embed_tokens"))
    assert verify(narrow, tmp_path / "out").unlike == ("model.embed_tokens in config.json",)


def test_a_word_too_few_and_a_wrong_shape_are_found(gemma4: Case, tmp_path: Path) -> None:
    export_vllm(gemma4.packed, tmp_path / "out")
    edit(tmp_path / "out", f"{Q_PROJ}.weight_shape", lambda t: t.copy_(t.flip(0) + 1))
    assert verify(gemma4.packed, tmp_path / "out").unlike == (f"{Q_PROJ}.weight_shape",)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors[f"{Q_PROJ}.weight_scale"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert verify(gemma4.packed, tmp_path / "out").missing == (f"{Q_PROJ}.weight_scale",)
