"""HQQ's zeros against the published iteration, written as it is published."""

import pytest
import torch

from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.base import fit_all


def weights(rows=1, columns=64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return 0.05 * torch.randn(rows, columns, generator=draw).sign() * torch.rand(rows, columns, generator=draw) ** 3


def published(w, bits, lp_norm=0.7, beta=1e1, kappa=1.01, iters=20):
    """hqq/core/optimize.py, one group: scale and zero of ŵ = (c - zero) / scale."""
    low, high = w.min(), w.max()
    scale = (2**bits - 1) / (high - low)
    zero, best, least = -low * scale, None, torch.inf
    for _ in range(iters + 1):
        codes = torch.round(w * scale + zero).clamp(0, 2**bits - 1)
        rounded = (codes - zero) / scale
        error = (w - rounded).abs().mean()
        if error >= least:
            break
        best, least = zero, error
        x = w - rounded
        e = x.sign() * torch.relu(x.abs() - (1.0 / beta) * x.abs().pow(lp_norm - 1))
        zero = torch.mean(codes - (w - e) * scale)
        beta *= kappa
    return scale, best, least


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_no_worse_than_the_published_iteration_which_stops_at_once_when_it_gets_worse(bits, seed):
    w = weights(seed=seed)
    scale, _, least = published(w[0], bits)
    grid = AffineGrid(bits, 64, "hqq", "float32")
    fitted = grid.fit(w)
    params = fitted.scales, fitted.zeros
    error = (grid.decode(grid.encode(w, params), params) - w).abs().mean()
    assert fitted.scales.item() == pytest.approx(1 / scale.item(), rel=1e-5)
    assert error <= least * (1 + 1e-4)


def test_one_step_is_the_published_one(monkeypatch):
    monkeypatch.setattr("gptq_awq.grids.hqq.STEPS", 1)
    w = weights(seed=3)
    scale, zero, _ = published(w[0], 3, iters=1)
    fitted = AffineGrid(3, 64, "hqq", "float32").fit(w)
    assert fitted.zeros.item() == pytest.approx((-zero / scale).item(), rel=1e-4)


def test_the_mean_error_is_never_more_than_of_the_extremes():
    w = weights(16, 256)
    errors = []
    for search in ("hqq", "minmax"):
        grid = AffineGrid(3, 64, search, "float32")
        params = fit_all(grid, w, None).per_column(torch.arange(256) // 64)
        errors.append((grid.decode(grid.encode(w, params), params) - w).abs().mean())
    assert errors[0] < errors[1]


def test_a_constant_group_stays_what_it_is():
    grid = AffineGrid(4, 32, "hqq", "float32")
    w = torch.full((2, 32), 0.25)
    fitted = grid.fit(w)
    assert torch.equal(grid.decode(grid.encode(w, (fitted.scales, fitted.zeros)), (fitted.scales, fitted.zeros)), w)
