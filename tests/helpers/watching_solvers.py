"""Solvers that note the moments they are given."""

from dataclasses import dataclass

from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN


@dataclass(frozen=True)
class Watching:
    """A solver that rounds as another does, and notes the moments it is given."""

    solver: GPTQ | RTN
    seen: list
    name: str = "watching"
    needs_hessian: bool = True
    needs_cross: bool = True

    def solve(self, weight, moments, grid):
        self.seen.append(moments)
        return self.solver.solve(weight, moments, grid)


@dataclass(frozen=True)
class Keep:
    """A solver that changes no weight."""

    seen: list
    name: str = "keep"
    needs_hessian: bool = True
    needs_cross: bool = True

    def solve(self, weight, moments, grid):
        self.seen.append(moments)
        solution = RTN().solve(weight, moments, grid)
        object.__setattr__(solution.quantized, "dequantize", lambda: weight)
        return solution
