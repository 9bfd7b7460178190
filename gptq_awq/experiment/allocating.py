"""Choices between preflight and quantization: bits under a budget, and linears that stay in full precision."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gptq_awq.allocation.allocate import Allocation, allocate
from gptq_awq.allocation.protect import protected
from gptq_awq.experiment.context import RunContext
from gptq_awq.experiment.plan import Plan
from gptq_awq.grids.allocated import BudgetedGrid
from gptq_awq.grids.protected import ProtectedGrid
from gptq_awq.numerics.distributed import ONE
from gptq_awq.quantization.coverage import coverage_of
from gptq_awq.quantization.targets import assign_grids
from gptq_awq.runtime.progress import Track
from gptq_awq.runtime.runlog import Clock
from gptq_awq.storage.assets import cache_dir

Say = Callable[[str], object]
"""Tells the user a line."""


def allocated(
    plan: Plan, context: RunContext, clock: Clock, track: Track, say: Say
) -> tuple[Plan, Allocation | None, dict[str, Any]]:
    """Replace a grid that has a budget by the widths that the budget allows each linear, or choose what it protects.

    Returns the plan, the allocation of a grid with a budget, and facts for the manifest.
    """
    model, tokens, grid, settings = context.loaded.model, context.tokens, plan.grid, replace(plan.settings, ranks=ONE)
    if plan.method.solver is None or tokens is None:
        return plan, None, {}
    if isinstance(grid, ProtectedGrid) and grid.undecided:
        with clock.phase("allocate"):
            found = protected(model, tokens, grid, settings, plan.seed, track)
        say(str(found))
        coverage = coverage_of(model, assign_grids(model, found.grid, plan.method.head))
        return replace(plan, grid=found.grid), None, {"protected": found.row(), "coverage": coverage.row()}
    if not isinstance(grid, BudgetedGrid):
        return plan, None, {}
    with clock.phase("allocate"):
        allocation = allocate(
            model,
            tokens,
            plan.method,
            grid,
            settings=settings,
            seed=plan.seed,
            model_sha256=context.loaded.sha256,
            cache=cache_dir(),
            track=track,
            beside=context.beside,
        )
    return replace(plan, grid=allocation.grid), allocation, {"allocation": allocation.summary()}
