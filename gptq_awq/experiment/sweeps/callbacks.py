"""Hydra's callbacks: what happens before a sweep starts, and when its last run has ended.

Hydra makes them before every run, so their imports, which take seconds, wait until they are called.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from gptq_awq.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 40
"""Rows that still fit a screen."""
PLAIN_WIDTH = 120
"""Characters a line where the output is no terminal."""
REPORT = "report.md"


class SweepBegin(Callback):
    """Makes the sweep's folder before the sweep starts, and counts its runs; Optuna's study lies in that folder."""

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        """Called by Hydra."""
        from gptq_awq.experiment.sweeps.progress import Sweep

        if int(os.environ.get("RANK", 0)) == 0:
            Sweep.begin(config)


class SweepEnd(Callback):
    """Hydra calls it once, when every run of a sweep has ended.

    Args:
        anchors: figures that the runs should come to, as configs/experiment/reproduce has them.

    Raises:
        UserError: anchors that make no sense.
    """

    def __init__(self, anchors: Mapping[str, Any] | None = None) -> None:
        self.anchors: Any = None
        if anchors is not None:
            from gptq_awq.report.anchors import Anchors

            self.anchors = Anchors.of(_plain(anchors))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the table; exit with code 2 where a run failed, 1 where a figure isn't met."""
        from gptq_awq.numerics.distributed import rank_and_size
        from gptq_awq.results import FAILURE, count, load, without_copies

        root = Path(config.hydra.sweep.dir)
        if config.dry_run or rank_and_size()[0] > 0 or not root.is_dir():  # rank 0 has the table
            return
        every = load(root, copies=True)
        unreadable = count(root) - len(every)
        table = without_copies(every)
        failures = list(table["status"] != "done").count(True) + unreadable + sum(1 for _ in root.rglob(FAILURE))
        _print_table(table, root)
        as_expected = self.anchors is None or _checked(table, self.anchors)
        _tell_end(root, len(table), failures)
        if failures:
            sys.exit(2)
        if not as_expected:
            sys.exit(1)


def _print_table(table: "pd.DataFrame", root: Path) -> None:
    """Print the finished runs as far as they fit the terminal, and write all of the table to ROOT/report.md."""
    from rich.console import Console

    from gptq_awq.report import make_report, records
    from gptq_awq.report.terminal import terminal_table

    if "done" not in set(table["status"]):
        return
    try:
        report = make_report(records(table))
        (root / REPORT).write_text(report.markdown() + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        sys.stderr.write(f"no table: {error}\n")
        return
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if sum(len(each.runs) for each in report.tables) <= SHOWN:
        for each in report.tables:
            console.print(terminal_table(each, console.width))


def _tell_end(root: Path, runs: int, failures: int) -> None:
    """Tell what was taken over, what failed and where its log is, and where the report is."""
    from gptq_awq.experiment.sweeps.progress import Sweep

    ended = Sweep.read(root).ended()
    if taken := sum(run.state == "taken over" for run in ended):
        sys.stderr.write(f"{taken} of {len(ended)} runs were finished before and are taken over\n")
    for run in ended:
        if run.state == "failed":
            sys.stderr.write(f"failed: {run.label}: {run.told.removeprefix('error: ')}")
            sys.stderr.write(f" (log: {run.log})\n" if run.log else "\n")
    sys.stderr.write(
        f"{runs} runs in {root}; the table is in {root / REPORT}, a page: gptq-awq report {root} --out {root}\n"
    )
    if failures:
        sys.stderr.write(f"{failures} of them failed; the same command runs them again\n")


def _checked(table: "pd.DataFrame", anchors: Any) -> bool:
    """Print the runs' figures beside the expected ones; whether they are met."""
    from gptq_awq.report import records
    from gptq_awq.report.anchors import check, markdown, met

    try:
        checked = check(records(table), anchors)
    except UserError as error:
        sys.stderr.write(f"not compared: {error}\n")
        return False
    sys.stdout.write(f"{markdown(checked, anchors)}\n\n")
    return met(checked)


def _plain(node: Mapping[str, Any]) -> dict[str, Any]:
    """A map of Hydra's as one of Python's."""
    return OmegaConf.to_container(OmegaConf.create(dict(node)), resolve=True)  # pyright: ignore[reportReturnType]
