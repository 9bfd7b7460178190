"""Driver of gptq_awq itself for benchmarks/peers.py; see job.py."""

# pyright: reportArgumentType=false

import time
from dataclasses import replace

from hydra.utils import instantiate
from job import Job, answer, read_job, timed

from gptq_awq import quantize_model
from gptq_awq.allocation.allocate import allocate
from gptq_awq.data.tokens import make_token_set
from gptq_awq.grids.allocated import BudgetedGrid
from gptq_awq.grids.base import Grid
from gptq_awq.models.load import LocalModel
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import Settings
from gptq_awq.runtime.configs import composed_method
from gptq_awq.runtime.memory import keep_freed
from gptq_awq.solvers.gptq import GPTQ

WARM_UP_WINDOWS = 4
"""Windows that a warm-up writes, where a recipe writes 96."""


def chosen(job: Job) -> tuple[Method, Grid, str]:
    """Preset and grid for the job, and a description of them.

    Plain settings are the papers' own: the range of a group's extremes, columns in their natural order.
    """
    preset, *options = job.method.split()
    name, _, choice = preset.partition("+")
    mixed = [f"grid={choice}"] if choice else []
    sizes = (f"bits={job.bits}", f"group_size={job.group_size}", f"sym={job.sym}")
    composed = composed_method(name, *mixed, *sizes, *options)
    method, grid = (instantiate(node, _convert_="all") for node in (composed.method, composed.grid))
    if job.warm_up and method.self_calibration is not None:
        method = replace(method, self_calibration=replace(method.self_calibration, windows=WARM_UP_WINDOWS))
    grid = grid if job.tuned or mixed else grid.without_search()
    settings = [f"grid.search={getattr(grid, 'search', None)}"]
    solver = method.solver
    if isinstance(solver, GPTQ):
        order = {} if job.tuned else {"act_order": False, "static_groups": False}
        solver = replace(solver, damping=job.damping, **order)
        settings.append(f"act_order={solver.act_order}")
    return replace(method, solver=solver), grid, ", ".join(settings)


def main() -> None:
    """Load the model, quantize it, and write the answer."""
    job = read_job()
    keep_freed()  # as the command does
    loaded = LocalModel(path=job.model).load("float32", "cpu")
    method, grid, settings = chosen(job)
    forwards = Settings(compute_dtype=job.dtype)
    tokens, writing = job.tokens(), 0.0
    given = make_token_set("calibration", tokens, None, "job")

    def quantize() -> None:
        nonlocal tokens, writing
        chosen, own = grid, method.self_calibration
        if own is not None:  # runs keep what was written, so its time is told apart
            started = time.perf_counter()
            tokens = own.extend(loaded.model, given, job.torch_dtype).ids
            writing = time.perf_counter() - started
        if isinstance(grid, BudgetedGrid):
            chosen = allocate(loaded.model, given, method, grid, forwards).grid
        quantize_model(loaded.model, tokens, replace(method, self_calibration=None), grid=chosen, settings=forwards)

    took = timed(quantize)
    answer(job, "gptq_awq", took, dict(loaded.model.named_parameters()), settings, writing)


if __name__ == "__main__":
    main()
