"""The family table: every parameter of every kind of model has exactly one role."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from intaglio.packed.store import headers
from intaglio.plan.carried import describe_whole, text_name, unused_names
from intaglio.plan.families import FAMILIES, ROLES
from intaglio.plan.family import TOWER_ROLES, build_meta_model, describe
from intaglio.plan.mended import NEEDED_BY, kv_sharing_modes, mend_kv_sharing
from intaglio.plan.plan import make_plan
from tests.support.cases import CONFIGS
from tests.support.tiny import (
    ASSISTANT,
    FAMILY,
    GEMMA4,
    GEMMA4_MOE,
    MULTIMODAL,
    UNIFIED,
    UNIFIED_ASSISTANT,
    make_checkpoint,
)

ROOT = Path(__file__).parents[2]
each_kind = pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)


@each_kind
def test_every_parameter_has_exactly_one_role(config: dict[str, Any], tmp_path: Path) -> None:
    """Names in a checkpoint as transformers saves it; some differ from the state dict's."""
    stored = headers(make_checkpoint(tmp_path, config) / "model.safetensors")
    spec = describe_whole(config)
    planned = [*spec.tensors, *spec.carried]
    assert len({tensor.name for tensor in planned}) == len(planned)
    assert {tensor.name: tensor.shape for tensor in planned} == {text_name(n): s for n, (_, s) in stored.items()}
    trained = sum(math.prod(p.shape) for p in build_meta_model(config).parameters())
    assert sum(tensor.numel for tensor in planned if not tensor.buffer) == trained
    for tensor in spec.tensors:
        assert [role for pattern, role in ROLES if re.search(pattern, tensor.name)] == [tensor.role]
    assert {tensor.role for tensor in spec.carried} <= set(TOWER_ROLES)


def test_each_family_has_a_tiny_model_which_goes_through_all_exports() -> None:
    described = {describe(config).family.model_type for config in FAMILY.values()}
    assert described == set(FAMILIES)
    models = {family.gguf_architecture for family in FAMILIES.values() if not family.drafter}
    assert {describe(config).family.gguf_architecture for config in CONFIGS.values()} == models


def test_what_a_family_needs_is_listed() -> None:
    """CONTRIBUTING.md names the files, and each of them has every family."""
    section = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## Add a family")[2]
    rows = re.findall(r"^\d\. `([^`]+)`", section, re.MULTILINE)
    assert len(rows) == 3
    for name in rows:
        assert set(FAMILIES) <= set(re.findall(r"\w+", (ROOT / name).read_text("utf-8"))), name
    for name in re.findall(r"`((?:src|tests|docs)/[^`]+)`", section):
        assert (ROOT / name).exists(), name


def test_roles_of_experts_and_their_router() -> None:
    roles = {tensor.name.partition("layers.0.")[2]: tensor for tensor in describe(GEMMA4_MOE).tensors}
    assert (roles["experts.gate_up_proj"].role, roles["experts.gate_up_proj"].shape) == ("expert", (16, 2 * 64, 256))
    assert (roles["experts.down_proj"].role, roles["experts.down_proj"].shape) == ("expert", (16, 256, 64))
    router = {name for name, tensor in roles.items() if tensor.role == "router"}
    assert router == {"router.proj.weight", "router.scale", "router.per_expert_scale"}
    plan = make_plan(GEMMA4_MOE, "q4_0")
    down = plan["model.layers.0.experts.down_proj"]
    assert (down.grid.name, down.size_bytes) == ("q4_0", 16 * 256 * 64 // 32 * 18)
    assert plan["model.layers.0.router.proj.weight"].grid.name == "f32"


def test_keys_that_are_values_need_no_v_proj() -> None:
    names = {tensor.name for tensor in describe(GEMMA4_MOE).tensors}
    assert "model.layers.0.self_attn.v_proj.weight" in names
    assert "model.layers.1.self_attn.v_proj.weight" not in names  # the full layer
    assert "model.layers.1.self_attn.k_proj.weight" in names


def test_unused_tensors_of_shared_layers_are_known_and_not_needed() -> None:
    spec = describe(GEMMA4)
    found = ["model.layers.2.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight"]
    assert unused_names(found, spec) == found[:1]
    (tensor,) = describe_whole(GEMMA4, found[:1]).carried
    assert (tensor.role, tensor.shape) == ("attention", (2 * 64, 256))


def test_clipped_linears_carry_four_bounds_each() -> None:
    carried = {tensor.name: tensor for tensor in describe_whole(MULTIMODAL).carried}
    clipped = [name.removesuffix(".linear.weight") for name in carried if name.endswith(".linear.weight")]
    bounds = {f"{name}.{side}_{end}" for name in clipped for side in ("input", "output") for end in ("min", "max")}
    assert {name for name in carried if name.endswith(("_min", "_max"))} == bounds
    assert {carried[name].role for name in bounds} == {"tower_float"}


def test_embedders_without_encoders_are_carried() -> None:
    carried = {tensor.name: tensor.role for tensor in describe_whole(UNIFIED).carried}
    assert carried["model.vision_embedder.patch_dense.weight"] == "tower_linear"
    assert carried["model.vision_embedder.pos_embedding"] == "tower_float"
    assert carried["model.embed_audio.embedding_projection.weight"] == "tower_linear"
    assert not any("tower" in name for name in carried)


def test_drafters_have_no_keys_and_values_of_their_own() -> None:
    for config in (ASSISTANT, UNIFIED_ASSISTANT):
        spec = describe(config)
        assert spec.kv_donors == ()
        assert {tensor.role for tensor in spec.tensors} >= {"drafter_projection", "attention", "token_embedding"}
        assert not any("k_proj" in tensor.name for tensor in spec.tensors)
    assert {tensor.role for tensor in describe(ASSISTANT).tensors} >= {"centroids", "token_ordering"}


def test_the_mended_property_is_needed_where_it_is_used_and_right() -> None:
    """Fails when transformers is no longer wrong, and the mend may go."""
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

    def own(**changes: Any) -> Any:
        return Gemma4TextConfig(**{k: v for k, v in (GEMMA4 | changes).items() if k != "model_type"})

    needed = transformers.__version__.startswith(NEEDED_BY)
    assert mend_kv_sharing() == needed
    assert kv_sharing_modes(own()) == ["store", "store", "reuse", "reuse"]
    assert kv_sharing_modes(own(num_kv_shared_layers=0)) == [None, None, "store", "store"]
    assert kv_sharing_modes(own(num_kv_shared_layers=4)) == ["reuse"] * 4
    if needed:
        source = transformers_own_property()
        with pytest.raises(ValueError, match="layer types producing a cache"):
            source(own(num_kv_shared_layers=4))
        assert source(own(num_kv_shared_layers=0)) == [None] * 4


def transformers_own_property() -> Any:
    """`kv_sharing_modes` as transformers' file has it, whatever was done to the class."""
    import importlib.util

    found = importlib.util.find_spec("transformers.models.gemma4.configuration_gemma4")
    source = Path(found.origin).read_text("utf-8")
    body = re.search(r"    @property\n(    def kv_sharing_modes.*?)\n\n    def ", source, re.DOTALL)[1]
    scope: dict[str, Any] = {}
    exec(re.sub(r"^    ", "", body, flags=re.MULTILINE), scope)
    return scope["kv_sharing_modes"]
