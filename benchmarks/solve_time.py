"""Cost of GPTQ onto each grid beside GPTQ onto integers: one linear, one thread, in CPU time.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/solve_time.py [--grids iq3_s nvfp4 …] [--columns 1024]

One weight of normal numbers whose inputs are correlated from column to column. Seconds are of a whole `GPTQ.solve`, the
factor of H included, each the least of several in turn; the ratio is to INT4 in groups of 128 with ranges of
`grid.search=minmax`, the next column to INT4 with the same search as the grid. The output error tr(ΔHΔᵀ) is relative
to tr(WHWᵀ).
"""

import argparse
import time
from typing import Any

import torch

from gptq_awq.calibration.moments import Moments
from gptq_awq.grids.base import Grid
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.mix import llama_grid
from gptq_awq.grids.scaled_float import ScaledFloatGrid
from gptq_awq.numerics.linalg import quadratic
from gptq_awq.solvers.gptq import GPTQ

GRIDS = ("nvfp4", "mxfp4", "q4_k", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs")
SEARCHES = ("minmax", "mse", "hessian")


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the second moments of inputs that are correlated from column to column."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4 * columns, columns, generator=draw) * torch.linspace(0.3, 2, columns)
    x[:, 1:] += 0.7 * x[:, :-1].clone()
    return 0.05 * torch.randn(rows, columns, generator=draw), x.T @ x / len(x)


def grid_of(name: str, search: str) -> Grid:
    """A grid by its name, with a search."""
    choice: Any = search
    if name == "int4":
        return IntGrid(4, 128, scale_dtype="float16", search=choice)
    return ScaledFloatGrid(search=choice) if name == "nvfp4" else llama_grid(name, search)


def solved(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> tuple[float, float]:
    """CPU seconds of one solve, and its output error beside the weight's own output."""
    moments = Moments(hessian, hessian.diagonal().sqrt(), 1)  # new each time: factors are kept in it
    started = time.process_time()
    found = GPTQ().solve(weight, moments, grid.for_weights([weight]))
    seconds = time.process_time() - started
    error = quadratic(weight - found.quantized.dequantize(), hessian)
    return seconds, float(error / quadratic(weight, hessian))


def main() -> None:
    """Solve on every grid in turn, several times, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", nargs="+", default=GRIDS)
    parser.add_argument("--searches", nargs="+", default=SEARCHES)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    weight, hessian = problem(args.rows, args.columns)
    cases = [(name, search) for name in ("int4", *args.grids) for search in args.searches]
    cases = list(dict.fromkeys([("int4", "minmax"), *cases]))
    best, errors = {}, {}
    for repeat in range(args.repeats + 1):  # the first compiles
        for case in cases:
            seconds, errors[case] = solved(weight, hessian, grid_of(*case))
            best[case] = min(seconds, best.get(case, seconds)) if repeat else float("inf")
    print("| grid | search | time / INT4's, minmax | / INT4's, same search | output error |")
    print("|:---|:---|---:|---:|---:|")
    for case in cases:
        plain, alike = best["int4", "minmax"], best["int4", case[1]]
        print(f"| {' | '.join(case)} | {best[case] / plain:.2f} | {best[case] / alike:.2f} | {errors[case]:.5f} |")


if __name__ == "__main__":
    main()
