"""Experiment trackers: where a run is followed while it goes, besides its own files.

A tracking failure never kills a run: whatever a tracker raises stops here, and is logged once as a warning. Nor does
it hang one: every wait has its limit (`LIMITS`).

One computation is one wandb run. Its id comes from the run's content hash, so a run that was killed and is started
again goes on in the same wandb run, and offline folders of the several attempts become one run when they are synced.
The same computation done again on purpose (`resume=false`) does not open a second one either: it writes over the
tables and the summary with, if all is well, the same numbers, and draws its points upon those that are there. A run
belongs to the group of the sweep that asked for it last.

wandb writes and sends with a delay, so the last seconds before a kill are lost there (an offline folder of a run
killed early may even be empty, which `wandb sync` refuses: leave it out). Tables are whole all the same: they are
made of the ledger's rows, restored ones included.
"""

import json
import logging
import math
import os
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from gptq_awq.report.table import make_table
from gptq_awq.results import Result, flat_row
from gptq_awq.runtime.options import checked_dataclass

log = logging.getLogger(__name__)


ID_LENGTH = 16
# Seconds to wait for a server that doesn't answer: when the run starts, when a key must be asked for, when it ends.
LIMITS = {"init_timeout": 30.0, "login_timeout": 60.0, "finish_timeout": 60.0}
WORST = 20  # linears in the bar plot
# Options that a run's name shows in its own way, and groups of options that don't change what is computed.
NAMED = ("model", "model.path", "model.name", "model.id", "method", "grid", "bits", "group_size", "sym")
UNNAMED = ("out", "device", "tracking", "export", "eval", "hydra", "resume")


@runtime_checkable
class Tracker(Protocol):
    """One run followed by a tracker. No method raises."""

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record metrics; `step` is the number of the block they are of."""
        ...

    def ledger(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add ledger rows; call as often as blocks finish."""
        ...

    def finish(self, result: Result) -> None:
        """Record the final results row and close the run."""
        ...


@runtime_checkable
class Tracking(Protocol):
    """The options of a tracker, which start one per run."""

    def start(
        self, config: Mapping[str, Any], name: str, group: str | None = None, run_id: str | None = None
    ) -> Tracker:
        """Open a run under `name`, in `group` (a sweep), with its resolved config. Does not raise.

        `run_id` is the run's content hash: whoever opens a run of that id again goes on where it was.
        """
        ...


@dataclass(frozen=True)
class NoTracking:
    """Follow nothing: both the options and the tracker."""

    def start(
        self,
        config: Mapping[str, Any],  # noqa: ARG002
        name: str,  # noqa: ARG002
        group: str | None = None,  # noqa: ARG002
        run_id: str | None = None,  # noqa: ARG002
    ) -> Tracker:
        """Itself: there is nothing to open."""
        return self

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Nothing."""

    def ledger(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Nothing."""

    def finish(self, result: Result) -> None:
        """Nothing."""


@checked_dataclass
class WandbTracking:
    """Weights & Biases. None leaves an option to wandb and its environment variables.

    `group` wins over the one that `start` is given. Offline runs are written to DIR/wandb/offline-run-*, for
    `wandb sync` to upload later. Raises UserError for a mode that there isn't.
    """

    project: str = "gptq_awq"
    entity: str | None = None
    group: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None
    tags: tuple[str, ...] = ()
    dir: str | None = None

    def start(
        self, config: Mapping[str, Any], name: str, group: str | None = None, run_id: str | None = None
    ) -> Tracker:
        """Open a wandb run; where that fails, the run goes on untracked."""
        try:
            return _Guarded(_WandbTracker(self, config, name, group, run_id))
        except Exception as error:
            log.warning(
                "not tracked: wandb did not start (%s); without a network, use tracking.mode=offline", _one_line(error)
            )
            return NoTracking()


@dataclass
class _Guarded:
    """Passes every call on; what the tracker raises is logged, the first time, and dropped."""

    tracker: Tracker
    warned: bool = field(default=False, init=False)

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._attempt(self.tracker.log, metrics, step)

    def ledger(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._attempt(self.tracker.ledger, rows)

    def finish(self, result: Result) -> None:
        self._attempt(self.tracker.finish, result)

    def _attempt(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            if not self.warned:
                log.warning("tracking failed, the run goes on (%s)", _one_line(error))
            self.warned = True


class _WandbTracker:
    """One live wandb run. May raise: `_Guarded` stands between it and the program."""

    def __init__(
        self, options: WandbTracking, config: Mapping[str, Any], name: str, group: str | None, run_id: str | None
    ) -> None:
        import wandb  # a second to import, for those who ask for it

        self._wandb = wandb
        self._rows: dict[Any, Mapping[str, Any]] = {}
        known = wandb.Settings.model_fields  # older versions have fewer limits to set
        # A captured terminal is a log full of progress bars.
        settings: dict[str, Any] = {"console": "off"} | {k: v for k, v in LIMITS.items() if k in known}
        arguments: dict[str, Any] = {
            "project": options.project,
            "entity": options.entity,
            "group": options.group or group,
            "mode": options.mode,
            "tags": list(options.tags),
            "dir": options.dir,
            "name": name,
            "config": dict(config),
            # By default a second run in one process (a sweep) would write into one that never finished.
            "reinit": "create_new",
            "settings": wandb.Settings(**settings),
        }
        # An agent of `wandb sweep` has opened the run already, and says which one in its environment.
        asked = run_id if "WANDB_SWEEP_ID" not in os.environ else None
        same: dict[str, Any] = {"id": asked[:ID_LENGTH], "resume": "allow"} if asked else {}
        try:
            self._run = wandb.init(**arguments, **same)
        except wandb.Error as error:
            if not same or "deleted" not in str(error):
                raise
            # wandb never gives out the id of a deleted run again.
            self._run = wandb.init(**arguments, id=f"{same['id']}-{secrets.token_hex(4)}")
        self._run.define_metric("quantize/*", step_metric="block")

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Drawn over `block`. wandb's own step only counts up: a point whose step was taken would be dropped."""
        self._run.log(_plottable(metrics) | ({} if step is None else {"block": step}))

    def ledger(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Kept by name: rows that come twice, restored and computed, are one."""
        for row in rows:
            self._rows[row.get("name", len(self._rows))] = row

    def finish(self, result: Result) -> None:
        """Tables cannot grow once logged, so the ledger goes out here, whole."""
        rows = list(self._rows.values())
        try:
            self._run.summary.update(_plottable(result.metrics) | costs(result))
            self._run.log({"results": self._as_table([flat_row(asdict(result))])})
            if result.status == "done":
                self._run.log({"report": self._as_table([report_row(result)])})
            if rows:
                self._run.log({"ledger": self._as_table(rows)})
                self._run.log(self._layer_plots(rows))
        finally:
            self._run.finish(exit_code=0 if result.status == "done" else 1)

    def _layer_plots(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Where the error is: over the blocks, a line per kind of site; and the linears that have most of it."""
        what, errors = linear_errors(rows)
        profile: list[Any] = [[block, site, value] for (block, site), value in error_profile(rows).items()]
        worst = sorted(errors.items(), key=lambda item: -item[1])[:WORST]
        lines = self._wandb.Table(columns=["block", "site", what], data=profile)
        bars = self._wandb.Table(columns=["linear", what], data=[list(item) for item in worst])
        plot = self._wandb.plot
        return {
            "layers/error_by_block": plot.line(lines, "block", what, stroke="site", title=f"{what} by block"),
            "layers/worst_linears": plot.bar(bars, "linear", what, title=f"{what}: the worst linears"),
        }

    def _as_table(self, rows: list[Mapping[str, Any]]) -> Any:
        columns: list[Any] = list(dict.fromkeys(key for row in rows for key in row))
        data: list[Any] = [[_cell(row.get(column)) for column in columns] for row in rows]
        return self._wandb.Table(columns=columns, data=data, allow_mixed_types=True)


def costs(result: Result) -> dict[str, float]:
    """Numbers of a run beside its metrics, so that size and time can be plotted against quality."""
    whole = {
        "bits_per_weight": result.bits_per_weight,
        "size_mb": None if result.size_bytes is None else result.size_bytes / 1e6,
        "peak_memory_gb": None if result.peak_memory_bytes is None else result.peak_memory_bytes / 1e9,
    }
    found = {name: value for name, value in whole.items() if value is not None}
    return found | {f"seconds/{phase}": value for phase, value in result.seconds.items()}


def report_row(result: Result) -> dict[str, str]:
    """The run as a row of the report's table, in the words that the report has."""
    made = make_table(result.model, [asdict(result) | {"path": ""}], {})
    cells = {name: cell.text for (name, _), cell in zip(made.columns, made.cells[0], strict=True)}
    return {"model": result.model} | cells


def run_name(
    model: str,
    method: str,
    grid: str | None = None,
    bits: float | None = None,
    group_size: int | None = None,
    sym: bool | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Name of a run, its settings in one line: `smollm2-135m gptq 3bit g64 sym data=c4 seed=1`.

    Args:
        model: its name.
        method: its name.
        grid: the number format; "int" and None go without saying.
        bits: of the codes; None where nothing is rounded to a grid.
        group_size: columns that share a scale; -1 for a channel.
        sym: symmetric grid.
        overrides: what the user typed (`data=c4`, `method.solver.damping=0.1`): of these, what tells apart two runs
            of a sweep that are otherwise named alike. Where a run is written, tracked and scored does not.
    """
    words = [model, method]
    if grid not in (None, "int"):
        words.append(grid)
    elif bits is not None:
        words.append(f"{bits:g}bit")
    if group_size is not None and grid in (None, "int"):
        words.append("per channel" if group_size == -1 else f"g{group_size}")
    words += ["sym"] if sym and grid in (None, "int") else []
    return " ".join(words + [text for text in map(_told, overrides) if text])


def _told(override: str) -> str:
    """The override in short (the last part of its key, and of a path), or nothing where a name has no use for it."""
    key, _, value = override.lstrip("+").partition("=")
    whole, first = key, key.partition(".")[0]
    if whole in NAMED or first in UNNAMED or override.startswith("~"):
        return ""
    return f"{key.rpartition('.')[2]}={value.rstrip('/').rpartition('/')[2]}"


def linear_errors(rows: Iterable[Mapping[str, Any]]) -> tuple[str, dict[str, float]]:
    """The error of each linear by its name, and what it is an error of: the output, or without calibration the weight.

    Values that are not finite numbers, which no plot has a place for, are left out.
    """
    rows = list(rows)
    calibrated = any("error_after" in row for row in rows)
    key, what = ("error_after", "relative output error") if calibrated else ("weight_error", "relative weight error")
    errors = {str(row.get("name")): row.get(key) for row in rows}
    return what, {name: float(e) for name, e in errors.items() if isinstance(e, (int, float)) and math.isfinite(e)}


def error_profile(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[int, str], float]:
    """(block, site) → the mean error of its linears (see `linear_errors`), the blocks in order."""
    rows = list(rows)
    _, errors = linear_errors(rows)
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in rows:
        if row.get("name") in errors:
            found[row.get("block", -1), str(row.get("site"))].append(errors[row["name"]])
    return {place: sum(values) / len(values) for place, values in sorted(found.items())}


def _plottable(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Flat numbers: an interval [low, high] becomes NAME/low and NAME/high, since wandb draws no lists."""
    flat = {}
    for name, value in metrics.items():
        if isinstance(value, (list, tuple)) and len(value) == 2:
            flat |= {f"{name}/low": value[0], f"{name}/high": value[1]}
        else:
            flat[name] = value
    return flat


def _cell(value: Any) -> Any:
    """A table cell: scalars as they are, anything else (shapes, maps) as JSON."""
    return value if value is None or isinstance(value, (str, int, float)) else json.dumps(value, default=str)


def _one_line(error: Exception) -> str:
    """The error's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
