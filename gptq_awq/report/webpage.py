"""The report as one self-contained HTML page: tables to sort and filter, plots, provenance.

The page is `page/page.html` with its styles and scripts inserted, and the data as JSON, which the scripts draw.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson

from gptq_awq.report.distributions import kl_quantiles
from gptq_awq.report.looks import PALETTE, look_of
from gptq_awq.report.profile import profiles
from gptq_awq.report.provenance import provenance
from gptq_awq.report.rows import Row, is_full_precision, measured
from gptq_awq.report.samples import RunSamples, by_prompt, parting_in_words
from gptq_awq.report.table import Cell, Table, full_row, labels
from gptq_awq.report.verdicts import Verdict, Verdicts, higher_is_better, read_scores

SCRIPTS = (
    *("base.js", "downloads.js", "tables.js", "frontier.js", "layers.js", "costs.js"),
    *("distributions.js", "samples.js", "main.js"),
)
BEST, TIES, SAME = 1, 2, 4


def page(
    tables: Sequence[Table],
    verdicts: Verdicts,
    warnings: Sequence[str] = (),
    samples: Sequence[RunSamples] = (),
    folder: Path | None = None,
) -> str:
    """Render the report as HTML; the same runs give the same bytes in the same `folder`, from where runs are linked."""
    source = files("gptq_awq.report") / "page"
    parts = {
        "TITLE": _escaped(f"Quantization report: {', '.join(table.model for table in tables) or 'no finished run'}"),
        "STYLE": _palette() + (source / "page.css").read_text("utf-8"),
        "SCRIPT": "\n".join((source / name).read_text("utf-8") for name in SCRIPTS),
        "DATA": _json(_data(tables, verdicts, warnings, folder) | {"samples": _samples(samples)}),
    }
    html = (source / "page.html").read_text("utf-8")
    # In one pass, so that nothing is replaced inside of what was inserted: a model may be called @DATA@.
    return re.sub("|".join(f"@{name}@" for name in parts), lambda found: parts[found[0].strip("@")], html)


def _palette() -> str:
    """Methods' colours as variables of the style sheet, on white and on dark paper."""
    light, dark = (";".join(f"--c{i}: {pair[paper]}" for i, pair in enumerate(PALETTE)) for paper in (0, 1))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def _data(tables: Sequence[Table], verdicts: Verdicts, warnings: Sequence[str], folder: Path | None) -> dict[str, Any]:
    runs = [run for table in tables for run in table.runs]
    higher: dict[str, bool] = {}
    for run in runs:
        for name in measured(run["metrics"]):
            higher.setdefault(name, higher_is_better(name, run))
    names = list(higher)
    layers = profiles(runs)
    named = [label for table in tables for label in labels(table)]
    first, shown = 0, []
    for table in tables:
        cells = [[_cell(cell) for cell in row] for row in table.cells]
        shown.append(
            {
                "model": table.model,
                "columns": table.columns,
                "rows": cells,
                "first": first,
                "notes": table.notes,
                "full": full_row(table),
            }
        )
        first += len(table.runs)
    boxes = kl_quantiles(runs, read_scores)
    return {
        "looks": {
            method: [look.label, look.hue, look.mark]
            for method in dict.fromkeys(run["method"] for run in runs)
            for look in [look_of(method)]
        },
        "warnings": list(warnings),
        "tables": shown,
        "metrics": [{"name": name, "higher": higher[name]} for name in names],
        "runs": [
            _run(run, label, layer, verdicts, names) | {"kl": box, "href": _href(run, folder)}
            for run, label, layer, box in zip(runs, named, layers, boxes, strict=True)
        ],
        "provenance": provenance(runs),
    }


def _samples(runs: Sequence[RunSamples]) -> list[dict[str, Any]]:
    """Texts by prompt: full precision's, and [label, text, [at, length of the first other piece] or None, words]."""
    return [
        {
            "prompt": texts.prompt,
            "full": texts.full,
            "runs": [
                [label, sample.own, part and [part.at, len(part.own)], parting_in_words(sample)]
                for label, sample in texts.runs
                for part in [sample.parting]
            ],
        }
        for texts in by_prompt(runs)
    ]


def _cell(cell: Cell) -> list[Any]:
    flags = BEST * cell.best + TIES * cell.ties + SAME * cell.same
    value = cell.value if cell.value != cell.text else None
    return (
        [cell.text, _plain(value), flags] if flags else [cell.text, _plain(value)] if value is not None else [cell.text]
    )


def _run(run: Row, label: str, layers: Any, verdicts: Verdicts, names: Iterable[str]) -> dict[str, Any]:
    metrics = run["metrics"]
    return {
        "path": run["path"],
        "model": run["model"],
        "method": run["method"],
        "bits": run["bits"],
        "label": label,
        "full": is_full_precision(run),
        "rounded": [run.get("act"), run.get("kv")],
        "bpw": run["bits_per_weight"],
        "mb": None if run["size_bytes"] is None else run["size_bytes"] / 1e6,
        "metrics": [_point(metrics, name, verdicts.get((run["path"], name), Verdict())) for name in names],
        "seconds": {phase: round(value, 2) for phase, value in run["seconds"].items() if phase != "total"},
        "memory": None if run["peak_memory_bytes"] is None else run["peak_memory_bytes"] / 1e6,
        "layers": layers,
    }


def _href(run: Row, folder: Path | None) -> str | None:
    """Address of a run's folder as seen from the page's; None where that isn't known, or the row is a mean of runs."""
    if folder is None or "count" in run:
        return None
    return quote(Path(os.path.relpath(run["path"], folder)).as_posix()) + "/"


def _point(metrics: Mapping[str, Any], name: str, verdict: Verdict) -> list[Any] | None:
    """A metric as [value, difference, low, high, same]; the interval is that of the difference if there is one."""
    if name not in metrics:
        return None
    delta = metrics.get(f"{name}/delta")
    low, high = metrics.get(f"{name}/delta_ci95" if delta is not None else f"{name}/ci95") or (None, None)
    return [*(_plain(number) for number in (metrics[name], delta, low, high)), int(verdict.same)]


def _plain(value: Any) -> Any:
    """Round floats to six digits, which suffice for plots; non-finite ones become strings, as JSON has none."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def _json(data: Any) -> str:
    """Encode data as JSON without "<", which could end the script element that holds it."""
    return orjson.dumps(data).decode().replace("<", "\\u003c")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
