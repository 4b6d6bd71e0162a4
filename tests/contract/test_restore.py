"""Conversion of what `export hf` wrote: the packed model comes back bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from intaglio.formats.checkpoint.kept import KEPT_FILE
from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.verify import verify
from intaglio.packed.checkpoint import checkpoint_spec
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe, preset_names
from intaglio.sources.convert import convert
from intaglio.train.quantize import quantize
from tests.support.cases import Case
from tests.support.cli import contents, intaglio
from tests.support.repack import resave
from tests.support.tiny import (
    ASSISTANT,
    GEMMA3,
    GEMMA4,
    GEMMA4_MOE,
    MULTIMODAL,
    UNIFIED,
    add_unused,
    make_checkpoint,
)

NARROW = GEMMA4 | {"hidden_size_per_layer_input": 32}
TEXT_PRESETS = [name for name in preset_names() if "drafter" not in name and name not in ("mobile-e2b", "mobile-e4b")]
MODELS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    **{f"gemma4 by {name}": (GEMMA4, name, ()) for name in TEXT_PRESETS},
    "gemma4 by mobile with bfloat16 scales": (GEMMA4, "mobile", ("channel_scales=bf16",)),
    "gemma3": (GEMMA3, "q4_0", ()),
    "gemma3 by q4_0-free": (GEMMA3, "q4_0-free", ()),
    "a mixture": (GEMMA4_MOE, "q4_0", ()),
    "towers": (MULTIMODAL, "q4_0", ()),
    "towers by mobile": (MULTIMODAL, "mobile", ()),
    "embedders": (UNIFIED, "q4_0", ()),
    "another grid for the per-layer embeddings": (NARROW, "q4_0", ("weights.ple_embedding.grid=q8_0",)),
    "an untied head": (GEMMA4 | {"tie_word_embeddings": False}, "q4_0", ()),
    "a drafter": (ASSISTANT, "drafter-q4_0", ()),
    "a drafter by drafter-mobile": (ASSISTANT, "drafter-mobile", ()),
    "a drafter in floats": (ASSISTANT, "drafter", ()),
}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpoint_of_ours_is_the_packed_model_again(kind: str, tmp_path: Path) -> None:
    config, recipe, overrides = MODELS[kind]
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config)
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[embedding][3] = 0  # a row of zeros has codes and scales of its own by each fit
    tensors[embedding][5] *= -0.0
    save_file(tensors, path, {"format": "pt"})
    if config in (GEMMA4, MULTIMODAL):
        add_unused(checkpoint)
    plan = make_plan(checkpoint_spec(checkpoint), Recipe.load(recipe, overrides))
    packed = quantize(checkpoint, plan, tmp_path / "packed")
    static: dict[str, torch.Tensor] = {}
    scales = [scale.name for scale in plan.static_scales if scale.owned]
    if scales:  # as calibration leaves them
        owners = {scale.name: scale.owner for scale in plan.static_scales}
        static |= {name: torch.tensor(0.01 * (1 + scales.index(owner))) for name, owner in owners.items()}
        resave(packed.path, static)
        packed = PackedModel.open(packed.path)
    export_hf(packed, tmp_path / "hf")
    assert verify(packed, tmp_path / "hf").exact
    outcome = intaglio("convert", tmp_path / "hf", f"--out={tmp_path / 'again'}")
    assert outcome.code == 0, outcome.err
    assert "LOSSY" not in outcome.out and "fitted" not in outcome.out
    mine, again = contents(packed.path), contents(tmp_path / "again")
    assert mine.keys() == again.keys()
    if not scales:  # whose file a test has written
        assert mine == again
    first, second = load_file(packed.path / "packed.safetensors"), load_file(tmp_path / "again/packed.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(bits(tensor), bits(second[name])), name


def test_text_only_leaves_the_towers_out(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", MULTIMODAL)
    packed = quantize(checkpoint, make_plan(checkpoint_spec(checkpoint), "q4_0"), tmp_path / "packed")
    export_hf(packed, tmp_path / "hf")
    text = convert(tmp_path / "hf", tmp_path / "text", text_only=True).packed
    assert text.plan.model.whole is None
    assert verify(text, tmp_path / "hf").exact is False  # which has towers, too
    export_hf(packed.text_only(), tmp_path / "hf-text")
    assert verify(text, tmp_path / "hf-text").exact
    assert convert(tmp_path / "hf-text", tmp_path / "again").packed.sha256() == text.sha256()


@pytest.fixture
def hf(gemma4: Case, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gemma4.hf, tmp_path / "hf"))


def test_weights_that_were_changed_since_are_refused_and_can_be_taken_all_the_same(hf: Path, tmp_path: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.5
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    outcome = intaglio("convert", hf, f"--out={tmp_path / 'out'}")
    says = r"has values that its scales in intaglio\.scales do not give: .* or remove (\S+) to look for the"
    assert outcome.code == 2 and not (tmp_path / "out").exists()
    found = re.search(says, outcome.error)
    assert found, outcome.error
    Path(found[1]).unlink()
    assert intaglio("convert", hf, f"--out={tmp_path / 'out'}", "--requantize").code == 0


@pytest.mark.parametrize("key", ["rms_norm_eps", "final_logit_softcapping", "sliding_window"])
def test_a_config_that_was_changed_since_is_refused(key: str, hf: Path, tmp_path: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {key: 2 * config[key]}))
    outcome = intaglio("convert", hf, f"--out={tmp_path / 'out'}")
    assert outcome.code == 2 and f"config.json says {key} = {2 * config[key]!r}, and {KEPT_FILE}" in outcome.error


@pytest.mark.parametrize("damage", ["empty", "cut", "of another model"])
def test_damaged_scales_are_no_traceback(damage: str, hf: Path, cases: dict[str, Case], tmp_path: Path) -> None:
    data = (hf / KEPT_FILE).read_bytes()
    other = (cases["gemma4-dense"].hf / KEPT_FILE).read_bytes()
    (hf / KEPT_FILE).write_bytes({"empty": b"", "cut": data[:-100], "of another model": other}[damage])
    outcome = intaglio("convert", hf, f"--out={tmp_path / 'out'}")
    assert outcome.code == 2 and KEPT_FILE in outcome.error


def test_a_recipe_that_is_given_looks_at_the_weights_alone(gemma4: Case, tmp_path: Path) -> None:
    packed = convert(gemma4.hf, tmp_path / "out", recipe=Recipe.load("q4_0-free")).packed
    assert isinstance(packed, PackedModel) and packed.plan.recipe.name == "q4_0-free"


@pytest.mark.parametrize("name", ["gemma4", "gemma4-dense", "gemma3"])
def test_weights_alone_give_the_same_values_on_the_same_grids(
    name: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    """Without the scales, as after another program saved the folder again: every value is recovered, none is fitted."""
    case = cases[name]
    folder = Path(shutil.copytree(case.hf, tmp_path / "hf"))
    (folder / KEPT_FILE).unlink()
    outcome = intaglio("convert", folder, f"--out={tmp_path / 'out'}")
    assert outcome.code == 0 and "fitted" not in outcome.out and "LOSSY" not in outcome.out
    again = PackedModel.open(tmp_path / "out")
    assert again.plan.recipe.name == "q4_0"
    for tensor in case.packed.plan:
        assert torch.equal(again.decode(tensor.name), case.packed.decode(tensor.name)), tensor.name
    assert verify(again, case.hf).exact


def test_rows_that_q6_k_cannot_hold_are_found_on_q8_0(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", NARROW)
    plan = make_plan(checkpoint, Recipe.load("q4_0", ["weights.ple_embedding.grid=q8_0"]))
    packed = quantize(checkpoint, plan, tmp_path / "packed")
    export_hf(packed, tmp_path / "hf")
    (tmp_path / "hf" / KEPT_FILE).unlink()
    result = convert(tmp_path / "hf", tmp_path / "again")
    assert not result.fitted and not result.lossy
    assert verify(result.packed, tmp_path / "hf").exact
    assert [tensor.grid for tensor in result.packed.plan] == [tensor.grid for tensor in plan]
