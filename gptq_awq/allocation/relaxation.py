"""Linear relaxation of the multiple-choice knapsack: a bound of the optimum, and a combination close to it, at once.

Per item, only choices on the lower convex hull of (size, cost) matter to the relaxation. Its steps, of all items in the
order of cost saved per size, are taken as long as they fit (Sinha and Zoltners, Operations Research 27, 1979); the rate
of the first that does not fit is the budget's price λ, and

    bound = Σ_i min_k (c_ik + λ s_ik) - λ room

No combination within the budget costs less, whatever λ ≥ 0 is. The steps taken are one combination; it costs at most
the first step not taken more than the bound, and single exchanges then use the room that is left.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Relaxed:
    """Solution of the relaxation, rounded to a combination within the budget.

    Attributes:
        chosen: index of each item's choice.
        cost: sum of the chosen costs.
        price: λ, cost per unit of size.
        bound: lower bound of the cost of any combination within the budget.
    """

    chosen: Int[np.ndarray, "items"]
    cost: float
    price: float
    bound: float

    def needed(
        self, costs: Float[np.ndarray, "items choices"], sizes: Int[np.ndarray, "items choices"]
    ) -> Bool[np.ndarray, "items choices"]:
        """True at choices that a cheaper combination than this one may have: all others raise the bound above it."""
        reduced = costs + self.price * sizes
        needed = self.bound + reduced - reduced.min(1, keepdims=True) <= self.cost * (1 + 1e-9)
        needed[np.arange(len(costs)), self.chosen] = True
        return needed


def relaxed(costs: Float[np.ndarray, "items choices"], sizes: Int[np.ndarray, "items choices"], room: int) -> Relaxed:
    """Solve the relaxation; costs are infinite where an item lacks a choice, each item's smallest size is 0."""
    steps = sorted(
        (-rate, item, number, choice)
        for item, (own, size) in enumerate(zip(costs, sizes, strict=True))
        for number, (rate, choice) in enumerate(_hull(own, size))
    )
    chosen = np.array([choice for _, _, number, choice in sorted(steps, key=lambda s: s[1:]) if number == 0])
    left, price, full = room, 0.0, set[int]()
    for rate, item, number, choice in steps:
        more = int(sizes[item, choice] - sizes[item, chosen[item]])
        if number == 0 or item in full:
            continue
        if more > left:
            price = price or -rate
            full.add(item)  # later steps of the item start from this one
            continue
        chosen[item], left = choice, left - more
    chosen = _exchanged(costs, sizes, chosen, left)
    cost = float(costs[np.arange(len(costs)), chosen].sum())
    bound = float((costs + price * sizes).min(1).sum() - price * room)
    return Relaxed(chosen, cost, price, bound)


def _hull(costs: Float[np.ndarray, "choices"], sizes: Int[np.ndarray, "choices"]) -> list[tuple[float, int]]:
    """Choices on an item's lower hull, from the smallest, with the cost that each saves per size over the one before.

    The first has an infinite rate: it is taken before all others.
    """
    order = [int(k) for k in np.lexsort((costs, sizes)) if np.isfinite(costs[k])]
    hull = [(np.inf, order[0])]
    for k in order[1:]:
        if costs[k] >= costs[hull[-1][1]]:
            continue  # another is as cheap and no larger
        while True:
            rate, last = hull[-1]
            saved = (costs[last] - costs[k]) / max(sizes[k] - sizes[last], 1e-300)
            if saved < rate or len(hull) == 1:
                break
            hull.pop()
        hull.append((float(saved), k))
    return hull


def _exchanged(
    costs: Float[np.ndarray, "items choices"],
    sizes: Int[np.ndarray, "items choices"],
    chosen: Int[np.ndarray, "items"],
    left: int,
) -> Int[np.ndarray, "items"]:
    """Change one item's choice at a time, the one that saves most first, as long as what is left has room for one."""
    chosen, items = chosen.copy(), np.arange(len(costs))
    while True:
        saved = costs[items, chosen][:, None] - costs
        more = sizes - sizes[items, chosen][:, None]
        saved[more > left] = -np.inf
        item, choice = np.unravel_index(int(saved.argmax()), saved.shape)
        if not saved[item, choice] > 0:
            return chosen
        left -= int(more[item, choice])
        chosen[item] = choice
