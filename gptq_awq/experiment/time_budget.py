"""A time instead of a method: the strongest of some recipes that a forecast expects to quantize within a budget.

A recipe is a method, or a method and a grid (fast+mixed), for runs whose own grid is of plain integers. Recipes are
tried from the strongest on, each by a dry run of one block (forecasting/), until one fits; the last one is taken
whatever it costs. What was chosen is kept, so that the same command goes on with the same recipe after a kill.
The run that follows is that of the recipe: typed by name it is the same run.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hydra.errors import MissingConfigException
from omegaconf import DictConfig, open_dict

from gptq_awq.allocation.allocate import sizes_and_budget
from gptq_awq.errors import UserError
from gptq_awq.experiment.context import RunContext, check_method, load
from gptq_awq.experiment.forecasting.allocating import allocation_seconds
from gptq_awq.experiment.forecasting.dry_run import dry_run_of
from gptq_awq.experiment.forecasting.forecast import Counts
from gptq_awq.experiment.plan import Plan, preflight
from gptq_awq.experiment.sweeps.progress import duration
from gptq_awq.export.base import linear_specs
from gptq_awq.grids.allocated import BudgetedGrid
from gptq_awq.grids.integer import IntGrid
from gptq_awq.numerics.distributed import Ranks
from gptq_awq.quantization.targets import assign_grids
from gptq_awq.runtime.configs import composed_method
from gptq_awq.storage.assets import cache_dir
from gptq_awq.storage.notes import note, noted

log = logging.getLogger(__name__)
Say = Callable[[str], None]
PLAIN = f"{IntGrid.__module__}.{IntGrid.__qualname__}"
UNITS = {"": 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Choice:
    """A recipe that was chosen.

    Attributes:
        method: its name, of a method or of a method and a grid.
        seconds: forecast of each recipe that was tried, strongest first.
    """

    method: str
    seconds: dict[str, float]

    def told(self, budget: str) -> str:
        """One line: what was chosen, what it is expected to take, and what more time would buy."""
        own, method = self.seconds.get(self.method), self.method.replace("+", " grid=")
        line = f"time_budget={budget}: method={method}" + (f", about {duration(own)}" if own is not None else "")
        dearer = [f"{name} would take {duration(s)}" for name, s in self.seconds.items() if name != self.method]
        return line + (f" ({'; '.join(dearer)})" if dearer else "")


def seconds_of(budget: str | float) -> float:
    """Seconds of a budget such as 5min, 90s, 1h or 300.

    Raises:
        UserError: no such time.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", str(budget).lower())
    try:
        seconds = float(match[1]) * UNITS[match[2]] if match else 0.0
    except (KeyError, ValueError):
        seconds = 0.0
    if seconds <= 0:
        raise UserError(f"time_budget={budget}: give a time above zero, such as 5min, 90s or 1h")
    return seconds


def within_budget(cfg: DictConfig, ranks: Ranks, say: Say) -> DictConfig:
    """The config with the strongest recipe that fits `time_budget` as its method; unchanged where there is no budget.

    Of several ranks the first one chooses, by the time that it would take alone.

    Raises:
        UserError: there is no such time or recipe; the model or the data can't be loaded.
    """
    if cfg.get("time_budget") is None:
        return cfg
    budget, names = seconds_of(cfg.time_budget), list(cfg.get("recipes") or ())
    if not names:
        raise UserError(f"time_budget={cfg.time_budget}: name the recipes to choose among, recipes=[best,fast,rtn]")
    choice = ranks.from_first(lambda: _chosen(cfg, budget, names, say))
    if ranks.first:
        say(choice.told(cfg.time_budget))
    return _with_recipe(cfg, choice.method)


def _chosen(cfg: DictConfig, budget: float, names: Sequence[str], say: Say) -> Choice:
    configs = {name: _with_recipe(cfg, name) for name in names if "+" not in name or cfg.grid._target_ == PLAIN}
    if not configs:
        raise UserError(f"time_budget={cfg.time_budget}: recipes={list(names)} have grids, and so has the run")
    first = preflight(_with_recipe(cfg, next(iter(configs)).partition("+")[0]))
    plain = replace(first.method, self_calibration=None, output_curvature=None)  # what it adds is checked below
    context = load(replace(first, method=plain))
    path = cache_dir() / "choices" / f"{context.run.sha256[:32]}-{budget:.0f}.json"
    if cfg.resume and (known := noted(path)).get("recipes") == list(names):
        return Choice(known["method"], known["seconds"])
    seconds: dict[str, float] = {}
    for name, config in configs.items():
        try:
            plan = preflight(config)
            seconds[name] = forecast_seconds(plan, _fitted(plan, context))
        except UserError as error:
            say(f"time_budget: not {name}: {error}")
            continue
        if seconds[name] <= budget:
            break
    if not seconds:
        raise UserError(f"time_budget={cfg.time_budget}: none of recipes={list(names)} can be used here")
    choice = Choice(list(seconds)[-1], seconds)
    try:
        note(path, {"recipes": list(names), "method": choice.method, "seconds": choice.seconds})
    except OSError as error:
        log.debug("choice not kept: %s", error)
    return choice


def _fitted(plan: Plan, context: RunContext) -> RunContext:
    """The context with the grids of a recipe's own, once all is checked that `load` checks of a method and a grid.

    Raises:
        UserError: the recipe can't be used with this model, this text, or these export formats.
    """
    loaded, solver = context.loaded, plan.method.solver
    check_method(plan, loaded, context.tokens)
    if not isinstance(plan.grid, BudgetedGrid) or solver is None:
        return context
    sizes_and_budget(loaded.model, plan.method, plan.grid)
    grids = assign_grids(loaded.model, plan.grid, plan.method.head)
    natural = getattr(solver, "natural_groups", True)
    plan.exports.check(linear_specs(loaded.model, grids, natural), loaded.model, loaded.tokenizer)
    return replace(context, grids=grids)


def forecast_seconds(plan: Plan, context: RunContext) -> float:
    """Seconds that a plan's quantizing is expected to take, with what is written and gathered for it.

    Raises:
        UserError: the dry run fails, as the run would.
    """
    plan, own = replace(plan, resume=False), plan.method.self_calibration
    context = replace(context, grids=context.grids if plan.method.solver is not None else {})
    with dry_run_of(plan, context) as dry_run:
        written = Counts(plan, context, dry_run).written()
    if own is not None and context.tokens is not None:
        rows = len(context.tokens.ids) + own.windows
        ids = context.tokens.ids.repeat(-(-rows // len(context.tokens.ids)), 1)[:rows]
        context = replace(context, tokens=replace(context.tokens, ids=ids))
    written += allocation_seconds(plan, context)
    with dry_run_of(plan, context) as dry_run:
        return written + sum(Counts(plan, context, dry_run).quantized().values())


def _with_recipe(cfg: DictConfig, recipe: str) -> DictConfig:
    """A config with the recipe's presets as its method and its grid, and without a time budget."""
    name, _, grid = recipe.partition("+")
    try:
        composed = composed_method(name, *([f"grid={grid}"] if grid else []), of_command=True)
    except MissingConfigException as error:
        raise UserError(f"recipes: there is no method={name}" + (f" or no grid={grid}" if grid else "")) from error
    found = cfg.copy()
    with open_dict(found):
        found.method, found.time_budget, found.recipes = composed.method, None, None
        if grid:
            found.grid = composed.grid
    return found
