"""Following runs with a tracker: one that is computed, and one that is taken over, as parts of the sweep that asks."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from hydra.core.hydra_config import HydraConfig

from gptq_awq.experiment.folder import LEDGER
from gptq_awq.experiment.plan import Plan
from gptq_awq.experiment.registry import Run
from gptq_awq.experiment.sweeps.sweep import sweep_folder
from gptq_awq.experiment.sweeps.tracking import Tracker, run_name
from gptq_awq.results import Result


def follow(plan: Plan, model: str, run: Run) -> Tracker:
    """Follow this run, as part of the sweep that asks for it."""
    folder, grid = sweep_folder(), plan.grid
    on_grid: dict[str, Any] = {"grid": grid.label, "bits": grid.bits, "group_size": grid.group_size}
    on_grid["sym"] = getattr(grid, "sym", None)
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    name = run_name(model, plan.method.name, **(on_grid if plan.method.solver else {}), overrides=overrides)
    group = None if folder is None else "/".join(folder.parts[-2:])
    return plan.tracking.start(plan.config, name, group, run.sha256)


def follow_finished(plan: Plan, run: Run, result: Result) -> None:
    """Open and close a tracker for a run that is taken over, so that it belongs to this sweep's group too."""
    tracker = follow(plan, result.model, run)
    rows = [json.loads(line) for line in (plan.out / LEDGER).read_text().splitlines()]
    for block, of_block in groupby(rows, key=lambda row: row.get("block")):
        log_block(tracker, block, list(of_block))
    tracker.ledger(rows)
    tracker.finish(result)


def log_block(tracker: Tracker, block: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log the mean relative error of a block's linears, where they have one."""
    errors = [row["error_after"] for row in rows if isinstance(row.get("error_after"), float)]
    if errors:
        tracker.log({"quantize/relative_error": sum(errors) / len(errors)}, step=block)
