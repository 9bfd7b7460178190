"""Messages of a run to its user while it goes, and at its end: a whole table alone, one line as part of a sweep."""

import logging
from dataclasses import dataclass

from rich.console import Console

from gptq_awq.experiment.plan import Plan
from gptq_awq.experiment.sweeps.progress import tell_done
from gptq_awq.experiment.sweeps.sweep import job_number, sweep_folder
from gptq_awq.report import final_table
from gptq_awq.results import Result
from gptq_awq.runtime.profiling import REPORT

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teller:
    """Tells the user, and the log, what a run does; in a sweep only what it waits for, as a run has one line there."""

    console: Console
    briefly: bool = False

    def say(self, line: str) -> None:
        """Tell what must be known."""
        log.info("%s", line)
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def note(self, line: str) -> None:
        """Tell what is good to know of a run that is alone."""
        if self.briefly:
            log.info("%s", line)
        else:
            self.say(line)


def tell_end(plan: Plan, result: Result, console: Console, taken: bool, seconds: float, tables: bool) -> None:
    """Print a run's results.

    Args:
        plan: of the run.
        result: its row.
        console: of stderr.
        taken: whether it was taken over from an earlier run.
        seconds: that all of it took.
        tables: whether a run of a sweep has its whole table, too.
    """
    folder = sweep_folder()
    if plan.profile:
        from rich.markdown import Markdown  # with all that highlights code

        Console().print(Markdown((plan.out / REPORT).read_text()))
    if folder is not None:
        tell_done(result, folder, job_number(), taken, seconds)
    if folder is None or tables:
        Console().print(final_table(result))
        console.print(f"results: {plan.out / 'results.json'}", highlight=False, soft_wrap=True)
