"""Small inputs that would take all time or memory: each is refused with a typed error, after little work."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flatbuffers
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from intaglio.errors import ConfigError, IntaglioError, RecipeError
from intaglio.formats.litert import read_flatbuffer
from intaglio.formats.litert.read_tflite import HEADER_START, MAGIC, read_bundle
from intaglio.formats.mobile.layout import resolve_bits
from intaglio.formats.onnx.read import Graph
from intaglio.formats.words.read import _scheme_of
from intaglio.packed.model import FILE_NAME, PackedModel
from intaglio.packed.store import SafetensorsReader, SafetensorsWriter
from intaglio.plan import patterns
from intaglio.plan.carried import describe_whole
from intaglio.plan.family import describe
from intaglio.plan.patterns import Pattern
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from tests.support.tiny import GEMMA4, MULTIMODAL

# Each needs a time that is exponential in the length of a name such as "model.layers.0.self_attn.q_proj.weight".
SLOW = [
    "^" + ".*?" * 14 + "[A-Z]",
    r"^((\w+\.?)+)+!",
    r"^(([a-z0-9_.])+.)+[A-Z]([a-z])+$",
    r"^(.*?,|.*){0,30}(\w|\w\w)*(\.|\w)*\d\d!",
    r"(?=((\w|\.)+)+!)",
]
NAME = "model.layers.0.self_attn.q_proj.weight" + ".weight" * 40


@contextmanager
def within(lines: int) -> Iterator[None]:
    """Fail as soon as Python has gone through so many lines: their number is the same on a busy machine."""
    left = lines

    def count(*event: object) -> Any:
        nonlocal left
        left -= 1
        assert left, f"more than {lines:,} lines"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)
    assert left > 0, f"more than {lines:,} lines"  # where the code caught what `count` raised


def recipe_with(match: str) -> str:
    rules = [f"[weights.a]\nmatch = '''{match}'''\noptional = true", "[weights.b]\nmatch = '.'"]
    return "\n".join(["name = 'x'", *(f"{rule}\ngrid = 'bf16'" for rule in rules)])


@pytest.mark.parametrize("slow", SLOW)
def test_a_slow_pattern_is_stopped(slow: str) -> None:
    """One that regex is not slow with goes through all names; without a limit, one would not end in years."""
    once = Pattern(slow)
    with suppress(RecipeError):
        for number in range(1000):
            once.search(f"{number}.{NAME}")


def test_all_searches_of_a_pattern_share_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, given, once = 0.0, [], Pattern("a")

    def search(text: str, timeout: float) -> None:
        nonlocal now
        now += float(text)
        given.append(timeout)

    monkeypatch.setattr(patterns.time, "process_time", lambda: now)
    monkeypatch.setattr(once, "compiled", SimpleNamespace(search=search))
    for took in ("0.25", "0.001", "0.5", "0.5", "0.001"):
        once.search(took)
    assert given == [1.0, 0.75, 0.75, 0.25, patterns.SLOW]


def test_waiting_for_the_processor_makes_no_pattern_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    once = Pattern("a")
    monkeypatch.setattr(once, "compiled", SimpleNamespace(search=lambda text, timeout: time.sleep(4 * patterns.SLOW)))
    once.search("x")
    assert once.left == patterns.SECONDS


@pytest.mark.parametrize(
    "bomb", ["((((a{999}){999}){999}){999})", "(a{1000})" * 9, "(" * 5000 + ")" * 5000, "x{e<=3}", "a" * 99_999]
)
def test_a_pattern_that_is_large_when_compiled_is_refused(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns.regex, "compile", lambda text: pytest.fail("compiled"))
    with pytest.raises(RecipeError, match="is not a regular expression"):
        Recipe.from_toml(recipe_with(bomb))


@pytest.mark.parametrize(
    "harmless", [r"\.mlp\.", r"layers\.(1|2\d)\.", "[qkv]_proj", r"\d{1,3}", r"(?P<kind>up|down)", r"\{x\}"]
)
def test_an_ordinary_pattern_means_what_it_means_to_python(harmless: str) -> None:
    for name in ("model.layers.21.mlp.up_proj.weight", "model.layers.3.self_attn.q_proj.weight", "a{x}"):
        assert bool(Pattern(harmless).search(name)) == bool(re.search(harmless, name))
        assert bool(Pattern(harmless).match(name)) == bool(re.match(harmless, name))


def test_a_slow_pattern_in_a_recipe_and_in_a_packed_model(packed_copy: PackedModel) -> None:
    slow = "^" + ".*?" * 14 + "[A-Z]"
    with pytest.raises(RecipeError, match=r"takes too long on 'model.*repeats inside repeats"):
        make_plan(packed_copy.plan.model, Recipe.from_toml(recipe_with(slow)))
    path = packed_copy.path / FILE_NAME
    with SafetensorsReader(path) as file:
        file.read("model.norm.weight")
        metadata = file.file.metadata() | {"recipe": recipe_with(slow)}
    with SafetensorsWriter(path, {}, metadata):
        pass
    with pytest.raises(IntaglioError, match="takes too long"):
        PackedModel.open(packed_copy.path)


def test_slow_targets_of_vllm_and_mobile_folders() -> None:
    slow = "^" + ".*?" * 14 + "[A-Z]"
    group = {"targets": [f"re:{slow}"], "weights": {"num_bits": 4}}
    with pytest.raises(ConfigError, match="takes too long"):
        _scheme_of(NAME, True, {"config_groups": {"a": group}})
    with pytest.raises(ConfigError, match="takes too long"):
        _scheme_of(NAME, True, {"ignore": [f"re:{slow}"]})
    with pytest.raises(ConfigError, match="takes too long"):
        resolve_bits(NAME, {"module_quant_configs": {slow: {}}})
    with pytest.raises(ConfigError, match="takes too long"):
        resolve_bits(NAME, {"modules_to_not_convert": [slow]})


HUGE: list[tuple[str, Any]] = [
    *(("num_hidden_layers", n) for n in (513, 10**6, 2**31, 2**63, 10**300, -1)),
    *(("num_kv_shared_layers", n) for n in (10**7, -4)),
    *(("vocab_size", n) for n in (2**25, 2**62, -5)),
    *((key, 2**40) for key in ("hidden_size", "intermediate_size", "head_dim", "num_attention_heads", "num_experts")),
    ("layer_types", ["full_attention"] * 70_000),
]


@pytest.mark.parametrize(("key", "value"), HUGE, ids=lambda value: str(value)[:12])
def test_a_config_with_a_size_that_no_model_has(key: str, value: Any) -> None:
    with within(10_000), pytest.raises(ConfigError, match=rf"{key}.*expected"):
        describe(GEMMA4 | {key: value})


@pytest.mark.parametrize("tower", ["vision_config", "audio_config"])
def test_a_tower_with_a_size_that_no_model_has(tower: str) -> None:
    config = MULTIMODAL | {tower: MULTIMODAL[tower] | {"num_hidden_layers": 10**6}}
    with within(10_000), pytest.raises(ConfigError, match="num_hidden_layers = 1000000: expected"):
        describe_whole(config)


def test_an_onnx_cast_that_reads_itself(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["a"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["c"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["b"], ["c"]),
        helper.make_node("Cast", ["w"], ["d"], to=TensorProto.FLOAT),
    ]
    weights = [helper.make_tensor("w", TensorProto.FLOAT, [1], np.ones(1, np.float32).tobytes(), raw=True)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], weights)), tmp_path / "x.onnx")
    graph = Graph(tmp_path / "x.onnx")
    with within(10_000):
        assert graph.array(graph.origin("a")) is None
        assert graph.array(graph.origin("b")) is None
        assert graph.origin("d") == "w"


def table(builder: flatbuffers.Builder, fields: dict[int, tuple[str, Any]]) -> int:
    """A flatbuffer's table from field number to the kind of its slot and the value."""
    builder.StartObject(max(fields) + 1)
    for number, (kind, value) in fields.items():
        if kind == "offset":
            builder.PrependUOffsetTRelativeSlot(number, value, 0)
        else:
            getattr(builder, f"Prepend{kind}Slot")(number, value, 0)
    return int(builder.EndObject())


def repeated(builder: flatbuffers.Builder, offset: int, count: int) -> tuple[str, int]:
    builder.StartVector(4, count, 4)
    for _ in range(count):
        builder.PrependUOffsetTRelative(offset)
    return "offset", builder.EndVector()


def bundle(count: int) -> bytes:
    """A .litertlm whose lists of signatures and tensors have `count` pointers to one entry each."""
    b = flatbuffers.Builder(1 << 16)
    tensor = table(b, {3: ("offset", b.CreateString("x")), 2: ("Uint32", 0), 1: ("Int8", 0)})
    subgraph = table(b, {0: repeated(b, tensor, count)})
    signature = table(b, {2: ("offset", b.CreateString("prefill")), 4: ("Uint32", 0)})
    buffer = table(b, {1: ("Uint64", 0)})
    lists = {2: repeated(b, subgraph, 1), 4: repeated(b, buffer, 1), 7: repeated(b, signature, count)}
    b.Finish(table(b, lists))
    model = bytes(b.Output())
    h = flatbuffers.Builder(1024)
    text = table(h, {0: ("offset", h.CreateString("tf_lite_prefill_decode"))})
    item = table(h, {0: ("offset", h.CreateString("model_type")), 2: ("offset", text)})
    begin = 4096
    section = table(
        h, {0: repeated(h, item, 1), 1: ("Uint64", begin), 2: ("Uint64", begin + len(model)), 3: ("Uint8", 3)}
    )
    h.Finish(table(h, {1: ("offset", table(h, {0: repeated(h, section, 1)}))}))
    return (MAGIC.ljust(HEADER_START, b"\0") + bytes(h.Output())).ljust(begin, b"\0") + model


def test_a_bundle_whose_pointers_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_flatbuffer, "MOST_TABLES", 5_000)
    path = tmp_path / "x.litertlm"
    path.write_bytes(bundle(3))
    (signatures,) = read_bundle(path).models.values()
    assert [len(signature.tensors) for signature in signatures] == [3, 3, 3]
    path.write_bytes(bundle(2_000))  # 4 x 10^6 tensors in 20 kB
    with within(1_000_000), pytest.raises(ConfigError, match="its lists repeat"):
        read_bundle(path)
