"""`--dry-run`: the runs that a command stands for, which of them are finished, and how long the others will take.

    gptq-awq -m method=rtn,awq,gptq bits=2,3,4,8 --dry-run

Nothing is quantized. Finished runs are known by the files they read. Of the others, one per method, number format and
model is loaded and forecast (`forecast.py`), and stands for those of other widths.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gptq_awq.errors import UserError
from gptq_awq.experiment import lookup
from gptq_awq.experiment.context import load
from gptq_awq.experiment.forecasting.forecast import forecast
from gptq_awq.experiment.plan import Plan, preflight
from gptq_awq.experiment.registry import Run
from gptq_awq.experiment.sweeps.progress import duration, label_of

ROWS = ".dry_run.jsonl"


@dataclass(frozen=True)
class ListedRun:
    """A run that a command stands for.

    Attributes:
        label: what tells it apart.
        state: finished and where, interrupted after which block, to be computed, or what is wrong with it.
        kind: what runs of one forecast have in common.
        seconds: forecast of all but the full-precision scores; None where it is finished or can't be told.
        baseline: forecast of the full-precision scores, which runs of one model share.
        bytes: forecast of its peak memory.
    """

    label: str
    state: str
    kind: str = ""
    seconds: float | None = None
    baseline: float = 0.0
    bytes: float = 0.0


@contextmanager
def listing(arguments: list[str]) -> Iterator[list[str]]:
    """Within: `task` lists its runs instead of computing them. At the end they are printed.

    Yields:
        The arguments to compose with: folders that are asked for are left alone, launchers launch nothing.
    """
    of_folders = ("--dry-run", "hydra.sweep.dir=", "hydra.run.dir=", "out=", "hydra/launcher=", "hydra.launcher.")
    kept = [argument for argument in arguments if not argument.startswith(of_folders)]
    with tempfile.TemporaryDirectory(prefix="gptq-awq-dry-run-") as folder:
        yield [*kept, "dry_run=true", f"hydra.sweep.dir={folder}", f"hydra.run.dir={folder}/one"]
        print_runs(_noted(Path(folder)))


def list_run(cfg: Any, folder: Path) -> None:
    """Look at one run, and note it in `folder`, where those before it are noted.

    Raises:
        UserError: an option of the run is wrong.
    """
    known = {run.kind: run for run in _noted(folder) if run.seconds is not None}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        cfg.out = scratch
        plan = preflight(cfg)
        row = _listed(plan, known)
    note(row, folder)


def note(row: ListedRun, folder: Path) -> None:
    """Note a run in the file of the listing."""
    with (folder / ROWS).open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def _noted(folder: Path) -> list[ListedRun]:
    paths = [path for path in (folder / ROWS, folder / "one" / ROWS) if path.exists()]
    return [ListedRun(**json.loads(line)) for path in paths for line in path.read_text().splitlines()]


def _listed(plan: Plan, known: Mapping[str, ListedRun]) -> ListedRun:
    grid = None if plan.method.solver is None else plan.grid
    kind = json.dumps([str(plan.model), plan.method.name, grid and grid.label, str(plan.exports.formats)])
    bits, shown = (None, None) if grid is None else (grid.bits, grid.label)
    label = label_of(plan.method.name, shown, bits, None, _given())
    run = lookup.known(lookup.key_of(plan), plan.out)
    state = None if run is None else _state(run)
    if state is not None and state.startswith("finished"):
        return ListedRun(label, state, kind)
    if kind in known:
        same = known[kind]
        return ListedRun(label, state or "to compute", kind, same.seconds, same.baseline, same.bytes)
    context = load(plan)
    state = _state(context.run) or "to compute"
    if state.startswith("finished"):
        return ListedRun(label, state, kind)
    try:
        phases = forecast(plan, context)
    except Exception as error:  # of one block alone; what is wrong with the run, the run will say
        return ListedRun(label, f"{state}; no forecast: {' '.join(str(error).split())}", kind)
    baseline = sum(phase.seconds for phase in phases if phase.name == "baseline")
    rest = sum(phase.seconds for phase in phases if phase.name != "baseline")
    return ListedRun(label, state, kind, rest, baseline, max(phase.bytes for phase in phases))


def _given() -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    own = ("model", "data", "eval", "export", "tracking", "dry_run")
    keys = [override.lstrip("+").partition("=")[0] for override in given]
    return [key for key in keys if key.partition(".")[0].partition("@")[0] not in own]


def _state(run: Run) -> str | None:
    """Say that a run is finished, or that it was interrupted; None for one that never began."""
    folder = run.finished()
    if folder is not None:
        return f"finished: {folder}"
    blocks = run.journal.count()
    return f"interrupted after {blocks} blocks" if blocks else None


def print_runs(runs: Sequence[ListedRun]) -> None:
    """Print the runs that a command stands for, and the time that those to compute will take one after the other."""
    table = Table(box=box.SIMPLE_HEAD)
    for column, justify in (("", "right"), ("run", "left"), ("time", "right"), ("memory", "right"), ("state", "left")):
        table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    for number, run in enumerate(runs, start=1):
        memory = f"{run.bytes / 1e9:.1f} GB" if run.bytes else ""
        table.add_row(str(number), run.label, duration(run.seconds or 0.0), memory, run.state)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    baselines = {json.loads(run.kind)[0]: run.baseline for run in runs if run.kind and run.seconds is not None}
    left = [run for run in runs if not run.state.startswith(("finished", "error"))]
    seconds = sum(run.seconds or 0.0 for run in runs) + sum(baselines.values())
    finished = sum(run.state.startswith("finished") for run in runs)
    told = f", about {duration(seconds)} one after the other" if seconds else ""
    sys.stdout.write(f"{len(runs)} runs: {finished} finished, {len(left)} to compute{told}\n")


def check_listable(sweeper: str) -> None:
    """Refuse a search, whose runs depend on the results of those before. Raises UserError."""
    if sweeper != "basic":
        raise UserError(f"--dry-run: hydra/sweeper={sweeper} chooses its runs by the results of others")
