"""Size against KL divergence, predicted and measured, of runs with allocated and with uniform bits per weight.

    python run.py experiment=frontier
    python -m gptq_awq.frontier ROOT [ROOT …] [--out frontier.png]

The predicted KL is the sum of sensitivities that the allocation minimised (gptq_awq/allocation), where these estimate
the KL (`fisher`, `kl`). The measured KL is the run's own, from full precision.
"""

import argparse
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptq_awq.errors import UserError
from gptq_awq.report import Row, check_protocols, measured, records
from gptq_awq.report.looks import MARKS, PALETTE
from gptq_awq.report.text import number, size
from gptq_awq.results import load
from gptq_awq.runtime.commands import exit_code

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREDICTS_KL = ("fisher", "kl")
# Metadata per file ending, without the date: the same runs give the same bytes.
FORMATS = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}
COLOURS = {"allocated": PALETTE[0][0], "uniform": PALETTE[1][0]}
MARKERS = {"allocated": MARKS[0], "uniform": MARKS[1]}


@dataclass(frozen=True)
class Point:
    """The size and KL of one run.

    Attributes:
        kind: "allocated" or "uniform" bits per weight.
        bits_per_weight: stored bits per quantized weight, scales and zeros included.
        size_bytes: size of the whole model in bytes.
        predicted: predicted KL in nats per token; None where nothing predicts it.
        kl: measured KL in nats per token.
        low, high: bounds of the 95% interval of the measured KL.
    """

    kind: str
    bits_per_weight: float
    size_bytes: int
    predicted: float | None
    kl: float
    low: float
    high: float


def points(runs: Iterable[Row], metric: str) -> list[Point]:
    """Points of the runs with allocated or uniform bits that have `metric`, sorted by bits per weight."""
    found = [point for run in runs if (point := _point(run, metric)) is not None]
    return sorted(found, key=lambda point: (point.bits_per_weight, point.kind))


def _point(run: Row, metric: str) -> Point | None:
    allocation = run["manifest"].get("allocation")
    integers = run["grid"] in (None, "int") and run["sym"] is not None  # `sym` is None where nothing is rounded
    if metric not in run["metrics"] or not (allocation or integers):
        return None
    kind, predicted = "uniform", None
    if allocation:
        kind = "uniform" if run["config"]["grid"].get("tie") == "model" else "allocated"
        predicted = allocation["predicted"] if allocation["sensitivity"] in PREDICTS_KL else None
    kl = run["metrics"][metric]
    low, high = run["metrics"].get(f"{metric}/ci95") or (kl, kl)
    return Point(kind, run["bits_per_weight"], run["size_bytes"], predicted, kl, low, high)


def uniform_at(bits_per_weight: float, line: Sequence[Point]) -> float | None:
    """KL that uniform bits would have at a size, log KL interpolated linearly in bits; None outside of their range."""
    uniform = [p for p in line if p.kind == "uniform" and 0 < p.kl < math.inf]
    x = [p.bits_per_weight for p in uniform]
    if not x or not x[0] <= bits_per_weight <= x[-1]:
        return None
    return float(np.exp(np.interp(bits_per_weight, x, np.log([p.kl for p in uniform]))))


def table(line: Sequence[Point]) -> str:
    """The points as a Markdown table, a row per run."""
    names = ["bits", "bits/weight", "size", "predicted KL", "KL [95%]", "KL / predicted", "KL / uniform's"]
    lines = [names, [":---"] + ["---:"] * (len(names) - 1)]
    for point in line:
        uniform = uniform_at(point.bits_per_weight, line) if point.kind == "allocated" else None
        lines.append(
            [
                point.kind,
                number(point.bits_per_weight),
                size(point.size_bytes),
                number(point.predicted),
                f"{number(point.kl)} [{number(point.low)}, {number(point.high)}]",
                _ratio(point.kl, point.predicted),
                _ratio(point.kl, uniform),
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _ratio(value: float, other: float | None) -> str:
    return f"{value / other:.2f}" if other else ""


def draw(line: Sequence[Point], title: str, metric: str) -> "Figure":
    """Plot KL over bits per weight, measured solid and predicted dashed.

    Raises UserError without matplotlib, or where no run has a positive, finite KL.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--out: drawing needs matplotlib: pip install 'gptq_awq[plots]'") from error
    shown = [point for point in line if 0 < point.kl < math.inf]
    if not shown:
        raise UserError(f"--out: no run has a positive, finite {metric} to draw")
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for kind in COLOURS:
            _draw_kind(axes, [point for point in shown if point.kind == kind], kind)
    axes.set_yscale("log", nonpositive="clip")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.minorticks_off()
    axes.set_xlabel("bits per weight (scales and zeros included)")
    axes.set_ylabel(f"{metric}, nats per token")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False)
    return figure


def _draw_kind(axes: Any, line: Sequence[Point], kind: str) -> None:
    if not line:
        return
    style = {"color": COLOURS[kind], "marker": MARKERS[kind], "markersize": 5}
    x, y = [point.bits_per_weight for point in line], [point.kl for point in line]
    around = [[p.kl - min(p.low, p.kl) for p in line], [max(p.high - p.kl, 0) for p in line]]
    axes.errorbar(x, y, around, capsize=3, elinewidth=1, linewidth=1.5, label=f"{kind}, measured", **style)
    expected = [(point.bits_per_weight, point.predicted) for point in line if point.predicted]
    if expected:
        hollow = {"linestyle": "--", "linewidth": 1, "markerfacecolor": "white"}
        axes.plot(*zip(*expected, strict=True), label=f"{kind}, predicted", **hollow, **style)


def choose(rows: Iterable[Row], model: str | None, method: str | None, metric: str | None) -> tuple[list[Row], str]:
    """Select the finished runs of one model and method, and the KL metric to compare.

    Raises:
        UserError: no such runs; several models, methods or KL metrics to choose from; several protocols.
    """
    runs = [row for row in rows if row["status"] == "done" and row["method"] != "fp"]
    for key, value in (("model", model), ("method", method)):
        known = sorted({row[key] for row in runs})
        runs = [row for row in runs if value in (None, row[key])]
        if len({row[key] for row in runs}) != 1:
            raise UserError(f"--{key}: choose one of {', '.join(known)}" if known else "no finished run below ROOT")
    names = sorted({name for row in runs for name in measured(row["metrics"]) if name.endswith("/kl")})
    if len(names) == 1 and metric is None:
        metric = names[0]
    if metric not in names:
        raise UserError(f"--metric: choose one of {', '.join(names)}" if names else "no run has a KL")
    check_protocols(runs)
    return runs, metric


def save(figure: "Figure", path: Path) -> None:
    """Write a figure to a file; the same figure gives the same bytes. Raises UserError where it can't be written."""
    from matplotlib import rc_context

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with rc_context({"svg.hashsalt": "gptq_awq"}):
            figure.savefig(path, dpi=200, metadata=FORMATS[path.suffix])
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from error


def parser() -> argparse.ArgumentParser:
    """Parser of the options of `python -m gptq_awq.frontier`."""
    options = argparse.ArgumentParser(
        prog="python -m gptq_awq.frontier", description="Size against KL of allocated and uniform bits."
    )
    options.add_argument("roots", nargs="+", metavar="ROOT", help="folders with runs (results.json) anywhere below")
    options.add_argument("--out", type=Path, metavar="FILE", help=f"the picture: {' '.join(FORMATS)}")
    options.add_argument("--metric", metavar="NAME", help="which KL, where there are several texts")
    options.add_argument("--model", metavar="NAME", help="which model, where there are several")
    options.add_argument("--method", metavar="NAME", help="which method, where there are several")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 with one line on stderr for a mistake the user can fix."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    options = parser().parse_args(argv)
    return exit_code(lambda: _main(options))


def _main(options: argparse.Namespace) -> None:
    if options.out is not None and options.out.suffix not in FORMATS:
        raise UserError(f"--out {options.out}: the file's ending must be one of {' '.join(FORMATS)}")
    runs, metric = choose(records(load(*options.roots)), options.model, options.method, options.metric)
    line = points(runs, metric)
    if len(line) < len(runs):
        sys.stderr.write(f"{len(runs) - len(line)} runs of other number formats left out\n")
    title = f"{runs[0]['model']}, {runs[0]['method']}"
    sys.stdout.write(f"### {title}, {metric}\n\n{table(line)}\n")
    if options.out is not None:
        save(draw(line, title, metric), options.out)
