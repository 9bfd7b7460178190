"""Cost of coordinate descent beside the sweep alone, with all rows at once and in tiles of 16 rows (yaqa).

    python benchmarks/refine_time.py [--passes 4] [--shapes 576x576 1536x576 576x1536]

One weight of normal numbers whose inputs, and whose outputs' gradients, are correlated; INT3 in groups of 64. Seconds
are of a whole solve by Qronos, the factors of H and H_O included, each the least of several in turn; ratios are to the
same solve without coordinate descent, in the same process.
"""

import argparse
import time
from dataclasses import replace

import torch
from solve_time import problem

from gptq_awq.calibration.moments import Moments
from gptq_awq.grids.integer import IntGrid
from gptq_awq.kernels.threads import match_torch
from gptq_awq.solvers.base import Solver
from gptq_awq.solvers.qronos import Qronos

GRID = IntGrid(3, 64, scale_dtype="float16", search="hessian")
SOLVER = Qronos(act_order=True, static_groups=True, damping=0.01)
TILE = 16


def seconds_of(solver: Solver, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Seconds of one solve of inputs that have drifted a little."""
    moments = Moments(hessian, hessian.diagonal().sqrt(), 1, cross=0.99 * hessian)
    started = time.perf_counter()
    solver.solve(weight, moments, GRID)
    return time.perf_counter() - started


def main() -> None:
    """Solve every shape in turn, several times, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["576x576", "1536x576", "576x1536"])
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    match_torch()
    print(
        "| rows x columns | rows together | seconds of the sweep | with descent | ratio |\n|:---|:---|---:|---:|---:|"
    )
    for shape in args.shapes:
        rows, columns = map(int, shape.split("x"))
        (weight, hessian), (_, curvature) = problem(rows, columns), problem(rows, rows)
        for name, coupled in (("all", False), (f"tiles of {TILE}, H_O", True)):
            best = {0: float("inf"), args.passes: float("inf")}
            for repeat in range(args.repeats + 1):  # the first compiles
                for passes in best:
                    own = replace(SOLVER, refine=passes)
                    solver = own.two_sided(curvature, TILE, 1.0) if coupled else own
                    taken = seconds_of(solver, weight, hessian)
                    best[passes] = min(taken, best[passes]) if repeat else float("inf")
            plain, refined = best.values()
            print(f"| {shape} | {name} | {plain:.3f} | {refined:.3f} | {refined / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
