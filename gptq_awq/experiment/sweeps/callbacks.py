"""Hydra's callbacks: what happens before a sweep starts, and when its last run has ended.

Hydra makes them before every run, so their imports, which take seconds, wait until they are called.
"""

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


class SweepFolder(Callback):
    """Makes the sweep's folder before the sweep starts: Optuna's study lies in it, and Optuna makes no folders."""

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        """Called by Hydra."""
        Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)


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
        from gptq_awq.report import comparison
        from gptq_awq.results import FAILURE, count, load, without_copies

        root = Path(config.hydra.sweep.dir)
        if rank_and_size()[0] > 0:  # rank 0 has the table
            return
        if not root.is_dir():
            return
        every = load(root, copies=True)
        unreadable = count(root) - len(every)
        table = without_copies(every)
        failed = table[table["status"] != "done"]
        failures = len(failed) + unreadable + sum(1 for _ in root.rglob(FAILURE))
        if 0 < len(table) - len(failed) <= SHOWN:
            try:
                sys.stdout.write(f"\n{comparison(table)}\n\n")
            except UserError as error:
                sys.stderr.write(f"no table: {error}\n")
        as_expected = self.anchors is None or _checked(table, self.anchors)
        sys.stderr.write(f"{len(table)} runs in {root}: python -m gptq_awq.report {root}\n")
        if failures:
            sys.stderr.write(f"{failures} of them failed; the same command runs them again\n")
            sys.exit(2)
        if not as_expected:
            sys.exit(1)


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
