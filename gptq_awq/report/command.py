"""The report of many runs, and the command `python -m gptq_awq.report`."""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptq_awq.errors import UserError
from gptq_awq.evaluation.samples.difference import Sample
from gptq_awq.report import render
from gptq_awq.report.anchors import Anchors, check, markdown, met
from gptq_awq.report.rows import (
    Folders,
    Row,
    by_model,
    check_protocols,
    find_folders,
    measured,
    records,
    warnings,
)
from gptq_awq.report.samples import RunSamples, labelled, stored_samples
from gptq_awq.report.settings import averaged, flat, is_setting
from gptq_awq.report.table import Table, make_table
from gptq_awq.report.verdicts import Verdicts, read_scores, verdicts
from gptq_awq.report.webpage import page
from gptq_awq.results import load
from gptq_awq.runtime.commands import exit_code

FORMATS = {"md": "report.md", "latex": "report.tex", "csv": "report.csv", "html": "report.html"}
NO_FOLDERS = Folders()


@dataclass(frozen=True)
class Report:
    """The report of many runs: one table per model, the test results in them, and warnings about runs left out."""

    tables: Sequence[Table]
    verdicts: Verdicts
    warnings: Sequence[str]
    samples: Sequence[RunSamples] = ()

    def markdown(self) -> str:
        """Render warnings and tables as Markdown, without a final line break."""
        return render.markdown(self.tables, self.warnings)

    def text(self, kind: str, folder: Path | None = None) -> str:
        """Render the report as the content of a file in `folder`; `kind` is a key of `FORMATS`."""
        if kind == "html":
            return page(self.tables, self.verdicts, self.warnings, self.samples, folder)
        if kind == "csv":
            return render.tidy(self.tables, self.verdicts)
        return render.latex(self.tables, self.warnings) if kind == "latex" else self.markdown() + "\n"


def make_report(
    rows: Sequence[Row],
    folders: Folders = NO_FOLDERS,
    metrics: Sequence[str] = (),
    over: str | None = None,
    samples: Mapping[str, Sequence[Sample]] | None = None,
) -> Report:
    """Test and tabulate runs, one table per model.

    Args:
        rows: results rows (`records`); only finished runs enter the tables.
        folders: folders of runs without a results row, for the warnings.
        metrics: metrics to show; empty: all.
        over: setting to average over (`averaged`); None: each run is a row of its own.
        samples: text samples by the run's path; None: those that runs stored.

    Raises:
        UserError: runs of one model were scored by different protocols; no run has the metric or setting asked for.
    """
    done = [row for row in rows if row["status"] == "done"]
    _check_asked(done, metrics, over)
    tables: list[Table] = []
    found: dict = {}
    for model, runs in by_model(done).items():
        check_protocols(runs)
        if over is not None:
            runs = averaged(runs, over)
        else:
            found |= verdicts(runs, read_scores)
        tables.append(make_table(model, runs, found, metrics))
    known = stored_samples(done) if samples is None else samples
    return Report(tables, found, warnings(rows, folders), labelled(tables, known))


def _check_asked(runs: Sequence[Row], metrics: Sequence[str], over: str | None) -> None:
    known = {name for run in runs for name in measured(run["metrics"])}
    for name in metrics:
        if name not in known:
            raise UserError(f"--metric {name}: no run has it; choose one of {', '.join(sorted(known))}")
    if over is not None and not any(is_setting(key, over) for run in runs for key in flat(run["config"])):
        raise UserError(f"--over {over}: no run has such a setting; seed is one")


def parser() -> argparse.ArgumentParser:
    """Parser of the options of `python -m gptq_awq.report`."""
    options = argparse.ArgumentParser(
        prog="python -m gptq_awq.report", description="Tables of runs: Markdown on the terminal, files with --out."
    )
    options.add_argument("roots", nargs="+", metavar="ROOT", help="folders with runs (results.json) anywhere below")
    options.add_argument("--out", type=Path, metavar="FOLDER", help="write report.md, .tex, .csv and .html there")
    options.add_argument(
        "--format", default=",".join(FORMATS), metavar="LIST", help="files to write: md,latex,csv,html (default: all)"
    )
    options.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="show this metric only (may be repeated)"
    )
    options.add_argument("--model", action="append", default=[], metavar="NAME", help="show this model only")
    options.add_argument(
        "--against", metavar="NAME", help="compare with the figures of an experiment, such as reproduce/opt-125m"
    )
    options.add_argument("--over", metavar="SETTING", help="average runs that differ in this setting only: seed")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 where --against is not met, 2 with one line on stderr for a user's mistake."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    options = parser().parse_args(argv)
    return exit_code(lambda: _main(options))


def _main(options: argparse.Namespace) -> int:
    kinds = [kind for kind in options.format.split(",") if kind]
    if wrong := [kind for kind in kinds if kind not in FORMATS]:
        raise UserError(f"--format {wrong[0]}: choose among {', '.join(FORMATS)}")
    expected = Anchors.read(options.against) if options.against else None
    df = load(*options.roots)
    if df.empty:
        raise UserError("no results.json below ROOT: did a run finish there?")
    rows = records(df)
    if options.model:
        known = dict.fromkeys(row["model"] for row in rows)
        if wrong := [model for model in options.model if model not in known]:
            raise UserError(f"--model {wrong[0]}: no run has it; choose one of {', '.join(known)}")
        rows = [row for row in rows if row["model"] in options.model]
    report = make_report(rows, find_folders(options.roots), options.metric, options.over)
    sys.stdout.write(report.markdown() + "\n")
    if options.out is not None:
        _write(report, options.out, kinds)
    return 0 if expected is None else _compare(rows, expected)


def _compare(rows: Sequence[Row], expected: Anchors) -> int:
    checked = check(rows, expected)
    sys.stdout.write(f"\n{markdown(checked, expected)}\n")
    return 0 if met(checked) else 1


def _write(report: Report, folder: Path, kinds: Sequence[str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind in kinds:
            (folder / FORMATS[kind]).write_text(report.text(kind, folder), encoding="utf-8")
            sys.stderr.write(f"{folder / FORMATS[kind]}\n")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from error
