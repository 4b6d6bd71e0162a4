"""ONNX Runtime's own kernels decode what the exporter packs: to the same floats, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from intaglio.errors import RecipeError
from intaglio.formats.listed import codes_in_bytes
from intaglio.formats.onnx import write_data as onnx_data
from intaglio.formats.onnx.layout import Kernel, kernel_of
from intaglio.formats.onnx.write_data import DataFiles, packed_bytes
from intaglio.numerics.grid import GRIDS, BlockGrid, Quantized
from intaglio.plan.family import TensorSpec
from intaglio.plan.plan import PlannedTensor
from intaglio.plan.recipe import WeightRule

BLOCK_GRIDS = [name for name, grid in GRIDS.items() if isinstance(grid, BlockGrid)]
ROWS = 11


def planned(grid: str, columns: int) -> PlannedTensor:
    spec = TensorSpec("model.layers.0.mlp.up_proj.weight", (ROWS, columns), "mlp")
    return PlannedTensor(spec, WeightRule(name="linear", grid=GRIDS[grid]))


def random_quantized(tensor: PlannedTensor) -> Quantized:
    """All codes of the grid, steps of both signs where it allows them, a zero among them."""
    generator = torch.Generator().manual_seed(0)
    grid, (rows, columns) = tensor.grid, tensor.spec.shape
    assert isinstance(grid, BlockGrid)
    codes = torch.randint(grid.code_min, grid.code_max + 1, (rows, columns), generator=generator, dtype=torch.int8)
    steps = torch.randn(rows, columns // grid.block_size, generator=generator) * 0.1
    if grid.positive:
        return Quantized(grid, codes, steps.abs() + 1e-3)
    if grid.super_block is None:
        steps[0, 0] = 0
        return Quantized(grid, codes, steps.half())
    scale = torch.randint(-128, 128, steps.shape, generator=generator, dtype=torch.int8)
    multiplier = torch.randn(rows, columns // grid.super_block, generator=generator).half()
    return Quantized(grid, codes, scale, multiplier)


def run(
    op: str, feed: dict[str, np.ndarray], constants: dict[str, np.ndarray], inputs: list[str], how: Any
) -> np.ndarray:
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"], domain="com.microsoft", **how)],
        "g",
        [helper.make_tensor_value_info(name, kinds[x.dtype], x.shape) for name, x in feed.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(x, name) for name, x in constants.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


@pytest.mark.parametrize("columns", [256, 768])
@pytest.mark.parametrize("grid", BLOCK_GRIDS)
def test_the_kernels_decode_as_the_grid_does(grid: str, columns: int) -> None:
    tensor = planned(grid, columns)
    value, kernel = random_quantized(tensor), kernel_of(tensor)
    codes = packed_bytes(value, kernel.bits)
    scale = value.step.repeat_interleave(kernel.repeats, -1).numpy()
    expected = value.decode().numpy()
    how = {"bits": kernel.bits, "block_size": kernel.block}
    looked_up = run(
        "GatherBlockQuantized",
        {"ids": np.arange(ROWS)},
        {"codes": codes, "scale": scale},
        ["codes", "ids", "scale"],
        how | {"gather_axis": 0, "quantize_axis": 1},
    )
    assert np.array_equal(looked_up, expected)
    blocks = codes.reshape(ROWS, columns // kernel.block, -1)
    # a row of the identity picks one column: a sum of one product and zeros, which no order changes
    product = run(
        "MatMulNBits",
        {"x": np.eye(columns, dtype=np.float32)},
        {"codes": blocks, "scale": scale},
        ["x", "codes", "scale"],
        how | {"K": columns, "N": ROWS, "accuracy_level": 0},
    )
    assert np.array_equal(product.T, expected)


def test_bytes_are_laid_out_from_the_lowest_bits_on() -> None:
    for grid, codes, expected in (
        ("int2", [-2, -1, 0, 1], [0b11_10_01_00]),
        ("int4", [-8, 7], [0xF0]),
        ("q4_0", [1, -1], [0x79]),
        ("q6_k", [-32, 31], [96, 159]),
        ("int8", [-127, 127], [1, 255]),
    ):
        value = Quantized(GRIDS[grid], torch.tensor([codes], dtype=torch.int8), torch.ones(1, 1))  # type: ignore[arg-type]
        bits = {"int2": 2, "int4": 4, "q4_0": 4}.get(grid, 8)
        data = packed_bytes(value, bits)
        assert data.tolist() == [expected]
        assert codes_in_bytes(data, bits).tolist() == [codes]


def test_blocks_divide_rows_and_are_ones_that_the_kernels_have() -> None:
    widths = {16: 16, 32: 32, 48: 16, 96: 32, 256: 256, 1536: 256, 6144: 256, 640: 128}
    for columns, block in widths.items():
        assert kernel_of(planned("int4", columns)) == Kernel(4, block, columns // block)
    assert kernel_of(planned("q4_0", 96)) == Kernel(4, 32, 1)
    assert kernel_of(planned("q6_k", 256)) == Kernel(8, 16, 1)
    with pytest.raises(RecipeError, match=r"one scale for 40 columns.*--set weights\.linear\.grid=bf16"):
        kernel_of(planned("int4", 40))


def test_data_go_on_in_another_file_before_one_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_data, "LARGEST_BYTES", 5000)
    arrays = {name: np.arange(size, dtype=np.float32) for name, size in (("a", 500), ("b", 700), ("c", 300), ("d", 9))}
    with DataFiles(tmp_path, "x.onnx") as data:
        tensors = [data.add(name, np.float32, x.shape, [x[:100], x[100:]]) for name, x in arrays.items()]
    assert data.count == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["x.onnx_data", "x.onnx_data_1"]
    for tensor, array in zip(tensors, arrays.values(), strict=True):
        assert np.array_equal(numpy_helper.to_array(tensor, str(tmp_path)), array)
    places = [{e.key: e.value for e in t.external_data} for t in tensors]
    assert [p.get("location") for p in places] == ["x.onnx_data", "x.onnx_data", "x.onnx_data_1", None]
    assert all(int(place["offset"]) % 64 == 0 for place in places[:3])


def test_data_that_are_not_what_was_announced_are_refused(tmp_path: Path) -> None:
    with DataFiles(tmp_path, "x.onnx") as data:
        with pytest.raises(ValueError, match="1200 bytes, announced 4000"):
            data.add("a", np.float32, (1000,), [np.zeros(300, np.float32)])
        with pytest.raises(ValueError, match="float64, announced float32"):
            data.add("b", np.float32, (1000,), [np.zeros(1000)])
