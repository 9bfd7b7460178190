"""Reports of results: one run as a terminal table; many runs as Markdown, LaTeX, CSV and one HTML page.

    python -m gptq_awq.report ROOT [ROOT …] [--out FOLDER] [--metric NAME] [--model NAME] [--over seed]

Every metric is shown under its full name, which carries its protocol; runs scored by different protocols (window
length, token ids) are refused, not put side by side. Marks say which differences are significant (`verdicts`).
"""

from typing import TYPE_CHECKING

from gptq_awq.report.command import main, make_report
from gptq_awq.report.rows import (
    Row,
    check_protocols,
    distinguishable,
    is_full_precision,
    measured,
    records,
    total_seconds,
)
from gptq_awq.report.single_run import final_table

if TYPE_CHECKING:
    import pandas as pd

REPORTS_ONLY = True
__all__ = [
    "Row",
    "check_protocols",
    "comparison",
    "distinguishable",
    "final_table",
    "is_full_precision",
    "main",
    "make_report",
    "measured",
    "records",
    "total_seconds",
]


def comparison(df: "pd.DataFrame") -> str:
    """Compare the runs in `df` (rows of `results.load`) in one Markdown table per model.

    Runs that did not finish are named in a warning above the tables. Raises UserError where runs of one model
    were scored by different protocols.
    """
    return make_report(records(df)).markdown()
