"""Laws of GPTAQ and Qronos, against the papers' recursions written out in float64."""

from dataclasses import replace

import pytest
import torch
from helpers.quantization_runs import SMALL, tokens
from helpers.tiny_models import tiny_model

from gptq_awq.calibration.moments import Moments
from gptq_awq.errors import UserError
from gptq_awq.grids.base import fit_all
from gptq_awq.grids.integer import IntGrid
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import quantize
from gptq_awq.solvers.gptaq import GPTAQ
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.qronos import Qronos

SOLVERS = [GPTAQ, Qronos]
DAMPING = 0.01


def problem(drift=0.4, rows=24, columns=64, seed=0):
    """A weight; correlated inputs of full precision, and the same with what earlier layers' rounding does to them."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    X = torch.randn(columns, 12 * columns, generator=generator, dtype=torch.float64)
    X = mix @ X + X
    other = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    noise = torch.randn(X.shape, generator=generator, dtype=torch.float64)
    return W, X, X + drift * (0.7 * other @ X + 0.3 * noise)


def moments(X, Xq):
    n = X.shape[1]
    H, C = Xq @ Xq.T / n, Xq @ X.T / n
    return Moments(H.float(), Xq.abs().mean(1).float(), n, cross=C.float())


def error(W, Q, X, Xq):
    """‖W X - Ŵ X̃‖² per token."""
    return float((W @ X - Q.double() @ Xq).square().sum() / X.shape[1])


def damped(Xq):
    H = Xq @ Xq.T / Xq.shape[1]
    return H, H + DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def rounding(W, grid):
    """Columns of W → the nearest points on one grid per row, fitted to W."""
    fitted = grid.fit(W.float(), None)

    def nearest(column):
        params = (fitted.scales, fitted.zeros)
        return grid.decode(grid.encode(column.float()[:, None], params), params)[:, 0].double()

    return nearest


def naive_gptaq(W, X, Xq, nearest, updated=False):
    """Algorithm 1, a column at a time: inverses are taken anew of the columns that are left.

    Of neuron q's residual w_q (X_q - X̃_q), w_q is the layer's own, or, as in the authors' code, the `updated` one.
    """
    own, W, n = W, W.clone(), X.shape[1]
    _, H = damped(Xq)
    Q = torch.zeros_like(W)
    for q in range(W.shape[1]):
        Q[:, q] = nearest(W[:, q])
        inverse = torch.linalg.inv(H[q:, q:])
        e = (W[:, q] - Q[:, q]) / inverse[0, 0]
        residual = (W if updated else own)[:, q, None] * (X[q] - Xq[q])
        W[:, q:] -= e[:, None] * inverse[0]
        if q + 1 < W.shape[1]:
            W[:, q + 1 :] += residual @ Xq[q + 1 :].T / n @ torch.linalg.inv(H[q + 1 :, q + 1 :])
    return Q


def naive_qronos(W, X, Xq, nearest):
    """The paper's two steps at every column: correct, then least squares (with damping, as a ridge around W)."""
    own, V, n, width = W, W.clone(), X.shape[1], W.shape[1]
    plain, H = damped(Xq)
    ridge = H - plain
    Q = torch.zeros_like(W)
    for t in range(width):
        past = own @ X - Q[:, :t] @ Xq[:t]
        if t == 0 and plain[0, 0] > 0:
            best = (past - V[:, 1:] @ Xq[1:]) @ Xq[0] / n / plain[0, 0]
        else:
            best = ((past - V[:, t + 1 :] @ Xq[t + 1 :]) @ Xq[t] / n + own[:, t] * ridge[t, t]) / H[t, t]
        Q[:, t] = nearest(best)
        rest = (own @ X - Q[:, : t + 1] @ Xq[: t + 1]) @ Xq[t + 1 :].T / n + own[:, t + 1 :] @ ridge[t + 1 :, t + 1 :]
        V[:, t + 1 :] = rest @ torch.linalg.inv(H[t + 1 :, t + 1 :])
    return Q


def starting(solver, W, stats):
    """The weight that the solver's rounding starts from."""
    U, order, _ = stats.inverse_factor(solver.damping, solver.act_order)
    return solver.target(W.float(), stats, U, order)


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize(("solver", "naive"), [(GPTAQ, naive_gptaq), (Qronos, naive_qronos)])
def test_it_is_the_papers_recursion(solver, naive, block_size):
    W, X, Xq = problem()
    grid, stats = IntGrid(3, -1), moments(X, Xq)
    ours = solver(block_size=block_size, static_groups=True, damping=DAMPING)
    target = starting(ours, W, stats)
    codes = ours.solve(W.float(), stats, grid).quantized.dequantize()
    theirs = naive(W, X, Xq, rounding(target, grid))
    assert ((codes - theirs).abs() < 1e-4).double().mean() > 0.98  # a near tie may fall the other way, with its row
    assert error(W, codes, X, Xq) == pytest.approx(error(W, theirs, X, Xq), rel=0.01)


def test_gptaqs_residual_of_the_updated_weight_differs_by_little():
    W, X, Xq = problem()
    nearest = rounding(W, IntGrid(4, -1))
    plain, updated = (error(W, naive_gptaq(W, X, Xq, nearest, u), X, Xq) for u in (False, True))
    assert updated == pytest.approx(plain, rel=0.15)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_without_drift_it_is_gptq(solver, act_order, static_groups):
    W, X, _ = problem()
    stats = moments(X, X)
    stats = replace(stats, cross=stats.hessian)
    options = {"act_order": act_order, "static_groups": static_groups}
    ours, plain = (s(**options).solve(W.float(), stats, IntGrid(3, 16)) for s in (solver, GPTQ))
    assert torch.equal(ours.quantized.codes, plain.quantized.codes)
    assert torch.equal(ours.quantized.scales, plain.quantized.scales)


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_strength_it_is_gptq(solver):
    W, X, Xq = problem()
    ours, plain = (s.solve(W.float(), moments(X, Xq), IntGrid(3, 16)) for s in (solver(strength=0.0), GPTQ()))
    assert torch.equal(ours.quantized.codes, plain.quantized.codes)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("solver", SOLVERS)
def test_outputs_are_nearer_to_full_precision_than_gptqs(solver, bits, seed, act_order):
    W, X, Xq = problem(seed=seed)
    options = {"act_order": act_order, "static_groups": True}
    ours, plain = (
        s(**options).solve(W.float(), moments(X, Xq), IntGrid(bits, 16)).quantized.dequantize() for s in (solver, GPTQ)
    )
    assert error(W, ours, X, Xq) < error(W, plain, X, Xq)


def test_qronos_without_rounding_is_least_squares():
    W, X, Xq = problem()
    stats = moments(X, Xq)
    solver = Qronos(static_groups=True, damping=1e-6)
    fine = solver.solve(W.float(), stats, IntGrid(8, 8)).quantized.dequantize()
    best = torch.linalg.lstsq(Xq.T, X.T @ W.T).solution.T
    least = error(W, best, X, Xq)
    assert least < error(W, fine, X, Xq) < 1.08 * least < 0.5 * error(W, W, X, Xq)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_order_of_columns_only_permutes_the_problem(solver):
    W, X, Xq = problem()
    order = torch.argsort(moments(X, Xq).hessian.diagonal(), descending=True)
    options = {"static_groups": True}
    ours = solver(act_order=True, **options).solve(W.float(), moments(X, Xq), IntGrid(4, -1)).quantized
    sorted_ = solver(**options).solve(W[:, order].float(), moments(X[order], Xq[order]), IntGrid(4, -1)).quantized
    assert (ours.codes[:, order] == sorted_.codes).float().mean() > 0.98


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_are_independent_and_linears_of_a_site_share_nothing_else(solver):
    W, X, Xq = problem()
    stats, options = moments(X, Xq), {"act_order": True, "static_groups": True}
    first, second = (solver(**options).solve(w.float(), stats, IntGrid(3, 16)).quantized for w in (W[:10], W[10:]))
    together = solver(**options).solve(W.float(), moments(X, Xq), IntGrid(3, 16)).quantized
    assert (torch.cat([first.codes, second.codes]) == together.codes).float().mean() > 0.99


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dead", [(0, 9), (5, 9)])
def test_dead_columns_become_zero_and_the_others_are_those_of_a_weight_without_them(solver, dead):
    W, X, Xq = problem()
    X[list(dead)] = Xq[list(dead)] = 0
    grid, stats = IntGrid(3, -1), moments(X, Xq)
    ours = solver(static_groups=True, damping=DAMPING)
    found = ours.solve(W.float(), stats, grid).quantized
    assert torch.equal(found.codes[:, list(dead)].float(), found.zeros.expand(-1, len(dead)))
    assert (found.dequantize()[:, list(dead)] == 0).all()
    W[:, list(dead)] = 0
    naive = {GPTAQ: naive_gptaq, Qronos: naive_qronos}[solver]
    theirs = naive(W, X, Xq, rounding(starting(ours, W, stats), grid))
    assert ((found.dequantize() - theirs).abs() < 1e-4).double().mean() > 0.98
    assert error(W, found.dequantize(), X, Xq) == pytest.approx(error(W, theirs, X, Xq), rel=0.01)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dead", [(5,), (0, 9, 63)])
@pytest.mark.parametrize(("solver", "drift", "times"), [(Qronos, 0.4, 1.12), (GPTAQ, 0.0, 1.02)])
def test_inputs_that_died_in_the_quantized_model_are_made_up_for_as_least_squares_does(
    solver, drift, times, dead, act_order
):
    """GPTAQ where nothing else has drifted; Qronos pays for its first column, which eq. 6 rounds off the solution."""
    W, X, Xq = problem(drift)
    Xq = Xq.clone()
    Xq[list(dead)] = 0
    alive = [i for i in range(len(Xq)) if i not in dead]
    ours = solver(static_groups=True, act_order=act_order, damping=1e-6)
    fine = ours.solve(W.float(), moments(X, Xq), IntGrid(8, 8)).quantized.dequantize()
    best = torch.zeros_like(W)
    best[:, alive] = torch.linalg.lstsq(Xq[alive].T, X.T @ W.T).solution.T
    least = error(W, best, X, Xq)
    assert (fine[:, list(dead)] == 0).all()
    assert least < error(W, fine, X, Xq) < times * least


@pytest.mark.parametrize("search", ["minmax", "hessian"])
@pytest.mark.parametrize("solver", [GPTQ, *SOLVERS])
def test_static_groups_are_fitted_to_the_weight_that_the_sweep_starts_from(solver, search):
    W, X, Xq = problem()
    grid, stats, ours = IntGrid(4, 16, search=search), moments(X, Xq), solver(act_order=True, static_groups=True)
    found = ours.solve(W.float(), stats, grid).quantized
    fitted = fit_all(grid, starting(ours, W, stats), stats.hessian)
    assert torch.equal(found.scales, fitted.scales)
    assert torch.equal(found.zeros, fitted.zeros)


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_missing_or_wrong_is_said(solver):
    W, X, Xq = problem()
    with pytest.raises(UserError, match=r"strength=1.5"):
        solver(strength=1.5)
    with pytest.raises(UserError, match=r"damping=-1"):
        solver(damping=-1.0)
    with pytest.raises(ValueError, match="cross"):
        solver().solve(W.float(), replace(moments(X, Xq), cross=None), IntGrid(4, 16))
    with pytest.raises(UserError, match=r"error_propagation"):
        Method("m", solver(), error_propagation=False)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_ledgers_error_is_around_the_layers_own_weight(solver):
    """`error_after` says how far outputs on the inputs as they are moved; the methods move them on purpose."""
    model = tiny_model("llama")
    rows = [
        row for block in quantize(model, tokens(), Method("m", solver()), IntGrid(4, 32), SMALL) for row in block.rows
    ]
    plain = quantize(tiny_model("llama"), tokens(), Method("m", GPTQ()), IntGrid(4, 32), SMALL)
    theirs = [row for block in plain for row in block.rows]
    assert rows[0]["codes_sha256"] == theirs[0]["codes_sha256"]  # nothing has drifted yet
    assert sum(row["error_after"] for row in rows[7:]) > sum(row["error_after"] for row in theirs[7:])
