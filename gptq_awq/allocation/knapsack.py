"""Multiple-choice knapsack: one choice per item at the least total cost, with the total size within a budget.

    min Σ_i Σ_k c_ik x_ik    Σ_k x_ik = 1,   Σ_i Σ_k s_ik x_ik ≤ budget,   x binary

An integer program for HiGHS (through SciPy), solved to optimality up to a relative gap of 1e-6. HiGHS may run out of
time, and its tolerances are absolute: where one cost dwarfs the optimum, it takes any combination for the best. Its
answer is therefore held against the linear relaxation (relaxation.py), and where it is not proven it gets a second
try without the choices that no optimum has. The cheapest combination met is returned, with its proven gap.
"""

from dataclasses import dataclass
from math import gcd

import numpy as np
from jaxtyping import Bool, Float, Int

from gptq_awq.allocation.relaxation import relaxed

GAP = 1e-6
PROVEN = 2 * GAP
"""Gap up to which a combination counts as the cheapest."""
SECONDS = 60
TOLERANCE = 1e-7
"""Tolerance of HiGHS for infeasible solutions of the dual, per item of average cost."""


@dataclass(frozen=True)
class Combination:
    """One choice per item within the budget, and how far it is from the cheapest at most.

    Attributes:
        chosen: index of each item's choice.
        gap: proven bound of (cost - optimum) / cost; 0 where the optimum is known to be no cheaper.
    """

    chosen: Int[np.ndarray, "items"]
    gap: float


def cheapest(
    costs: Float[np.ndarray, "items choices"], sizes: Int[np.ndarray, "items choices"], budget: int
) -> Int[np.ndarray, "items"]:
    """Index of each item's choice in the cheapest combination within the budget, as far as `combination` finds it."""
    return combination(costs, sizes, budget).chosen


def combination(
    costs: Float[np.ndarray, "items choices"], sizes: Int[np.ndarray, "items choices"], budget: int
) -> Combination:
    """Cheapest combination within the budget that was found, and its proven gap; never none.

    Args:
        costs: nonnegative; infinite where an item lacks that choice; every item has at least one.
        sizes: whole numbers.
        budget: largest sum of sizes.

    Raises:
        ValueError: the smallest sizes exceed the budget, or a cost is not a number or negative.
    """
    if np.isnan(costs).any() or (costs < 0).any():
        raise ValueError("a cost is not a number, or negative")
    possible = np.isfinite(costs)
    least = sizes.min(1, where=possible, initial=sizes.max())
    room = budget - int(least.sum())
    if room < 0:
        raise ValueError(f"the smallest choices take {least.sum()}, the budget is {budget}")
    extra = np.where(possible, sizes - least[:, None], 0)  # HiGHS is more exact on smaller numbers
    easy = relaxed(costs, extra, room)

    def cost(chosen: Int[np.ndarray, "items"]) -> float:
        return float(costs[np.arange(len(costs)), chosen].sum())

    best, bound = easy.chosen, easy.bound
    needed = possible & easy.needed(costs, extra)
    for number, within in enumerate((possible, needed)):
        found = _highs(np.where(within, costs, 0.0), extra, room, within)
        bound = max(bound, found.bound)
        # Combinations within the gap of each other can't be told apart: HiGHS' first one goes before all others.
        if found.chosen is not None and cost(found.chosen) * (1 - GAP) <= cost(best) * (1 - PROVEN * number):
            best = found.chosen
        if bound >= cost(best) * (1 - GAP):
            break
    least = cost(best)
    return Combination(best, max(0.0, float(1 - bound / least)) if least else 0.0)


@dataclass(frozen=True)
class _Found:
    """Answer of HiGHS in its time, if any within the budget, and a bound of the cheapest combination's cost."""

    chosen: Int[np.ndarray, "items"] | None
    bound: float


def _highs(
    costs: Float[np.ndarray, "items choices"],
    extra: Int[np.ndarray, "items choices"],
    room: int,
    possible: Bool[np.ndarray, "items choices"],
) -> _Found:
    """Combination that HiGHS finds in its time among the possible choices."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import
    from scipy.sparse import csr_array

    items, choices = costs.shape
    unit = gcd(*extra.ravel().tolist()) or 1
    scale = costs.max() or 1.0
    one_each = csr_array((np.ones(costs.size), (np.repeat(np.arange(items), choices), np.arange(costs.size))))
    solved = milp(
        costs.ravel() / scale * items,
        integrality=np.ones(costs.size),
        bounds=Bounds(0, possible.ravel().astype(float)),  # pyright: ignore[reportArgumentType]
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(extra.reshape(1, -1) // unit, ub=room // unit),
        ],
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    dual = solved.get("mip_dual_bound")
    # HiGHS takes reduced costs below its tolerance for zero.
    bound = -np.inf if dual is None else (float(dual) - TOLERANCE * items) * scale / items
    if solved.x is None:
        return _Found(None, bound)
    chosen = np.where(possible, solved.x.reshape(items, choices), -1.0).argmax(1)
    within = extra[np.arange(items), chosen].sum() <= room  # HiGHS may exceed the budget by its tolerance
    return _Found(chosen if within else None, bound)
