"""Allocate widths to weights: sensitivities, cached independently of the budget, then the cheapest choice within it."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from gptq_awq.allocation.knapsack import PROVEN, combination
from gptq_awq.allocation.sensitivity import Cost, SensitivityAnalysis, allocated_places
from gptq_awq.calibration.block_inputs import Settings
from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.grids.allocated import BudgetedGrid, stored_bits
from gptq_awq.models.linear import matrix
from gptq_awq.quantization.method import Method
from gptq_awq.runtime.progress import Track, no_track
from gptq_awq.storage.atomic import replacing

log = logging.getLogger(__name__)

FILE_NAME = "allocation.json"


@dataclass(frozen=True)
class Allocation:
    """Width of every weight, and the predicted cost of rounding to them.

    Attributes:
        grid: the grid with every weight's width filled in.
        costs: costs of every weight at every width.
        bits_per_weight: mean stored bits per weight over all weights, scales and zeros included.
        predicted: sum of the costs; with sensitivity=fisher or kl, the predicted KL in nats per token.
        gap: part of `predicted` that the cheapest choice within the budget may save at most.
    """

    grid: BudgetedGrid
    costs: Sequence[Cost]
    bits_per_weight: float
    predicted: float
    gap: float = 0.0

    @property
    def chosen(self) -> Mapping[str, Any]:
        """Chosen width by a weight's full name."""
        return self.grid.allocated

    def summary(self) -> dict[str, Any]:
        """Summary of the allocation for the manifest (JSON values)."""
        grid = self.grid
        histogram = {grid.name_of(width): list(self.chosen.values()).count(width) for width in grid.widths}
        facts = {"sensitivity": grid.sensitivity, "linears_by_bits": histogram}
        facts |= {"bits_per_weight": self.bits_per_weight, "predicted": self.predicted}
        return facts | {"gap": self.gap, "optimal": self.gap <= PROVEN}

    def write(self, folder: Path) -> None:
        """Write the allocation and every weight's costs to `folder/allocation.json`. Raises OSError."""
        grid, widths = self.grid, self.grid.widths
        names = [grid.name_of(width) for width in widths]
        linears = {}
        for cost in self.costs:
            width = self.chosen[cost.name]
            linears[cost.name] = {
                **grid.facts_of(width),
                "predicted": cost.costs[widths.index(width)],
                "costs": {n: c for n, c in zip(names, cost.costs, strict=True) if c is not None},
            }
        with replacing(folder / FILE_NAME) as scratch:
            scratch.write_text(json.dumps(self.summary() | {"linears": linears}, indent=1) + "\n")


def allocate(
    model: PreTrainedModel,
    tokens: TokenSet,
    method: Method,
    grid: BudgetedGrid,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    seed: int = 0,
    model_sha256: str = "",
    cache: Path | None = None,
    track: Track = no_track,
    beside: int = 0,
) -> Allocation:
    """Choose the width of every weight under the grid's budget; the model is not changed.

    Args:
        model: full-precision model.
        tokens: calibration tokens.
        method: its solver does the rounding where grid.rounding=solver; its transforms are ignored.
        grid: budget and choices.
        settings: precision, batching and placement of calibration.
        seed: seed of the labels that sensitivity=fisher draws.
        model_sha256: hash of the weights, for the cache key.
        cache: folder in which sensitivities are cached; None caches nothing.
        track: reports progress.
        beside: bytes of the file besides these weights, where the budget counts the whole file.

    Raises:
        UserError: the budget is below the smallest choice, the Hessian of an input does not factor, a cost is not
            finite, or a measure needs the whole model and it is offloaded.
    """
    sizes, budget = sizes_and_budget(model, method, grid, beside)
    analysis = SensitivityAnalysis(model, tokens, method.solver, grid, settings, seed)
    costs = analysis.costs(cache, model_sha256, track)
    chosen, gap = allocated_widths(grid, costs, sizes, budget)
    at = {name: grid.widths.index(width) for name, width in chosen.items()}
    stored = sum(sizes[name][k] for name, k in at.items())
    predicted = sum(_finite(cost)[at[cost.name]] for cost in costs)
    if gap > PROVEN:
        log.warning(
            "grid=%s: no proof in time that these widths are the cheapest within the budget; at the most %.2g%% "
            "of the predicted cost is left to save (manifest.allocation.gap)",
            getattr(grid, "label", "allocated"),
            100 * gap,
        )
    weights = sum(model.get_submodule(name).get_parameter("weight").numel() for name in sizes)
    return Allocation(grid.resolved(chosen), costs, stored / weights, predicted, gap)


def sizes_and_budget(
    model: PreTrainedModel, method: Method, grid: BudgetedGrid, beside: int = 0
) -> tuple[dict[str, list[int]], int]:
    """Stored bits of every weight at every width, and the bits that all may take; for a check without calibration.

    Raises:
        UserError: the budget is below the smallest choice, and the message names the smallest budget that can be met;
            no width fits a weight.
    """
    places = allocated_places(model, grid)
    for place in places:
        if not grid.fitting(place.columns):
            grid.at(place)  # which says what would fit
    order = 0 if getattr(method.solver, "natural_groups", True) else 32
    rows = {place.name: _rows(model, place.name) for place in places}
    sizes = {
        place.name: [stored_bits(grid.grid(width), rows[place.name], place.columns, order) for width in grid.widths]
        for place in places
    }
    budget = grid.budget_in_bits(places, rows, order, 8 * beside)
    fitting = {place.name: [grid.widths.index(width) for width in grid.fitting(place.columns)] for place in places}
    least = sum(min(sizes[name][k] for k in fitting[name]) for name in sizes)
    if least > budget:
        raise _too_small(grid, least, budget, beside, sum(rows[place.name] * place.columns for place in places))
    return sizes, budget


def _too_small(grid: BudgetedGrid, least: int, budget: int, beside: int = 0, weights: int = 0) -> UserError:
    if grid.counts_file:
        size = f"{least / 8e6 + beside / 1e6 + 0.05:.1f}MB"
        per_weight = f" ({math.ceil(100 * least / weights) / 100:g} bits per weight)" if weights else ""
        return UserError(f"{grid.budget_option}: the smallest of grid.types take {size}, all else included{per_weight}")
    return UserError(
        f"{grid.budget_option}: the smallest of grid.choices takes {least / max(budget, 1):.2f} times as much, scales "
        "included; raise the budget or group_size"
    )


def _rows(model: PreTrainedModel, name: str) -> int:
    return len(matrix(model.get_submodule(name)))


def allocated_widths(
    grid: BudgetedGrid, costs: Sequence[Cost], sizes: Mapping[str, Sequence[int]], budget: int
) -> tuple[dict[str, Any], float]:
    """Width of every weight with the least sum of costs, the sum of sizes (in bits) being within the budget.

    Beside it the gap: the part of the costs that another choice may save at most, 0 up to rounding where the solver
    finishes.

    Raises:
        UserError: the budget is below the smallest choice, or no width fits all weights that share theirs.
    """
    groups: dict[str, list[Cost]] = {}
    for cost in costs:
        tied = {"linear": cost.name, "site": cost.site, "model": ""}[grid.tie]
        groups.setdefault(tied, []).append(cost)
    together = np.array([np.sum([_finite(cost) for cost in group], 0) for group in groups.values()])
    if not np.isfinite(together).any(1).all():
        raise UserError(
            f"grid.group_sizes={list(getattr(grid, 'group_sizes', None) or [])}: none divides the columns of all "
            f"linears that share their bits (grid.tie={grid.tie})"
        )
    size = np.array([np.sum([sizes[cost.name] for cost in group], 0) for group in groups.values()], dtype=np.int64)
    least = int(size.min(1, where=np.isfinite(together), initial=size.max()).sum())
    if least > budget:
        raise _too_small(grid, least, budget)
    found = combination(together, size, budget)
    picked = zip(groups.values(), found.chosen, strict=True)
    return {cost.name: grid.widths[k] for group, k in picked for cost in group}, found.gap


def _finite(cost: Cost) -> list[float]:
    """Costs of a weight by width, infinite where the width does not fit."""
    return [np.inf if c is None else c for c in cost.costs]
