"""Codes and scales found again in plain floats: grids, odd values, and none where there is none."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from intaglio.numerics.fit_stock import fit_stock
from intaglio.numerics.grid import INT2, INT4, INT8, Q4_0, Q4_0_FREE
from intaglio.numerics.identify import BLOCK_RULE, ROW_RULES, identify
from intaglio.numerics.recover import ANY, NOTHING, Rule, recover
from intaglio.sources.inspect import Tally
from tests.support import ggml
from tests.support.strangers import DTYPES, RULES, put_on_grid

UNSIGNED = Rule(code_min=-8, code_max=7, peaks=(8, 7, 6, 5, 4, 3, 2, 1))
SHARES = {"bf16": 0.999, "fp16": 0.999, "fp32": 0.99}


def latent(blocks: int = 4096, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(blocks, width, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize(("rule", "scale", "stored"), list(product(RULES, DTYPES, DTYPES)))
def test_blocks_of_every_grid_are_found(rule: str, scale: str, stored: str) -> None:
    codes, scales = put_on_grid(latent(), rule, scale)
    weights = (codes * scales).to(DTYPES[stored])
    hypothesis = identify(weights.reshape(64, -1))
    assert hypothesis is not None and hypothesis.name == rule
    found = recover(weights, hypothesis.rule)
    same = (found.codes == codes).all(1)
    assert float((found.exact & same).float().mean()) >= SHARES[scale]
    decoded = (found.codes.float() * found.scale.unsqueeze(1)).to(weights.dtype)
    assert torch.equal(decoded[found.exact], weights[found.exact])


def possible_scales(weights: Tensor, codes: Tensor) -> list[float]:
    """Every float16 that gives these bfloat16 weights from their codes, by trying all near the right one."""
    largest = codes.abs().argmax()
    around = (weights[largest].float() / codes[largest]).to(torch.float16).view(torch.int16)
    near = (around + torch.arange(-40, 41, dtype=torch.int16)).view(torch.float16).float()
    decoded = (codes.unsqueeze(0) * near.unsqueeze(1)).to(torch.bfloat16)
    return near[(decoded == weights).all(1)].tolist()


@pytest.mark.parametrize("rule", RULES)
def test_a_float16_scale_is_found_among_those_that_explain_a_block(rule: str) -> None:
    codes, scales = put_on_grid(latent(200), rule, "fp16")
    weights = (codes * scales).to(torch.bfloat16)
    found = recover(weights, Rule(code_min=-8, code_max=7, signed=True, peaks=BLOCK_RULE.peaks, narrow=False))
    for i in range(len(codes)):
        possible = possible_scales(weights[i], found.codes[i].float())
        assert float(found.scale[i]) in possible
        if len(possible) == 1:
            assert float(found.scale[i]) == float(scales[i]) * float((found.codes[i] * codes[i]).sum().sign())


@pytest.mark.parametrize(("name", "grid"), [("int2", INT2), ("int4", INT4), ("int8", INT8)])
@pytest.mark.parametrize(("scale", "stored"), list(product(DTYPES, DTYPES)))
def test_rows_are_found(name: str, grid: object, scale: str, stored: str) -> None:
    values = latent(64, 1024)
    rule = ROW_RULES[name]
    steps = (values.abs().amax(1, keepdim=True) / rule.code_max * 0.8).to(DTYPES[scale]).float()
    codes = (values / steps).round().clamp(rule.code_min, rule.code_max)
    weights = (codes * steps).to(DTYPES[stored])
    hypothesis = identify(weights)
    assert hypothesis is not None and hypothesis.name == name
    found = recover(weights, hypothesis.rule)
    assert float(((found.codes == codes).all(1) & found.exact).float().mean()) >= SHARES[scale] - 1 / 64


@pytest.mark.parametrize("stored", DTYPES)
def test_latent_blocks_lie_on_no_grid(stored: str) -> None:
    for values in (latent(6_000), torch.rand(6_000, 32), torch.distributions.Laplace(0.0, 1.0).sample((6_000, 32))):
        weights = values.to(DTYPES[stored])
        assert not recover(weights, BLOCK_RULE).exact.any()
        assert not recover(weights, UNSIGNED).exact.any()
        assert identify(weights.reshape(60, -1)) is None


@pytest.mark.parametrize("stored", DTYPES)
def test_odd_blocks(stored: str) -> None:
    dtype = DTYPES[stored]
    ramp = torch.arange(-8, 24).clamp(max=7).float() * 2**-6
    blocks = {
        "zeros": torch.zeros(32),
        "minus zeros": torch.full((32,), -0.0),
        "on the grid": ramp,
        "both zeros": torch.where(torch.arange(32) % 2 == 0, -0.0, ramp),
        "one value": torch.full((32,), 0.75),
        "one magnitude": torch.where(torch.arange(32) % 3 == 0, 0.75, -0.75),
        "one among zeros": torch.nn.functional.one_hot(torch.tensor(5), 32) * 0.375,
        "NaN": torch.where(torch.arange(32) == 7, torch.nan, ramp),
        "Inf": torch.where(torch.arange(32) == 7, torch.inf, ramp),
        "off by a bit": torch.where(torch.arange(32) == 20, ramp * (1 + 2**-7), ramp),
        "all NaN": torch.full((32,), torch.nan),
    }
    values = torch.stack(list(blocks.values())).to(dtype)
    found = recover(values, UNSIGNED)
    exact = dict(zip(blocks, found.exact.tolist(), strict=True))
    assert [name for name, held in exact.items() if not held] == ["NaN", "Inf", "off by a bit", "all NaN"]
    assert found.width[0] == ANY and found.width[7] == NOTHING
    decoded = (found.codes.float() * found.scale.unsqueeze(1)).to(dtype)
    assert torch.equal(decoded[found.exact], values[found.exact])  # zeros of either sign are equal
    assert (found.scale[found.exact] >= 0).all()  # so it is where scales are positive


@pytest.mark.parametrize(("stored", "scale"), [("bf16", 2.0**-131), ("fp16", 2.0**-23), ("fp32", 2.0**-147)])
def test_subnormal_weights(stored: str, scale: float) -> None:
    codes = torch.arange(-8, 24).clamp(max=7).float().unsqueeze(0)
    weights = (codes * scale).to(DTYPES[stored])
    assert (weights != 0).sum() > 20
    found = recover(weights, UNSIGNED)
    assert found.exact.all()
    assert torch.equal((found.codes.float() * found.scale).to(weights.dtype), weights)


def test_numbers_at_the_end_of_the_range() -> None:
    codes = torch.arange(-8, 24).clamp(max=7).float().unsqueeze(0)
    weights = (codes * 2.0**124).to(torch.bfloat16)
    found = recover(weights, UNSIGNED)
    assert found.exact.all() and torch.equal(found.codes.float(), codes)


@pytest.mark.parametrize("rule", RULES)
def test_whether_stock_tools_keep_a_block_is_what_stock_tools_do(rule: str) -> None:
    codes, scales = put_on_grid(latent(2000), rule, "bf16")
    weights = (codes * scales).to(torch.bfloat16)
    hypothesis = identify(weights.reshape(50, -1))
    assert hypothesis is not None
    found = recover(weights, hypothesis.rule)
    tally = Tally()
    tally.add(found.codes, found.scale, found.width, None, Q4_0)
    stock = fit_stock(weights.float(), Q4_0_FREE)
    same = (stock.codes == found.codes).all(1) & (stock.step.squeeze(1) == found.scale)
    assert tally.stock == int(same.sum())
    blocks = ggml.quantize(weights.float().numpy(), "Q4_0")
    kept = ggml.dequantize(blocks, "Q4_0") == (codes * scales).numpy()
    assert tally.stock == int(np.all(kept, axis=1).sum())
