"""A factor is of the very H that it is named by: solvers that change H never share one with those that do not."""

import dataclasses

import pytest
import torch

from gptq_awq.calibration.moments import Moments
from gptq_awq.calibration.observation import _keep as keeping
from gptq_awq.grids.integer import IntGrid
from gptq_awq.solvers.gptaq import GPTAQ
from gptq_awq.solvers.gptq import GPTQ

GRID = IntGrid(3, 64)
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Blended(GPTQ):
    """GPTQ on a blend of H with a multiple of I."""

    alpha: float = 0.9

    def solve(self, weight, moments, grid):
        mean = moments.hessian.diagonal().mean()
        blend = (1 - self.alpha) * moments.hessian + self.alpha * mean * torch.eye(len(moments.hessian))
        return super().solve(weight, dataclasses.replace(moments, hessian=blend), grid)


@dataclasses.dataclass(frozen=True)
class Loaded(GPTQ):
    """GPTQ after H was written to."""

    def solve(self, weight, moments, grid):
        moments.hessian.diagonal().add_(3 * moments.hessian.diagonal().mean())
        moments.forget_factors()
        return super().solve(weight, moments, grid)


SOLVERS = [GPTQ(), Blended(), Blended(alpha=0.5), Loaded(), GPTQ(act_order=True), GPTQ(damping=0.1)]


@pytest.fixture
def problem():
    torch.manual_seed(0)
    x = torch.randn(2000, 64) @ torch.randn(64, 64)
    return torch.randn(32, 64), x.T @ x / 2000


def codes(solver, problem, folder):
    weight, hessian = problem
    moments = Moments(hessian.clone(), hessian.diagonal().sqrt(), 2000, keep=keeping(folder / "factor", CPU))
    return solver.solve(weight.clone(), moments, GRID).quantized.sha256()


@pytest.mark.parametrize("first", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_whoever_factors_first_every_solver_gets_the_factor_of_its_own_hessian(tmp_path, problem, first):
    fresh = [codes(solver, problem, tmp_path / str(i)) for i, solver in enumerate(SOLVERS)]
    assert len(set(fresh)) == len(SOLVERS)
    codes(first, problem, tmp_path / "shared")
    assert [codes(solver, problem, tmp_path / "shared") for solver in SOLVERS] == fresh
    assert len(list((tmp_path / "shared").glob("*.safetensors"))) == len(SOLVERS)


def test_moments_made_of_others_do_not_take_over_their_factors(problem):
    """In memory, too: the linears of one site are solved one after the other."""
    weight, hessian = problem
    moments = Moments(hessian, hessian.diagonal().sqrt(), 2000)
    plain = GPTQ().solve(weight, moments, GRID).quantized.sha256()
    blended = Blended().solve(weight, moments, GRID).quantized.sha256()
    alone = Moments(hessian, hessian.diagonal().sqrt(), 2000)
    assert blended == Blended().solve(weight, alone, GRID).quantized.sha256()
    assert GPTQ().solve(weight, moments, GRID).quantized.sha256() == plain != blended
    moments.once("target", lambda: 1)
    assert dataclasses.replace(moments, hessian=2 * hessian).once("target", lambda: 2) == 2


def test_every_solver_takes_the_same_factor_of_one_hessian(tmp_path, problem):
    weight, hessian = problem
    for solver in (GPTQ(), GPTAQ(), GPTQ(block_size=16)):
        moments = Moments(hessian, hessian.diagonal().sqrt(), 2000, cross=hessian, keep=keeping(tmp_path / "f", CPU))
        solver.solve(weight.clone(), moments, GRID)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
