"""Laws of the ledger's errors."""

from dataclasses import replace

import pytest
from helpers.linear_problems import moments, problem

from gptq_awq.grids.base import nearest
from gptq_awq.grids.integer import IntGrid
from gptq_awq.models.linear import Site
from gptq_awq.numerics.linalg import quadratic
from gptq_awq.quantization.ledger import LinearReport
from gptq_awq.quantization.method import Method
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.qronos import Qronos
from gptq_awq.solvers.rtn import RTN

SOLVERS = [RTN(), GPTQ(), GPTQ(act_order=True, static_groups=True, damping=0.3), GPTQ(refine=2), Qronos()]


@pytest.mark.parametrize("search", ["minmax", "hessian"])
@pytest.mark.parametrize("dead", [False, True], ids=["alive", "dead"])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_errors_are_those_of_the_solved_weight_and_of_the_nearest_one(solver, dead, search):
    W, H = problem(rows=40)
    if dead:
        H[3], H[:, 3] = 0, 0
    stats, grid = replace(moments(H), cross=0.9 * H), IntGrid(3, 32, search=search)
    solution = solver.solve(W.clone(), stats, grid)
    dequantized = solution.quantized.dequantize()
    found = LinearReport("x", 0, Site(("x",), 96), Method(solver.name, solver), stats, {}).errors(
        W, dequantized, solution
    )
    assert found.after == pytest.approx(quadratic(dequantized - W, H), rel=1e-3)
    assert found.before == pytest.approx(quadratic(nearest(grid, W) - W, H), rel=3e-3)
    assert found.signal == pytest.approx(quadratic(W, H), rel=3e-3)
    assert found.changed == pytest.approx(float((dequantized - W).square().sum()))


def test_what_is_rounded_to_nearest_has_one_error_before_and_after():
    W, H = problem()
    solution = RTN().solve(W.clone(), moments(H), IntGrid(4, 32))
    report = LinearReport("x", 0, Site(("x",), 96), Method("rtn", RTN()), moments(H), {})
    errors = report.errors(W, solution.quantized.dequantize(), solution)
    assert errors.before == errors.after
