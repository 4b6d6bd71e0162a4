"""The ONNX folder: ONNX Runtime computes the training forward, and reading back finds every difference."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from benchmarks.runners.codes import Comparison
from intaglio.errors import ConfigError, InputError, OutputError, RecipeError
from intaglio.formats.onnx import write_decoder as onnx_decoder
from intaglio.formats.onnx.write import export_onnx
from intaglio.formats.onnx.write_trace import trace_decoder
from intaglio.formats.verify import verify
from intaglio.measure.simulate import decoded_model
from intaglio.packed.checkpoint import load_model
from intaglio.packed.model import PackedModel
from intaglio.plan.recipe import Recipe
from intaglio.runs.quantize import quantize_model
from tests.support.cases import Case
from tests.support.cli import contents, intaglio
from tests.support.onnx import Sessions, traced
from tests.support.tiny import GEMMA4, VOCABULARY, make_checkpoint, pack

DECODER, EMBEDDINGS = "onnx/decoder_model_merged_q4.onnx", "onnx/embed_tokens_q4.onnx"
TOLERANCE = 1e-4
Q, K_SCALE = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_cache_scale"


def tokens(batch: int, length: int) -> torch.Tensor:
    ids = torch.randint(300, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 2
    return ids


@torch.no_grad()
def expected_logits(model: Any, ids: torch.Tensor, **more: Any) -> np.ndarray:
    return model(input_ids=ids, use_cache=False, **more).logits.numpy()


def exported(packed: PackedModel, folder: Path, **options: Any) -> Path:
    export_onnx(packed, folder, **options)
    return folder


@pytest.fixture(scope="module")
def folders(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exported Gemma 4s by name, on recipe q4_0. Shared: not to be changed."""
    where = tmp_path_factory.mktemp("onnx")
    return {name: exported(cases[name].packed, where / name) for name in ("gemma4", "gemma4-dense")}


@pytest.fixture(scope="module")
def calibrated(text: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """The random Gemma 4 on recipe mobile with scales of activations and cache; its source is beside it."""
    folder = tmp_path_factory.mktemp("calibrated")
    checkpoint = make_checkpoint(folder / "checkpoint", GEMMA4)
    recipe = Recipe.load("mobile", ["schedule.calibration_tokens=512", "schedule.sequence_length=64"])
    return quantize_model(checkpoint, recipe, folder / "packed", data=text)[0]


@pytest.fixture(scope="module")
def mobile_folder(calibrated: PackedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(calibrated, tmp_path_factory.mktemp("mobile-onnx") / "mobile")


# What it computes


@pytest.mark.parametrize("name", ["gemma4", "gemma4-dense"])
def test_onnxruntime_computes_the_training_forward(name: str, cases: dict[str, Case], folders: dict[str, Path]) -> None:
    """150 tokens, of which the window sees 32: all at once, and the last 20 from the cache."""
    case, sessions = cases[name], Sessions(folders[name])
    ids = tokens(2, 150)
    expected = expected_logits(decoded_model(load_model(case.checkpoint), case.packed), ids)
    sessions.start(2)
    assert np.abs(sessions.step(ids.numpy()) - expected).max() < TOLERANCE
    sessions.start(2)
    parts = [sessions.step(ids[:, :130].numpy())]
    parts += [sessions.step(ids[:, i : i + 1].numpy(), keep=1) for i in range(130, 150)]
    assert np.abs(np.concatenate(parts, 1) - expected).max() < TOLERANCE


def test_the_last_logits_alone_are_the_last_of_all(folders: dict[str, Path]) -> None:
    sessions, ids = Sessions(folders["gemma4"]), tokens(2, 9).numpy()
    rows = {}
    for keep in (0, 1, 3):
        sessions.start(2)
        rows[keep] = sessions.step(ids, keep)
    assert [r.shape[1] for r in rows.values()] == [9, 1, 3]
    assert np.abs(rows[1] - rows[0][:, -1:]).max() < TOLERANCE and np.abs(rows[3] - rows[0][:, -3:]).max() < TOLERANCE


def test_padding_on_the_left_changes_nothing(folders: dict[str, Path]) -> None:
    sessions, ids = Sessions(folders["gemma4"]), tokens(1, 9).numpy()
    sessions.start(1)
    alone = sessions.step(ids)
    padded = np.concatenate([np.zeros((1, 4), np.int64), ids], 1)
    mask = (np.arange(13) >= 4).astype(np.int64)[None]
    sessions.start(1)
    assert np.abs(sessions.step(padded, mask=mask)[:, 4:] - alone).max() < TOLERANCE


def read_in_steps(sessions: Sessions, ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits and int8 codes [B, T, ...] of sequences that are read at once but for the last 4 tokens."""
    sessions.start(len(ids))
    logits, codes = [], []
    for part in np.split(ids, range(ids.shape[1] - 4, ids.shape[1]), axis=1):
        logits.append(sessions.step(part))
        codes.append(sessions.codes)
    joined = {name: np.concatenate([c[name] for c in codes], 2 if "cache" in name else 1) for name in codes[0]}
    return np.concatenate(logits, 1), joined


def test_static_int8_is_that_of_the_training_forward(calibrated: PackedModel, mobile_folder: Path) -> None:
    """On ONNX Runtime's own int8 codes, the forward makes the same codes in every place, and the same logits.

    Two sums of other order differ in the last bit, so a code at a border may fall to the other side, once in many
    thousand. Left to itself the forward would part from ONNX Runtime there: see `benchmarks/runners/codes.py`.
    """
    assert sum(value != 0 for value in calibrated.read_static().values()) == len(calibrated.plan.static_scales)
    model = decoded_model(load_model(calibrated.path.parent / "checkpoint"), calibrated)
    sessions, ids = Sessions(mobile_folder), tokens(4, 64).numpy()
    untapped, _ = read_in_steps(sessions, ids)
    assert {x.dtype for x in sessions.past.values()} == {np.dtype(np.int8)}
    sessions.tap()
    logits, codes = read_in_steps(sessions, ids)
    assert np.array_equal(logits, untapped)
    owners = {scale.owner for scale in calibrated.plan.static_scales}
    found = Comparison(model, calibrated.plan, codes, ids)
    print(found)
    assert set(found.counts) == owners and found.equal_share > 0.9999 and found.furthest == 1
    assert (np.abs(found.logits - logits) < TOLERANCE).all()
    with torch.no_grad():  # one code of one weight
        model.get_parameter(f"{Q}.weight")[3, 5] += float(calibrated.read(f"{Q}.weight").step[3, 0])
    wrong = Comparison(model, calibrated.plan, codes, ids).differing - found.differing
    assert list(wrong) == [f"{Q}.output_activation_scale"] and wrong.total() > 20


def test_scales_that_are_off_leave_floats(mobile_packed: PackedModel, tmp_path: Path) -> None:
    sessions, ids = Sessions(exported(mobile_packed, tmp_path / "off")), tokens(2, 40)
    model = decoded_model(load_model(mobile_packed.path.parent / "checkpoint"), mobile_packed)
    sessions.start(2)
    assert np.abs(sessions.step(ids.numpy()) - expected_logits(model, ids)).max() < TOLERANCE
    assert {x.dtype for x in sessions.past.values()} == {np.dtype(np.float32)}
    assert verify(mobile_packed, tmp_path / "off").exact


@pytest.mark.parametrize("grid", ["q4_0", "q8_0", "f16"])
def test_embeddings_on_other_grids(grid: str, cases: dict[str, Case], tmp_path: Path) -> None:
    rules = [f"weights.{rule}.grid={grid}" for rule in ("token_embedding", "ple_embedding")]
    packed = pack(cases["gemma4"].checkpoint, tmp_path / "packed", Recipe.load("q4_0", rules))
    sessions, ids = Sessions(exported(packed, tmp_path / "onnx-folder")), tokens(1, 20)
    assert verify(packed, tmp_path / "onnx-folder").exact
    sessions.start(1)
    expected = expected_logits(decoded_model(load_model(cases["gemma4"].checkpoint), packed), ids)
    assert np.abs(sessions.step(ids.numpy()) - expected).max() < TOLERANCE


@pytest.mark.environment  # for its time: it traces anew
def test_the_same_model_makes_the_same_bytes(gemma4: Case, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(onnx_decoder, "trace_decoder", trace_decoder)
        export_onnx(gemma4.packed, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folders["gemma4"])
    graph = (tmp_path / "again" / DECODER).read_bytes()
    assert b"/site-packages/" not in graph and b".py" not in graph  # whose machine it was


def test_config_and_tokenizer_are_as_transformers_js_reads_them(gemma4: Case, folders: dict[str, Path]) -> None:
    config = json.loads((folders["gemma4"] / "config.json").read_text("utf-8"))
    assert config["model_type"] == "gemma4" and config["text_config"]["num_kv_shared_layers"] == 2
    files = {Path(DECODER).name: 1, Path(EMBEDDINGS).name: 1}
    assert config["transformers.js_config"] == {"dtype": "q4", "use_external_data_format": files}
    tokenizer = json.loads((folders["gemma4"] / "tokenizer_config.json").read_text("utf-8"))
    assert tokenizer["chat_template"] == (gemma4.packed.path / "chat_template.jinja").read_text("utf-8")


# Reading back


def test_command_line_exports_and_verifies(gemma4: Case, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["gemma4"], tmp_path / "copy"))
    found = intaglio("verify", gemma4.packed.path, folder)
    assert found.code == 0 and "codes" in found.out and "0 bits differ" in found.out
    data = folder / f"{DECODER}_data"
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    wrong = intaglio("verify", gemma4.packed.path, folder)
    assert wrong.code == 3 and "1 of" in wrong.error and "differ" in wrong.error


def place(folder: Path, name: str) -> tuple[Path, int]:
    """File and offset of a constant's data."""
    for file in (DECODER, EMBEDDINGS):
        for tensor in onnx.load(folder / file, load_external_data=False).graph.initializer:
            if tensor.name == name and tensor.data_location == 1:
                where = {entry.key: entry.value for entry in tensor.external_data}
                return folder / "onnx" / where["location"], int(where["offset"])
    raise AssertionError(f"{name} is no external constant")


@pytest.mark.parametrize(
    ("name", "byte", "counter"),
    [
        ("model.layers.1.self_attn.q_proj.weight.codes", 7, "codes"),
        ("model.layers.1.self_attn.q_proj.weight.scale", 0, "scales"),
        ("lm_head.weight.codes", 100, "codes"),
        ("model.embed_tokens.weight.codes", 100, "codes"),
        ("model.embed_tokens_per_layer.weight.scale", 5, "scales"),
        ("model.per_layer_model_projection.weight", 0, "values"),
        ("model.model.norm.weight", 0, "values"),
    ],
)
def test_one_flipped_bit_is_found(
    name: str, byte: int, counter: str, gemma4: Case, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["gemma4"], tmp_path / "copy"))
    path, offset = place(folder, name)
    data = bytearray(path.read_bytes())
    data[offset + byte] ^= 1
    path.write_bytes(data)
    found = verify(gemma4.packed, folder)
    differing = {kind: getattr(found, f"differing_{kind}") for kind in ("codes", "scales", "static_scales", "values")}
    assert differing == dict.fromkeys(differing, 0) | {counter: 1} and not found.exact


def node(graph: Any, name: str) -> Any:
    return next(node for node in graph.node if node.name == name)


def constant(graph: Any, name: str) -> Any:
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def set_attribute(graph: Any, name: str, attribute: str, value: int) -> None:
    next(a for a in node(graph, name).attribute if a.name == attribute).i = value


def set_constant(graph: Any, name: str, value: np.ndarray) -> None:
    constant(graph, name).CopyFrom(numpy_helper.from_array(value, name))


def skip_rounding(graph: Any, module: str) -> None:
    """Let a linear read its input as it comes."""
    makers = {output: maker for maker in graph.node for output in maker.output}
    linear = node(graph, module)
    linear.input[0] = makers[makers[linear.input[0]].input[0]].input[0]


UP = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda g: set_attribute(g, Q, "accuracy_level", 4), f"unlike: {Q}"),
        (lambda g: set_attribute(g, Q, "bits", 2), f"unlike: {Q}"),
        (lambda g: node(g, Q).input.append("int8_zero"), f"unlike: {Q}"),
        (lambda g: setattr(node(g, Q), "name", "other"), f"missing: {Q}"),
        (lambda g: setattr(node(g, Q), "name", "other"), "extra: other"),
        (lambda g: skip_rounding(g, Q), "static: 1"),
        (lambda g: set_constant(g, K_SCALE, np.float32(0.5).reshape(())), "static: 1"),
        (lambda g: set_constant(g, f"{UP}.output_activation_scale", np.float32(0.5).reshape(())), "static: 1"),
        (lambda g: set_constant(g, "int8_zero", np.array(1, np.int8)), f"unlike: {K_SCALE}"),
        (lambda g: g.input[4].type.tensor_type.__setattr__("elem_type", 1), f"unlike: {K_SCALE}"),
        (lambda g: g.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.float32), "lora")), "extra: lora"),
        (lambda g: g.initializer.remove(constant(g, "model.model.norm.weight")), "missing: model.norm.weight"),
        (lambda g: set_constant(g, "model.model.norm.weight", np.ones(3, np.float32)), "unlike: model.norm.weight"),
    ],
)
def test_a_graph_that_computes_something_else_is_found(
    change: Callable[[Any], Any], found: str, calibrated: PackedModel, mobile_folder: Path, tmp_path: Path
) -> None:
    assert verify(calibrated, mobile_folder).exact
    folder = Path(shutil.copytree(mobile_folder, tmp_path / "copy"))
    model = onnx.load(folder / DECODER, load_external_data=False)
    change(model.graph)
    (folder / DECODER).write_bytes(model.SerializeToString())
    result = verify(calibrated, folder)
    told = [f"{kind}: {name}" for kind in ("missing", "extra", "unlike") for name in getattr(result, kind)]
    assert found in [*told, f"static: {result.differing_static_scales}"] and not result.exact


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / DECODER).write_bytes((f / DECODER).read_bytes()[:5000]), "not a valid ONNX file"),
        (lambda f: (f / EMBEDDINGS).write_bytes(b"\xff" * 100), "not a valid ONNX file"),
        (lambda f: (f / EMBEDDINGS).unlink(), "not a valid ONNX file"),
        (lambda f: (f / f"{DECODER}_data").unlink(), "cannot be read"),
        (lambda f: (f / f"{DECODER}_data").write_bytes(b"short"), "cannot be read"),
    ],
)
def test_damaged_folders_are_refused(
    damage: Callable[[Path], Any], message: str, gemma4: Case, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["gemma4"], tmp_path / "copy"))
    damage(folder)
    outcome = intaglio("verify", gemma4.packed.path, folder)
    assert outcome.code == 2 and message in outcome.error and str(folder) in outcome.error


def test_data_elsewhere_are_not_read(gemma4: Case, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["gemma4"], tmp_path / "copy"))
    model = onnx.load(folder / DECODER, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../secret"
    (folder / DECODER).write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match="expected a file of the same folder"):
        verify(gemma4.packed, folder)


# Refusals


def test_what_the_files_cannot_say_is_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="for gemma4_text, this model is gemma3_text"):
        export_onnx(cases["gemma3"].packed, tmp_path / "x")
    checkpoint = make_checkpoint(tmp_path / "odd", GEMMA4 | {"intermediate_size": 260})
    packed = pack(checkpoint, tmp_path / "packed", "mobile")
    with pytest.raises(RecipeError, match="one scale for 260 columns"):
        export_onnx(packed, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_missing_packages_and_tokenizers_are_named(
    packed_copy: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnx_ir", "onnxscript"):
        with monkeypatch.context() as patched:
            patched.setattr(onnx_decoder, "trace_decoder", trace_decoder)
            patched.setitem(sys.modules, package, None)
            outcome = intaglio("export", packed_copy.path, "onnx", f"--out={tmp_path / 'x'}")
        assert outcome.code == 2 and "pip install 'intaglio[onnx]'" in outcome.error
    (packed_copy.path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        export_onnx(packed_copy, tmp_path / "x")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))


def test_existing_output_is_kept_unless_replaced(gemma4: Case, tmp_path: Path) -> None:
    exported(gemma4.packed, tmp_path / "out")
    with pytest.raises(OutputError, match="already exists"):
        exported(gemma4.packed, tmp_path / "out")
    exported(gemma4.packed, tmp_path / "out", replace=True)
    assert verify(gemma4.packed, tmp_path / "out").exact
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").touch()
    with pytest.raises(OutputError, match="holds no model"):
        exported(gemma4.packed, tmp_path / "home", replace=True)
    assert (tmp_path / "home" / "letter").exists()


def test_a_packed_model_with_other_linears_than_the_trace_is_refused(
    packed_copy: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_head(spec: Any) -> Any:
        model = traced(spec)
        for item in model.graph.node:
            if item.domain == "intaglio" and item.attribute[0].s == b"lm_head":
                item.attribute[0].s = b"head"
        return model

    monkeypatch.setattr(onnx_decoder, "trace_decoder", without_head)
    with pytest.raises(InputError, match="head: in the traced decoder, but not in the plan"):
        export_onnx(packed_copy, tmp_path / "x")
