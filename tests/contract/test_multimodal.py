"""Models with towers, and without encoders: text on its grid, everything beside it carried through unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from intaglio.errors import ConfigError
from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.gguf.names import GGUF_ROPE_FACTORS, gguf_name
from intaglio.formats.gguf.write import export_gguf
from intaglio.formats.verify import verify
from intaglio.numerics.grid import Quantized
from intaglio.packed.checkpoint import checkpoint_spec, load_model
from intaglio.packed.model import PackedModel
from intaglio.plan.carried import TOWERS
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.train.quantize import quantize
from tests.support.cli import intaglio
from tests.support.tiny import MULTIMODAL, UNIFIED, make_checkpoint

CONFIGS = {"towers": MULTIMODAL, "unified": UNIFIED}


@pytest.fixture(scope="module", params=CONFIGS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PackedModel]:
    """A folder with source, hf and model.gguf, and the packed model. Shared: not to be changed."""
    folder = tmp_path_factory.mktemp(request.param)
    source = make_checkpoint(folder / "source", CONFIGS[request.param])
    (source / "processor_config.json").write_text('{"processor_class": "Gemma4Processor"}', "utf-8")
    packed = quantize(source, make_plan(checkpoint_spec(source), "q4_0"), folder / "packed")
    export_hf(packed, folder / "hf")
    export_gguf(packed, folder / "model.gguf")
    return folder, packed


def test_what_is_beside_the_text_is_unchanged(exported: tuple[Path, PackedModel]) -> None:
    folder, packed = exported
    source, written = (load_file(folder / name / "model.safetensors") for name in ("source", "hf"))
    assert source.keys() == written.keys()
    beside = [name for name in source if name.startswith(TOWERS)]
    assert beside
    for name in beside:
        assert source[name].dtype == written[name].dtype and torch.equal(source[name], written[name]), name
    linear = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(source[linear], written[linear])  # on its grid
    assert verify(packed, folder / "hf").exact
    assert (folder / "hf/processor_config.json").read_bytes() == (folder / "source/processor_config.json").read_bytes()


def test_transformers_opens_the_whole_and_sees_the_same(exported: tuple[Path, PackedModel]) -> None:
    folder, _ = exported
    before = AutoModelForImageTextToText.from_pretrained(folder / "source", dtype=torch.float32).eval()
    after, info = AutoModelForImageTextToText.from_pretrained(
        folder / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    features = [image_features(model.eval()) for model in (before, after)]
    assert torch.equal(*features)
    text = load_model(folder / "hf")
    ids = torch.arange(300, 340)[None]
    with torch.no_grad():
        assert torch.equal(text(ids).logits, after(ids).logits)


@torch.no_grad()
def image_features(model: Any) -> torch.Tensor:
    """Soft tokens of an image of twelve by twelve patches of one tiny tower."""
    vision = model.config.vision_config
    unified = vision.model_type == "gemma4_unified_vision"
    side = 4 if unified else 12  # patches: those of a model without encoders are joined already
    channels = 3 * (vision.model_patch_size if unified else vision.patch_size) ** 2
    pixels = torch.rand((1, side * side, channels), generator=torch.Generator().manual_seed(0))
    positions = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).view(1, -1, 2)
    return torch.cat(tuple(model.model.get_image_features(pixels, positions).pooler_output))


def test_the_gguf_holds_the_text_and_nothing_else(exported: tuple[Path, PackedModel]) -> None:
    folder, packed = exported
    names = {tensor.name for tensor in GGUFReader(folder / "model.gguf").tensors}
    assert names == {gguf_name(tensor.name) for tensor in packed.plan} | {GGUF_ROPE_FACTORS}
    assert verify(packed, folder / "model.gguf").exact


def test_a_recipe_may_quantize_what_is_beside(exported: tuple[Path, PackedModel], tmp_path: Path) -> None:
    folder, _ = exported
    towers = [
        "weights.towers.roles=['tower_linear']",
        "weights.towers.match='embed_|layers'",
        "weights.towers.grid=q8_0",
    ]
    recipe = Recipe.load("q4_0", [*towers, "weights.towers.trainable=false"])
    packed = quantize(folder / "source", make_plan(checkpoint_spec(folder / "source"), recipe), tmp_path / "packed")
    export_hf(packed, tmp_path / "hf")
    assert verify(packed, tmp_path / "hf").exact
    written = load_file(tmp_path / "hf/model.safetensors")
    moved = [t.name for t in packed.plan.carried if isinstance(packed.read(t.name), Quantized)]
    assert moved
    for name in moved:
        assert torch.equal(written[name].float(), packed.decode(name))


def test_a_trained_text_model_is_joined_by_what_is_beside(exported: tuple[Path, PackedModel], tmp_path: Path) -> None:
    folder, _ = exported
    text = quantize(folder / "source", make_plan(folder / "source", "q4_0"), tmp_path / "text")
    plan = make_plan(checkpoint_spec(folder / "source"), text.plan.recipe)
    whole = quantize(folder / "source", plan, tmp_path / "whole", trained=text)
    export_hf(whole, tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (folder / "hf/model.safetensors").read_bytes()


def test_the_command_says_where_towers_go(exported: tuple[Path, PackedModel], tmp_path: Path) -> None:
    folder, _ = exported
    done = intaglio("export", folder / "packed", "gguf", "-o", tmp_path / "model.gguf")
    assert "mmproj" in done.out and "text model alone" in done.out
    assert "mmproj" not in intaglio("export", folder / "packed", "hf", "-o", tmp_path / "hf").out


def test_a_missing_embedder_is_named(exported: tuple[Path, PackedModel], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder, _ = exported
    damaged = Path(shutil.copytree(folder / "source", tmp_path / "source"))
    tensors = load_file(damaged / "model.safetensors")
    name = next(name for name in tensors if name.startswith("model.embed_vision."))
    del tensors[name]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 tensors are missing, the first is model\.embed_vision.*--text-only"):
        quantize(damaged, make_plan(checkpoint_spec(damaged), "q4_0"), tmp_path / "packed")
