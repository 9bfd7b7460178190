"""Multiple-choice knapsack: one choice per item at the least total cost, with the total size within a budget.

    min Σ_i Σ_k c_ik x_ik    Σ_k x_ik = 1,   Σ_i Σ_k s_ik x_ik ≤ budget,   x binary

An integer program for HiGHS (through SciPy), solved to optimality up to a relative gap of 1e-6.
"""

from math import gcd

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

GAP = 1e-6
SECONDS = 60


def cheapest(
    costs: Float[np.ndarray, "items choices"], sizes: Int[np.ndarray, "items choices"], budget: int
) -> Int[np.ndarray, "items"]:
    """Index of each item's choice in the cheapest combination within the budget.

    Args:
        costs: nonnegative; infinite where an item lacks that choice; every item has at least one.
        sizes: whole numbers.
        budget: largest sum of sizes.

    Raises:
        ValueError: the smallest sizes exceed the budget, or the solver finds no combination within it in time.
    """
    possible = np.isfinite(costs)
    least = sizes.min(1, where=possible, initial=sizes.max())
    room = budget - int(least.sum())
    if room < 0:
        raise ValueError(f"the smallest choices take {least.sum()}, the budget is {budget}")
    items, choices = costs.shape
    extra = np.where(possible, sizes - least[:, None], 0)  # HiGHS is more exact on smaller numbers
    costs = np.where(possible, costs, 0.0)
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
    if solved.x is None:
        raise ValueError(f"no allocation found: {solved.message}")
    chosen = solved.x.reshape(items, choices).argmax(1)
    if extra[np.arange(items), chosen].sum() > room:
        raise ValueError("the allocation found exceeds the budget, within the tolerance of HiGHS")
    return chosen
