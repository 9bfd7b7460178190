"""Seconds of finding widths under a budget: one block rounded to every width, scaled to the solves of the model."""

import copy
from dataclasses import replace

from gptq_awq.allocation.sensitivity import Measure, SensitivityAnalysis, measured_costs, output_fisher, solves
from gptq_awq.calibration.block_inputs import Inputs, first_batch
from gptq_awq.experiment.context import RunContext
from gptq_awq.experiment.forecasting.dry_run import measured, timed, with_blocks
from gptq_awq.experiment.forecasting.forecast import OBSERVED
from gptq_awq.experiment.plan import Plan
from gptq_awq.grids.allocated import BudgetedGrid
from gptq_awq.models.blocks import find_blocks
from gptq_awq.numerics.distributed import ONE
from gptq_awq.runtime.progress import no_track
from gptq_awq.storage.assets import cache_dir


def allocation_seconds(plan: Plan, context: RunContext) -> float:
    """Seconds of the sensitivities of a grid with a budget; 0 for other grids, and where they are in the cache.

    Raises:
        UserError: a Hessian doesn't factor.
    """
    grid, tokens, model = plan.grid, context.tokens, context.loaded.model
    if not isinstance(grid, BudgetedGrid) or plan.method.solver is None or tokens is None:
        return 0.0
    analysis = SensitivityAnalysis(model, tokens, plan.method.solver, grid, plan.settings, plan.seed)
    if analysis.known(cache_dir(), context.loaded.sha256):
        return 0.0
    gradients = 0.0
    if grid.sensitivity == "fisher":
        one, _ = timed(lambda: output_fisher(model, tokens.first(1), dtype=plan.compute_dtype))
        gradients = one * min(grid.windows, len(tokens.ids))
    _, blocks = find_blocks(model)
    view = with_blocks(model, [copy.deepcopy(blocks[-1])])
    batch = first_batch(tokens, plan.settings.tokens_per_batch)
    settings = replace(plan.settings, activations="keep", ranks=ONE)
    with measured() as seconds:
        inputs = Inputs(view, find_blocks(view)[1], batch, settings, error_propagation=False, absorbers=False)
        measure = Measure("error", view, batch, plan.seed, no_track)
        for _ in measured_costs(inputs, view, analysis.rounds, grid, measure):
            pass
    observing = sum(seconds[name] for name in OBSERVED if name in seconds)
    observing *= len(blocks) * analysis.observed.ids.numel() / batch.ids.numel()
    solving = sum(taken for name, taken in seconds.items() if name not in OBSERVED)
    return gradients + observing + solving * solves(model, grid) / solves(view, grid)
