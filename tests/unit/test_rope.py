"""Scaled rotary embeddings: what each runtime computes is written, the rest refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intaglio.errors import ConfigError
from intaglio.formats.checkpoint.write import export_hf
from intaglio.formats.gguf.names import gguf_rope_factors
from intaglio.formats.gguf.write import check_supported, export_gguf
from intaglio.formats.verify import verify
from intaglio.formats.words.write_mlx import export_mlx
from intaglio.plan.family import ModelSpec, describe
from intaglio.plan.rope import check_rope, ropes
from tests.support.tiny import GEMMA3, GEMMA4, ROPES, make_checkpoint, pack, with_rope

CHECKS: dict[str, Callable[[ModelSpec], None]] = {
    "llama.cpp": check_supported,
    "mlx-lm": lambda spec: check_rope(spec, "mlx-lm"),
    "vLLM": lambda spec: check_rope(spec, "vLLM"),
    "a traced graph": lambda spec: check_rope(spec, "a traced graph"),
}
# Which runtimes compute what: as llama.cpp's gemma4.cpp has factors for full layers alone, vLLM's proportional
# embedding has no factor, and a graph knows no lengths.
COMPUTED = {
    "plain": {"llama.cpp", "mlx-lm", "vLLM", "a traced graph"},
    "half a share": {"llama.cpp", "mlx-lm", "vLLM", "a traced graph"},
    "proportional, factor 8": {"llama.cpp", "mlx-lm", "a traced graph"},
    "linear, full layers": {"llama.cpp", "mlx-lm", "vLLM", "a traced graph"},
    "linear, sliding layers": {"mlx-lm", "vLLM", "a traced graph"},
    "llama3": {"llama.cpp", "a traced graph"},
    "yarn": {"a traced graph"},
    "yarn without its factor on attention": {"llama.cpp", "a traced graph"},
    "dynamic": set(),
}


@pytest.mark.parametrize("runtime", CHECKS)
@pytest.mark.parametrize("name", COMPUTED)
def test_each_runtime_takes_what_it_computes_and_no_other(name: str, runtime: str) -> None:
    spec = describe(with_rope(GEMMA4, ROPES[name]))
    if runtime in COMPUTED[name]:
        CHECKS[runtime](spec)
        return
    with pytest.raises(ConfigError, match=r"would compute another rotary embedding: export it to hf"):
        CHECKS[runtime](spec)


@pytest.mark.parametrize(("kind", "taken"), [("linear", True), ("yarn", False), ("llama3", False), ("dynamic", False)])
def test_gemma3_in_llamacpp_has_one_factor_for_all_angles(kind: str, taken: bool) -> None:
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    more |= {"original_max_position_embeddings": 512} if kind in ("yarn", "llama3") else {}
    full = {"rope_theta": 1e6, "rope_type": kind, "factor": 8.0} | more
    sliding = {"rope_theta": 1e4, "rope_type": "default"}
    spec = describe(GEMMA3 | {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}})
    if taken:
        check_supported(spec)
    else:
        with pytest.raises(ConfigError, match="would compute another rotary embedding"):
            check_supported(spec)


def test_factors_in_the_file_are_what_slows_an_angle() -> None:
    assert gguf_rope_factors(describe(GEMMA4)) == [1.0] * 16 + [1e30] * 48
    spec = describe(with_rope(GEMMA4, ROPES["proportional, factor 8"]))
    assert gguf_rope_factors(spec) == [8.0] * 16 + [1e30] * 48
    slower = ropes(spec.layer_config)["full_attention"].angles
    assert slower[0] == 1 / 8 and slower[15] > 0 == slower[16]


@pytest.mark.parametrize("name", ["proportional, factor 8", "llama3"])
def test_a_file_with_the_plain_models_angles_is_noticed(tmp_path: Path, name: str) -> None:
    """The same weights, once with scaled angles and once without: each file is exact for its own model alone."""
    packed: dict[str, Any] = {}
    for kind in (name, "plain"):
        checkpoint = make_checkpoint(tmp_path / kind / "c", with_rope(GEMMA4, ROPES[kind]))
        packed[kind] = pack(checkpoint, tmp_path / kind / "p")
        export_gguf(packed[kind], tmp_path / kind / "x.gguf")
        assert verify(packed[kind], tmp_path / kind / "x.gguf").exact
    found = verify(packed[name], tmp_path / "plain" / "x.gguf")
    assert any(text.startswith("config: rope of full_attention is") for text in found.differing_facts)


def test_the_advice_of_the_refusal_works(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", with_rope(GEMMA4, ROPES["dynamic"]))
    packed = pack(checkpoint, tmp_path / "p")
    for export in (export_gguf, export_mlx):
        with pytest.raises(ConfigError, match="export it to hf"):
            export(packed, tmp_path / "x")
    export_hf(packed, tmp_path / "hf")
    assert verify(packed, tmp_path / "hf").exact
