"""Laws of rounding onto vectors: a plain search over the whole codebook, and GPTQ's own accounts."""

import numpy as np
import pytest
import torch

from gptq_awq.calibration.moments import Moments
from gptq_awq.errors import UserError
from gptq_awq.grids.mix import llama_grid
from gptq_awq.grids.search import _least_squares_plain, least_squares
from gptq_awq.grids.vectors import VECTOR_TYPES, codebook
from gptq_awq.numerics.linalg import quadratic
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN

types = pytest.mark.parametrize("kind", VECTOR_TYPES)


def problem(rows=40, columns=256, seed=0):
    draw = torch.Generator().manual_seed(seed)
    w = 0.05 * torch.randn(rows, columns, generator=draw)
    x = torch.randn(4 * columns, columns, generator=draw) * torch.linspace(0.3, 2, columns)
    x[:, 1:] += 0.7 * x[:, :-1]
    return w, Moments(x.T @ x / len(x), x.abs().mean(0), len(x))


def costs(x, u, scale, entries):
    """Σ e² of every entry for one vector, with the signs that the recursion asks for, in float64."""
    found = np.empty(len(entries))
    for k, magnitudes in enumerate(entries):
        y, total = x.astype(np.float64).copy(), 0.0
        for i, m in enumerate(magnitudes):
            e = (y[i] - np.sign(y[i]) * scale * m) / u[i, i]
            y[i + 1 :] -= e * u[i, i + 1 :]
            total += e * e
        found[k] = total
    return found


@pytest.mark.parametrize("coupling", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["iq3_s", "iq2_s"])
def test_the_first_vector_is_the_cheapest_of_the_codebook(kind, coupling):
    grid = llama_grid(kind, "mse")
    draw = torch.Generator().manual_seed(1)
    v = grid.unit
    w = 0.05 * torch.randn(64, v, generator=draw)
    u = coupling * torch.randn(v, v, generator=draw).triu(1) + torch.diag(0.9 + 0.2 * torch.rand(v, generator=draw))
    scale = torch.full_like(w, 0.05 / float(codebook(kind).levels[-2]))
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    grid.sweep(w.clone()[None], u[None], scale[None], codes[None], errors[None])  # pyright: ignore
    best = [costs(row.numpy(), u.numpy(), float(scale[0, 0]), codebook(kind).entries).min() for row in w]
    found = errors.square().sum(1).double()
    assert (found < torch.tensor(best) * 1.0001).sum() >= 0.95 * len(w)  # not all entries are tried
    assert float(found.sum()) == pytest.approx(sum(best), rel=0.02)
    # What is left of x - q once later columns took their share: e U = x - q.
    rounded = grid.decode(codes, (scale, torch.zeros_like(scale)))
    assert torch.allclose(errors @ u, w - rounded, atol=1e-6)


@pytest.mark.parametrize("kind", ["iq3_xxs", "iq2_xs", "iq2_xxs"])
def test_rounding_to_nearest_with_even_signs_is_within_a_percent_of_the_cheapest(kind):
    grid, book = llama_grid(kind, "mse"), codebook(kind)
    w = 0.05 * torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
    scale = 0.05 / float(book.levels[-2])
    codes = grid.encode(w, (torch.full((64, 1), scale), torch.zeros(64, 1)))
    found = (w - grid.decode(codes, (torch.full_like(w, scale), torch.zeros_like(w)))).square().sum()
    parts = w.view(64, -1, 1, book.entries.shape[1])
    own = (parts.abs() - scale * torch.tensor(book.entries)).square().sum(-1)  # rows, parts, entries
    turned = own + (4 * parts.abs() * scale * torch.tensor(book.entries)).amin(-1)
    negative = (parts < 0).sum(-1) % 2 == 1
    odd = torch.where(negative, own, turned).amin(-1)
    even = torch.where(negative, turned, own).amin(-1)
    best = even[:, 0] if parts.shape[1] == 1 else torch.minimum(even.sum(1), odd.sum(1))
    assert best.sum() * 0.999 <= found <= best.sum() * 1.1


def errors_of(w, h, scale, levels):
    """Σ h (ŵ - w)² of each row, rounded to the nearest levels at its scale."""
    t = levels[(w[..., None] / scale[..., None] - levels).abs().argmin(-1)]
    return (h * (scale * t - w) ** 2).sum(1), t


@pytest.mark.parametrize("kind", ["iq3_s", "iq4_xs"])
def test_a_scale_by_least_squares_is_the_best_for_the_codes_of_its_best_candidate(kind):
    draw = torch.Generator().manual_seed(3)
    w, h = torch.randn(130, 32, generator=draw).double(), torch.rand(2, 32, generator=draw).double()
    w[5] = 0
    arithmetic = llama_grid(kind).arithmetic
    levels, weights = torch.tensor(arithmetic.levels).double(), h.repeat(65, 1)
    candidates = w.abs().amax(1, keepdim=True) / levels.abs().max() * torch.tensor([1.0, 0.8, 0.6]).double()
    best = []
    for scale in candidates.split(1, 1):
        _, t = errors_of(w, weights, torch.where(scale == 0, 1.0, scale), levels)
        own = (weights * w * t).sum(1) / (weights * t * t).sum(1)
        best.append(torch.stack([(weights * (own[:, None] * t - w) ** 2).sum(1), own]))
    errors, scales = torch.stack(best, 1)
    expected = scales.gather(0, errors.argmin(0, keepdim=True))[0]
    fine = w.abs().sum(1) > 0
    for found in (
        least_squares(w.float(), candidates.float(), arithmetic, h.float()),
        _least_squares_plain(w, candidates, arithmetic, h),
    ):
        assert torch.allclose(found[fine, 0].double(), expected[fine], rtol=1e-4)
        assert float(found[5]) == 0


def test_scales_by_least_squares_leave_less_than_those_of_the_weights_alone():
    w, own = problem()
    for solver in (RTN(), GPTQ(act_order=True, static_groups=True)):
        error = {
            search: quadratic(
                w - solver.solve(w, own, llama_grid("iq4_xs", search)).quantized.dequantize(), own.hessian
            )
            for search in ("minmax", "mse", "hessian")
        }
        assert error["hessian"] < 1.02 * min(error["mse"], error["minmax"])


@types
def test_scales_of_codebooks_are_those_of_the_weights_whatever_comes_in(kind):
    w, own = problem()
    searched, weighed = (
        llama_grid(kind, search).fit(w[:, :256], own.hessian[:256, :256]) for search in ("mse", "hessian")
    )
    assert torch.equal(searched.scales, weighed.scales)
    assert not llama_grid(kind, "hessian").needs_hessian


@types
def test_every_vector_is_an_entry_with_signs_that_the_type_has(kind):
    w, own = problem()
    weight = GPTQ(act_order=True, static_groups=True).solve(w, own, llama_grid(kind, "mse")).quantized
    book, layout = codebook(kind), VECTOR_TYPES[kind]
    levels = (weight.codes % len(book.levels)).view(-1, layout.columns).numpy()
    assert {tuple(row) for row in levels.tolist()} <= {tuple(row) for row in book.indices.tolist()}
    if layout.even:
        assert ((weight.codes >= len(book.levels)).view(-1, 8).sum(1) % 2 == 0).all()


@types
def test_losses_are_those_of_the_weights(kind):
    w, own = problem()
    grid, solver = llama_grid(kind, "mse"), GPTQ(act_order=True, static_groups=True, damping=0.01)
    solved = solver.solve(w, own, grid).quantized
    H = own.hessian + 0.01 * own.hessian.diagonal().mean() * torch.eye(len(own.hessian))
    assert solved.loss == pytest.approx(quadratic(w - solved.dequantize(), H) / 2, rel=1e-3)
    nearest = RTN().solve(w, own, grid).quantized.dequantize()
    assert quadratic(w - solved.dequantize(), own.hessian) < 0.8 * quadratic(w - nearest, own.hessian)


def test_columns_of_a_vector_stay_together_in_act_order():
    _, own = problem()
    _, order, _ = own.inverse_factor(0.01, True, 8)
    assert order is not None
    units = order.view(-1, 8)
    assert torch.equal(units, units[:, :1] + torch.arange(8))
    assert (units[:, 0] % 8 == 0).all()
    means = own.hessian.diagonal().view(-1, 8).mean(1)[units[:, 0] // 8]
    assert torch.equal(means, means.sort(descending=True).values)


def test_a_width_that_is_no_whole_block_is_refused():
    with pytest.raises(UserError, match=r"grid=iq3_s: layer has 288 columns, not a multiple of 256"):
        llama_grid("iq3_s").check_columns(288, "layer")
