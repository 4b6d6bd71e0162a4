"""Two bits in llama.cpp: a run by recipe `q2_0`, and the mobile format's rows in the same tensor types."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from intaglio.errors import ConfigError, RecipeError, WeightError
from intaglio.formats.gguf.names import gguf_name
from intaglio.formats.gguf.read import read_gguf
from intaglio.formats.gguf.write import check_grids, export_gguf
from intaglio.formats.verify import verify
from intaglio.numerics.grid import GGUF_GRIDS, BlockGrid, Quantized
from intaglio.packed.model import PackedModel
from intaglio.plan.plan import make_plan
from intaglio.plan.recipe import Recipe
from intaglio.sources.convert import convert
from intaglio.tiny import MODEL_DIR
from tests.support import ggml
from tests.support.cases import Case, with_type
from tests.support.cli import intaglio
from tests.support.repack import resave
from tests.support.tiny import GEMMA4, make_checkpoint, pack

SCHEDULE = {"tokens": 128, "batch_size": 2, "sequence_length": 32, "gptq_tokens": 64}
MOBILE = Recipe.load("mobile", ["channel_scales=bf16"])
MLP = "model.layers.3.mlp.down_proj.weight"  # of the mobile recipe's two bits


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model after a GPTQ start and two steps."""
    out = tmp_path_factory.mktemp("q2_0") / "run"
    options = [f"--data={text}", f"--text={text}", "--eval-tokens=256", "--references=stock", "--no-compile"]
    settings = [f"--set=schedule.{key}={value}" for key, value in SCHEDULE.items()]
    outcome = intaglio("train", MODEL_DIR, "--recipe=q2_0", "--precision=no", f"--out={out}", *options, *settings)
    assert outcome.code == 0, outcome.err
    return out


def test_ggml_reads_the_trained_weights_in_the_file(run: Path) -> None:
    packed, stored = PackedModel.open(run / "packed"), ggml.tensors(run / "model.gguf")
    numbers = {number: name for name, (number, *_) in ggml.TYPES.items()}
    types = set()
    for tensor in packed.plan:
        number, data = stored[gguf_name(tensor.name)]
        if isinstance(tensor.grid, BlockGrid):
            types.add(numbers[number])
            found = ggml.dequantize(data.reshape(len(packed.decode(tensor.name)), -1), numbers[number])
            assert torch.equal(torch.from_numpy(found), packed.decode(tensor.name)), tensor.name
    assert types == {"Q4_0", "Q2_0"}
    assert verify(packed, run / "model.gguf").exact


def test_llamacpp_is_near_the_decoded_model_and_far_from_stock_rounding(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    rows = {(row["kind"], row["comparison"]["simulated"]): row["comparison"] for row in report["comparisons"][1:]}
    trained, simulated = rows["trained", False], rows["trained", True]
    assert trained["kl_mean_nats"] == pytest.approx(simulated["kl_mean_nats"], rel=0.1)
    assert trained["kl_mean_nats"] < 0.5 * rows["stock", False]["kl_mean_nats"]
    assert "Q2_0 rounding" in (run / "report.md").read_text("utf-8")


def test_its_checkpoint_is_the_same_weights(run: Path, tmp_path: Path) -> None:
    packed = PackedModel.open(run / "packed")
    found = convert(run / "model.gguf", tmp_path / "again", config=MODEL_DIR)
    assert packed.plan.portable and verify(packed, run / "hf").exact
    assert found.packed.plan.recipe.name == "q2_0" and not (found.lossy or found.fitted or found.rounded)
    for tensor, value in packed:
        again = found.packed.read(tensor.name)
        if isinstance(value, Quantized):
            assert isinstance(again, Quantized) and torch.equal(again.codes, value.codes)
            assert np.array_equal(again.scale.numpy().view(np.int16), value.scale.numpy().view(np.int16))


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"does not fit grid q2_0 of \[weights.mlp\], .* a multiple of 64"):
        make_plan(GEMMA4 | {"intermediate_size": 96}, "q2_0")


def test_a_tensor_type_that_nobody_knows_is_named(gemma4: Case, tmp_path: Path) -> None:
    path = with_type(gemma4.gguf, tmp_path / "x.gguf", "blk.0.ffn_up.weight", 77)
    with pytest.raises(ConfigError, match=r"x\.gguf: blk\.0\.ffn_up\.weight is of ggml type 77, which neither"):
        read_gguf(path)


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("rows")
    return pack(make_checkpoint(folder / "checkpoint", GEMMA4), folder / "packed", MOBILE)


def test_rows_of_the_mobile_format_are_blocks_of_equal_scales(mobile: PackedModel, tmp_path: Path) -> None:
    export_gguf(mobile, tmp_path / "x.gguf")
    verified = verify(mobile, tmp_path / "x.gguf")
    assert verified.exact and "scales of activations and KV cache" in verified.unsaid
    stored = ggml.tensors(tmp_path / "x.gguf")
    for tensor in (t for t in mobile.plan if isinstance(t.grid, BlockGrid)):
        kind = {2: "Q2_0", 4: "Q4_0", 8: "Q8_0"}[tensor.grid.code_bits]
        number, data = stored[gguf_name(tensor.name)]
        assert number == ggml.TYPES[kind][0]
        found = ggml.dequantize(data.reshape(tensor.spec.shape[0], -1), kind)
        assert torch.equal(torch.from_numpy(found), mobile.decode(tensor.name)), tensor.name


def test_a_scale_that_differs_in_one_block_of_a_row_is_found(mobile: PackedModel, tmp_path: Path) -> None:
    export_gguf(mobile, tmp_path / "x.gguf")
    tensor = next(t for t in read_gguf(tmp_path / "x.gguf").tensors if t.name == gguf_name(MLP))
    with (tmp_path / "x.gguf").open("r+b") as file:
        file.seek(tensor.data_offset + GGUF_GRIDS["Q2_0"][0].bytes_per_block)  # the second block's scale
        file.write(b"\x12")
    verified = verify(mobile, tmp_path / "x.gguf")
    assert (verified.differing_scales, verified.differing_codes) == (1, 0)


def test_a_scale_beyond_float16_is_refused(mobile: PackedModel, tmp_path: Path) -> None:
    scale = mobile.read(MLP).scale.clone()  # type: ignore[union-attr]
    scale[5] = 2.0**-30
    damaged = Path(shutil.copytree(mobile.path, tmp_path / "damaged"))
    resave(damaged, {f"{MLP}.scale": scale})
    with pytest.raises(WeightError, match=rf"{MLP}: 1 of 256 scales are beyond float16, .* 9\.3.*e-10: export it to"):
        export_gguf(PackedModel.open(damaged), tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_slices_that_are_no_whole_blocks_are_refused() -> None:
    recipe = Recipe.load("mobile", ["channel_scales=bf16", "weights.ple_embedding.grid=int2"])
    plan = make_plan(GEMMA4 | {"hidden_size_per_layer_input": 32}, recipe)
    with pytest.raises(RecipeError, match=r"a scale for 32 columns, which are no whole blocks of GGUF: .*=q8_0"):
        check_grids(plan)
