"""Sizes before there is a file: parameters of the whole family, and bytes equal to those of files that are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import save_file

from intaglio.formats.gguf.write import export_gguf
from intaglio.formats.mobile.layout import stored_tensors
from intaglio.formats.mobile.write import export_mobile
from intaglio.packed.checkpoint import checkpoint_spec
from intaglio.packed.model import PackedModel
from intaglio.plan.bundled import bundled_config, bundled_names
from intaglio.plan.carried import describe_whole
from intaglio.plan.family import describe
from intaglio.plan.plan import make_plan
from intaglio.sizing.components import kv_cache_bytes, parameters
from intaglio.sizing.footprint import footprint, longest_context
from intaglio.sizing.planning import bundled_spec
from intaglio.sizing.sizes import GEMMA_METADATA_BYTES, gguf_size, mobile_size, w4a16_size, w4a16_tensors
from intaglio.train.quantize import quantize
from tests.support.cases import Case
from tests.support.tiny import (
    ASSISTANT,
    GEMMA2,
    GEMMA3,
    GEMMA4,
    GEMMA4_DENSE,
    GEMMA4_MOE,
    GEMMA4_UNIFIED_TEXT,
    MULTIMODAL,
    UNIFIED,
    add_unused,
    build,
    make_checkpoint,
)

# Parameters by component, of the architecture; a tower without its embedder.
FAMILY = {
    "e2b": dict(total=5_104_297_504, token_embedding=402_653_184, ple_embedding=2_348_810_240, attention=278_396_928,
        mlp=1_557_135_360, ple_linear=27_525_120, ple_model_projection=13_762_560, vision=167_364_608,
        audio=304_824_608),
    "e4b": dict(total=7_941_100_832, token_embedding=671_088_640, ple_embedding=2_818_572_288, attention=587_202_560,
        mlp=3_303_014_400, ple_linear=55_050_240, ple_model_projection=27_525_120, vision=167_364_608,
        audio=304_824_608),
    "12b": dict(total=11_959_730_176, token_embedding=1_006_632_960, attention=2_406_481_920, mlp=8_493_465_600,
        embed_vision=49_922_304, embed_audio=2_457_600),
    "26b-a4b": dict(total=25_805_933_872, token_embedding=738_197_504, attention=1_110_179_840, mlp=535_265_280,
        expert=22_837_985_280, router=10_901_760, vision=569_548_080),
    "31b": dict(total=31_273_086_512, token_embedding=1_409_286_144, attention=8_477_736_960, mlp=20_808_990_720,
        vision=569_548_080),
    "e2b-assistant": dict(total=77_731_328),
    "e4b-assistant": dict(total=78_517_760),
    "12b-assistant": dict(total=422_856_960),
    "26b-a4b-assistant": dict(total=419_711_232),
    "31b-assistant": dict(total=469_518_592),
}  # fmt: skip
SMALL_PARTS = {"norm", "embed_vision", "embed_audio", "drafter_projection", "centroids"}  # not in the table


@pytest.mark.parametrize("name", FAMILY)
def test_parameters_of_the_family(name: str) -> None:
    assert f"gemma-4-{name}" in bundled_names()
    counts = parameters(bundled_spec(f"gemma-4-{name}"))
    expected = FAMILY[name].copy()
    assert sum(counts.values()) == expected.pop("total")
    assert {part: counts[part] for part in expected} == expected
    if "assistant" not in name:
        assert set(counts) - set(expected) <= SMALL_PARTS


# Files as they are written


def metadata_bytes(path: Path) -> int:
    """Bytes of a GGUF's keys and values."""
    fields = GGUFReader(path).fields.values()
    return sum(int(part.nbytes) for field in fields if not field.name.startswith("GGUF.") for part in field.parts)


def test_a_gguf_has_the_predicted_size(case: Case) -> None:
    predicted = gguf_size(case.packed.plan, metadata_bytes(case.gguf))
    assert predicted.total == case.gguf.stat().st_size
    assert predicted.data == sum(int(tensor.n_bytes) for tensor in GGUFReader(case.gguf).tensors)


def packed(folder: Path, config: dict[str, Any], recipe: str, unused: bool = False) -> PackedModel:
    source = make_checkpoint(folder / "source", config)
    if unused:
        add_unused(source)
    return quantize(source, make_plan(checkpoint_spec(source), recipe), folder / "packed")


@pytest.mark.parametrize("config", [MULTIMODAL, UNIFIED], ids=["towers", "unified"])
def test_a_multimodal_model_has_the_predicted_sizes(tmp_path: Path, config: dict[str, Any]) -> None:
    model = packed(tmp_path, config, "q4_0")
    export_gguf(model, tmp_path / "model.gguf")
    assert gguf_size(model.plan, metadata_bytes(tmp_path / "model.gguf")).total == (
        (tmp_path / "model.gguf").stat().st_size
    )


@pytest.mark.parametrize("text_only", [False, True])
def test_a_mobile_folder_has_the_predicted_size(tmp_path: Path, text_only: bool) -> None:
    model = packed(tmp_path, MULTIMODAL, "mobile-e4b", unused=True)
    model = model.text_only() if text_only else model
    export_mobile(model, tmp_path / "mobile")
    written = (tmp_path / "mobile/model.safetensors").stat().st_size
    size = footprint(model.plan, 0)
    assert mobile_size(model.plan).total == size.file.total == written
    assert size.total("disk_bytes") == size.file.data
    kept = size.total("resident_bytes") + size.total("mapped_bytes")
    assert size.file.data - kept == sum(p.disk_bytes for p in size.parts if p.component == "unused") > 0


@pytest.mark.parametrize("config", [GEMMA4_MOE, UNIFIED, MULTIMODAL], ids=["moe", "unified", "towers"])
def test_a_w4a16_file_has_the_predicted_size(tmp_path: Path, config: dict[str, Any]) -> None:
    plan = make_plan(describe_whole(config), "q4_0")
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in w4a16_tensors(plan).items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})  # its own order of tensors
    assert w4a16_size(plan).total == (tmp_path / "model.safetensors").stat().st_size
    if config is GEMMA4_MOE:
        up = "model.layers.0.experts.15.up_proj"
        assert tensors[f"{up}.weight_packed"].shape == (64, 256 // 8)
        assert tensors[f"{up}.weight_scale"].shape == (64, 256 // 32)
        assert tensors["model.layers.0.router.proj.weight"].dtype == torch.bfloat16


def test_a_drafter_without_its_clustered_head() -> None:
    plan = make_plan(ASSISTANT, "q4_0")
    left_out = sum(t.size_bytes for t in plan if t.name.startswith("masked_embedding"))
    assert left_out == 64 * 512 * 2 + 8 * 4096
    rope = 4 * 128 // 2
    assert gguf_size(plan).data == plan.size_bytes - left_out + rope


# Memory


def test_what_a_phone_keeps_of_the_mobile_models() -> None:
    """Codes of everything but the mapped tables, with a byte a weight of the per-layer projection, in MB."""
    for name, expected_mb in (("e2b", 776.6), ("e4b", 2195)):
        plan = make_plan(bundled_spec(f"gemma-4-{name}").text_only(), f"mobile-{name}")
        codes = [part for part in stored_tensors(plan) if part.part == "codes" and "embed_tokens" not in part.name]
        projection = plan["model.per_layer_model_projection.weight"].spec.numel
        total = projection + sum(part.shape[0] * part.shape[1] for part in codes)
        assert total / 1e6 == pytest.approx(expected_mb, abs=0.5)


def test_tables_that_are_looked_up_are_mapped() -> None:
    gguf = {p.component: p for p in footprint(make_plan(GEMMA4, "q4_0"), GEMMA_METADATA_BYTES).parts}
    mobile = {p.component: p for p in footprint(make_plan(GEMMA4, "mobile"), GEMMA_METADATA_BYTES).parts}
    assert gguf["ple_embedding"].resident_bytes == 0 < gguf["ple_embedding"].mapped_bytes
    assert gguf["token_embedding"].mapped_bytes == 0  # it is the head
    assert mobile["token_embedding"].resident_bytes == 0
    assert mobile["head"].resident_bytes == mobile["token_embedding"].mapped_bytes


@pytest.mark.parametrize("config", [GEMMA4, GEMMA4_DENSE, GEMMA3, GEMMA2], ids=["shared", "dense", "gemma3", "gemma2"])
def test_the_kv_cache_is_transformers_own(config: dict[str, Any]) -> None:
    """Full layers hold every token; sliding ones a window, of which transformers drops the oldest one early."""
    tokens = 3 * config["sliding_window"]
    model = build(config).eval()
    with torch.no_grad():
        cache = model(torch.ones(2, tokens, dtype=torch.long), use_cache=True).past_key_values
    held = {"sliding": 0, "full": 0}
    for layer in cache.layers:
        if layer.keys is not None:
            window = layer.keys.shape[-2] < tokens
            per_token = (layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[-2]
            held["sliding" if window else "full"] += layer.keys.nbytes + layer.values.nbytes + per_token * window
    predicted = kv_cache_bytes(describe(config), tokens, batch=2, bits=32)
    assert predicted == held | {"total": sum(held.values())}
    half = kv_cache_bytes(describe(config), tokens, batch=2, bits=8)
    assert 4 * half["total"] == predicted["total"]


def test_kv_of_e2b_at_32k() -> None:
    """Three full layers of one head of 512 that hold everything, twelve sliding ones of 256 that hold 512 tokens."""
    found = kv_cache_bytes(bundled_spec("gemma-4-e2b"), 32768)
    assert found["full"] == 3 * 2 * 512 * 32768 * 2
    assert found["sliding"] == 12 * 2 * 256 * 512 * 2


def test_the_longest_context_is_the_longest() -> None:
    plan = make_plan(GEMMA4_UNIFIED_TEXT, "q4_0")
    limit = GEMMA4_UNIFIED_TEXT["max_position_embeddings"]
    for tokens in (1, 33, 1000):
        free = kv_cache_bytes(plan.model, tokens, batch=3, bits=8)["total"]
        assert longest_context(plan, free, 8, batch=3) == tokens
        assert longest_context(plan, free - 1, 8, batch=3) == tokens - 1
    assert longest_context(plan, 1 << 50, 8) == limit
    assert longest_context(plan, -1, 8) == longest_context(plan, 0, 8) == 0


def test_bundled_configs_are_complete_and_plain() -> None:
    for name in bundled_names():
        config = bundled_config(name)
        assert json.dumps(config) and config["model_type"].startswith("gemma4")


PAGE = Path(__file__).parents[2] / "docs/sizes.md"


def test_the_page_of_sizes_is_what_is_computed() -> None:
    """Each GGUF, and the mobile folder of E2B, whose tensor data an export of random weights has too."""
    rows = [[cell.strip().replace(",", "") for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines()]
    for name in bundled_names():
        first = next(row for row in rows if row and row[0] == name)
        assert int(first[4]) == gguf_size(make_plan(bundled_spec(name), "q4_0")).total
    assert any(row[:2] == ["gemma-4-e2b", "2457736446"] for row in rows)
