"""Allocate bits to linears: sensitivities, cached independently of the budget, then the cheapest choice within it."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from gptq_awq.allocation.knapsack import PROVEN, combination
from gptq_awq.allocation.sensitivity import Cost, SensitivityAnalysis
from gptq_awq.calibration.block_inputs import Settings
from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.grids.allocated import AllocatedGrid, Width
from gptq_awq.grids.integer import IntGrid
from gptq_awq.models.linear import matrix
from gptq_awq.quantization.method import Method
from gptq_awq.runtime.progress import Track, no_track
from gptq_awq.storage.atomic import replacing

log = logging.getLogger(__name__)

FILE_NAME = "allocation.json"


@dataclass(frozen=True)
class Allocation:
    """Bits and group size of every linear, and the predicted cost of rounding to them.

    Attributes:
        grid: the grid with every linear's bits and group size filled in.
        costs: costs of every linear at every width.
        bits_per_weight: mean stored bits per weight over all linears, scales and zeros included.
        predicted: sum of the costs; with sensitivity=fisher or kl, the predicted KL in nats per token.
        gap: part of `predicted` that the cheapest choice within the budget may save at most.
    """

    grid: AllocatedGrid
    costs: Sequence[Cost]
    bits_per_weight: float
    predicted: float
    gap: float = 0.0

    @property
    def chosen(self) -> Mapping[str, Width]:
        """Chosen bits and group size by a linear's full name."""
        return self.grid.allocated

    def summary(self) -> dict[str, Any]:
        """Summary of the allocation for the manifest (JSON values)."""
        histogram = {self._name(width): list(self.chosen.values()).count(width) for width in self.grid.widths}
        facts = {"sensitivity": self.grid.sensitivity, "linears_by_bits": histogram}
        facts |= {"bits_per_weight": self.bits_per_weight, "predicted": self.predicted}
        return facts | {"gap": self.gap, "optimal": self.gap <= PROVEN}

    def write(self, folder: Path) -> None:
        """Write the allocation and every linear's costs to `folder/allocation.json`. Raises OSError."""
        widths = self.grid.widths
        names = [self._name(width) for width in widths]
        linears = {}
        for cost in self.costs:
            bits, group_size = width = self.chosen[cost.name]
            linears[cost.name] = {
                "bits": bits,
                "group_size": group_size,
                "predicted": cost.costs[widths.index(width)],
                "costs": {n: c for n, c in zip(names, cost.costs, strict=True) if c is not None},
            }
        with replacing(folder / FILE_NAME) as scratch:
            scratch.write_text(json.dumps(self.summary() | {"linears": linears}, indent=1) + "\n")

    def _name(self, width: Width) -> str:
        """Name of a width in reports: its bits, and its group size where the grid has several."""
        bits, group_size = width
        return f"{bits}g{group_size}" if self.grid.group_sizes else str(bits)


def allocate(
    model: PreTrainedModel,
    tokens: TokenSet,
    method: Method,
    grid: AllocatedGrid,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    seed: int = 0,
    model_sha256: str = "",
    cache: Path | None = None,
    track: Track = no_track,
) -> Allocation:
    """Choose the bits of every linear in the model's blocks under the grid's budget; the model is not changed.

    Args:
        model: full-precision model.
        tokens: calibration tokens.
        method: its solver does the rounding where grid.rounding=solver; its transforms are ignored.
        grid: budget and choices of bits.
        settings: precision, batching and placement of calibration.
        seed: seed of the labels that sensitivity=fisher draws.
        model_sha256: hash of the weights, for the cache key.
        cache: folder in which sensitivities are cached; None caches nothing.
        track: reports progress.

    Raises:
        UserError: the budget is below the smallest choice, the Hessian of an input does not factor, a cost is not
            finite, or a measure needs the whole model and it is offloaded.
    """
    analysis = SensitivityAnalysis(model, tokens, method.solver, grid, settings, seed)
    costs = analysis.costs(cache, model_sha256, track)
    natural = getattr(method.solver, "natural_groups", True)
    sizes = {cost.name: [stored_bits(model, cost.name, grid.grid(w), natural) for w in grid.widths] for cost in costs}
    weights = {name: matrix(model.get_submodule(name)).numel() for name in sizes}
    chosen, gap = allocated_widths(grid, costs, sizes, _budget_in_bits(model, grid, weights, natural))
    at = {name: grid.widths.index(width) for name, width in chosen.items()}
    stored = sum(sizes[name][k] for name, k in at.items())
    predicted = sum(_finite(cost)[at[cost.name]] for cost in costs)
    if gap > PROVEN:
        log.warning(
            "grid=allocated: no proof in time that these bits are the cheapest within the budget; at the most %.2g%% "
            "of the predicted cost is left to save (manifest.allocation.gap)",
            100 * gap,
        )
    return Allocation(grid.resolved(chosen), costs, stored / sum(weights.values()), predicted, gap)


def allocated_widths(
    grid: AllocatedGrid, costs: Sequence[Cost], sizes: Mapping[str, Sequence[int]], budget: int
) -> tuple[dict[str, Width], float]:
    """Width of every linear with the least sum of costs, the sum of sizes (in bits) being within the budget.

    Beside it the gap: the part of the costs that another choice may save at most, 0 up to rounding where the solver
    finishes.

    Raises:
        UserError: the budget is below the smallest choice, or no width fits all linears that share their bits.
    """
    groups: dict[str, list[Cost]] = {}
    for cost in costs:
        tied = {"linear": cost.name, "site": cost.site, "model": ""}[grid.tie]
        groups.setdefault(tied, []).append(cost)
    together = np.array([np.sum([_finite(cost) for cost in group], 0) for group in groups.values()])
    if not np.isfinite(together).any(1).all():
        raise UserError(
            f"grid.group_sizes={list(grid.group_sizes or [])}: none divides the columns of all linears that "
            f"share their bits (grid.tie={grid.tie})"
        )
    size = np.array([np.sum([sizes[cost.name] for cost in group], 0) for group in groups.values()], dtype=np.int64)
    least = int(size.min(1, where=np.isfinite(together), initial=size.max()).sum())
    if least > budget:
        given = ("budget_bits", "budget_bytes", "budget_uniform")
        option = next(name for name in given if getattr(grid, name) is not None)
        raise UserError(
            f"grid.{option}={getattr(grid, option)}: the smallest of grid.choices takes {least / max(budget, 1):.2f} "
            "times as much, scales included; raise the budget or group_size"
        )
    found = combination(together, size, budget)
    picked = zip(groups.values(), found.chosen, strict=True)
    return {cost.name: grid.widths[k] for group, k in picked for cost in group}, found.gap


def _finite(cost: Cost) -> list[float]:
    """Costs of a linear by width, infinite where the width does not fit."""
    return [np.inf if c is None else c for c in cost.costs]


def stored_bits(model: nn.Module, name: str, grid: IntGrid, natural: bool = True) -> int:
    """Bits that a checkpoint stores for one linear, as its row in the results counts them.

    Without `natural` order of groups, each column's group takes 32 bits more.
    """
    rows, columns = matrix(model.get_submodule(name)).shape
    groups = 1 if grid.group_size == -1 else -(-columns // grid.group_size)
    order = 0 if natural or groups == 1 else 32 * columns
    return round(rows * (columns * grid.bits + groups * grid.overhead_bits)) + order


def _budget_in_bits(model: nn.Module, grid: AllocatedGrid, weights: Mapping[str, int], natural: bool) -> int:
    """Budget in bits, from whichever option gives it; `weights` is the number of weights by linear."""
    if grid.budget_uniform is not None:
        uniform = grid.grid((grid.budget_uniform, grid.group_size))
        return sum(stored_bits(model, name, uniform, natural) for name in weights)
    if grid.budget_bytes is not None:
        return 8 * grid.budget_bytes
    assert grid.budget_bits is not None
    return int(grid.budget_bits * sum(weights.values()) + 1e-6)
