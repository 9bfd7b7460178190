"""Experiment trackers: where a run is followed while it goes, besides its own files.

A tracking failure never kills a run: whatever a tracker raises stops here, and is logged once as a warning.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

from gptq_awq.errors import UserError
from gptq_awq.results import Result, flat_row

log = logging.getLogger(__name__)

MODES = (None, "online", "offline", "disabled")


@runtime_checkable
class Tracker(Protocol):
    """One run, as a tracker follows it. No method raises."""

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record metrics; `step` counts up within the run."""
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

    def start(self, config: Mapping[str, Any], name: str, group: str | None = None) -> Tracker:
        """Open a run under `name`, in `group` (a sweep), with its resolved config. Does not raise."""
        ...


@dataclass(frozen=True)
class NoTracking:
    """Follow nothing: both the options and the tracker."""

    def start(self, config: Mapping[str, Any], name: str, group: str | None = None) -> Tracker:  # noqa: ARG002
        """Itself: there is nothing to open."""
        return self

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Nothing."""

    def ledger(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Nothing."""

    def finish(self, result: Result) -> None:
        """Nothing."""


@dataclass(frozen=True)
class WandbTracking:
    """Weights & Biases. None leaves an option to wandb and its environment variables.

    `group` wins over the one that `start` is given. Offline runs are written to DIR/wandb/offline-run-*, for
    `wandb sync` to upload later. Raises UserError for a mode that there isn't.
    """

    project: str = "gptq_awq"
    entity: str | None = None
    group: str | None = None
    mode: str | None = None
    tags: tuple[str, ...] = ()
    dir: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"tracking.mode={self.mode}: choose online, offline or disabled")

    def start(self, config: Mapping[str, Any], name: str, group: str | None = None) -> Tracker:
        """Open a wandb run; where that fails, the run goes on untracked."""
        try:
            return _Guarded(_WandbTracker(self, config, name, group))
        except Exception as error:
            log.warning("not tracked: wandb did not start (%s: %s)", type(error).__name__, error)
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
                log.warning("tracking failed, the run goes on (%s: %s)", type(error).__name__, error)
            self.warned = True


class _WandbTracker:
    """One live wandb run. May raise: `_Guarded` stands between it and the program."""

    def __init__(self, options: WandbTracking, config: Mapping[str, Any], name: str, group: str | None) -> None:
        import wandb  # a second to import, for those who ask for it

        self._table = wandb.Table
        self._rows: list[Mapping[str, Any]] = []
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            group=options.group or group,
            mode=options.mode,  # pyright: ignore[reportArgumentType]
            tags=list(options.tags),
            dir=options.dir,
            name=name,
            config=dict(config),
            # By default a second run in one process (a sweep) would write into one that never finished.
            reinit="create_new",
            settings=wandb.Settings(console="off"),  # a captured terminal is a log full of progress bars
        )

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._run.log(_plottable(metrics), step=step)

    def ledger(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows.extend(rows)

    def finish(self, result: Result) -> None:
        """Tables cannot grow once logged, so the ledger goes out here, whole."""
        try:
            self._run.summary.update(_plottable(result.metrics))
            self._run.log({"results": self._as_table([flat_row(asdict(result))])})
            if self._rows:
                self._run.log({"ledger": self._as_table(self._rows)})
        finally:
            self._run.finish(exit_code=0 if result.status == "done" else 1)

    def _as_table(self, rows: list[Mapping[str, Any]]) -> Any:
        columns: list[Any] = list(dict.fromkeys(key for row in rows for key in row))
        data: list[Any] = [[_cell(row.get(column)) for column in columns] for row in rows]
        return self._table(columns=columns, data=data, allow_mixed_types=True)


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
