"""Values on portable grids of Q6_K and Q8_0 give back the codes and scales that a fit put them on."""

from __future__ import annotations

import pytest
import torch

from intaglio.numerics.exact import solve
from intaglio.numerics.fit import fit_mse
from intaglio.numerics.grid import Q4_0_POSITIVE, Q6_K, Q6_K_FREE, Q8_0, BlockGrid


def random(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(rows, 1, generator=generator).exp()
    return torch.randn(rows, columns, generator=generator) * scales * 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("grid", [Q6_K, Q8_0], ids=lambda grid: grid.name)
@pytest.mark.parametrize("seed", range(4))
def test_what_a_fit_gave_comes_back(grid: BlockGrid, dtype: torch.dtype, seed: int) -> None:
    latent = random(64, 512, seed)
    latent[3] = 0
    latent[5, :300] = 0
    latent[7] *= 2.0**-10
    fitted = fit_mse(latent, grid)
    found = solve(fitted.decode(dtype), grid)
    assert found is not None
    assert torch.equal(found.decode().view(torch.int32), fitted.decode().view(torch.int32))
    same = found.step == fitted.step
    # a block of few values may also lie on a finer step, and one without zeros on a step of the other sign
    assert float((found.step.abs() == fitted.step.abs()).float().mean()) > 0.998
    assert float(same.float().mean()) > 0.98


def test_values_off_the_grid_are_not_solved() -> None:
    latent = random(16, 512, 9)
    assert solve(latent, Q6_K) is None
    value = fit_mse(latent, Q6_K).decode()
    value[9, 100] *= 1 + 2.0**-8
    assert solve(value, Q6_K) is None
    value[9, 100] = torch.nan
    assert solve(value, Q6_K) is None
    for grid in (Q6_K_FREE, Q4_0_POSITIVE):  # whose values are not exact in every float
        assert solve(fit_mse(latent, grid).decode(), grid) is None
    assert solve(latent[:, :48], Q6_K) is None
