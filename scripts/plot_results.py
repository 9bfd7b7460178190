"""Draw accuracy loss over bits per weight, one labelled line per method, from a folder of runs.

    python scripts/plot_results.py ROOT --out docs/img/results.svg [--metric wikitext2/kl] [--model NAME] [--peers FILE]

A metric with a difference from full precision (perplexity) is drawn as that difference with its 95% interval; a hollow
marker is a difference that is not distinguishable from 0. Any other metric (KL) is drawn as it is. FILE holds points of
other programs on the same tokens and settings: a JSON list of {"name", "bits_per_weight", "METRIC"}. SVG files are
drawn for white and for dark paper.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_awq.errors import UserError
from gptq_awq.report import Row, check_protocols, distinguishable, is_full_precision, measured, records
from gptq_awq.report.looks import INK, LINE, MUTED, dark_style, look_of
from gptq_awq.results import load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Metadata per file ending, without the date: the same runs give the same bytes.
FORMATS = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}


@dataclass(frozen=True)
class Point:
    """One run in the plot; `low` and `high` bound the 95% interval, and `hollow` says that it contains 0."""

    bits_per_weight: float
    value: float
    low: float
    high: float
    hollow: bool


def points(runs: Iterable[Row], metric: str) -> dict[str, list[Point]]:
    """Points of the quantized runs that have `metric`, by line of the plot, sorted by bits per weight."""
    by_method: dict[str, list[Point]] = {}
    for run in sorted(runs, key=lambda run: (run["method"], run["bits_per_weight"])):
        metrics = run["metrics"]
        if metric not in metrics or is_full_precision(run):
            continue
        value = metrics.get(f"{metric}/delta", metrics[metric])
        low, high = metrics.get(f"{metric}/delta_ci95") or (value, value)
        hollow = f"{metric}/delta_ci95" in metrics and not distinguishable(metrics, metric)
        by_method.setdefault(_line(run), []).append(Point(run["bits_per_weight"], value, low, high, hollow))
    return by_method


def _line(run: Row) -> str:
    """Label of a run's line: method, grid if not plain integers, formats of rounded activations and cache."""
    grid = [run["grid"]] if run["grid"] not in (None, "int") else []
    return ", ".join([run["method"], *grid, *(f"{key} {run[key]}" for key in ("act", "kv") if run[key])])


def choose(rows: Iterable[Row], model: str | None, metric: str | None) -> tuple[list[Row], str]:
    """Select the finished runs of one model, and the metric to draw. Raises UserError where several fit, or none."""
    done = [row for row in rows if row["status"] == "done" and model in (None, row["model"])]
    models = sorted({row["model"] for row in done})
    if len(models) != 1:
        raise UserError(f"--model: choose one of {', '.join(models)}" if models else "no finished run to draw")
    names = sorted({name for row in done for name in measured(row["metrics"])})
    candidates = [name for name in names if name == metric or (metric is None and _is_perplexity(name))]
    if len(candidates) != 1:
        raise UserError(f"--metric: choose one of {', '.join(names)}")
    check_protocols(done)
    return done, candidates[0]


def draw(
    lines: dict[str, list[Point]], metric: str, model: str, peers: Sequence[tuple[str, float, float]] = ()
) -> "Figure":
    """Plot one line per method over bits per weight, logarithmic in the metric; `peers` are (name, bits, value).

    Raises UserError without matplotlib, or where no value is positive.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install gptq_awq[plots]") from error

    shown = [point.value for line in lines.values() for point in line if 0 < point.value < math.inf]
    if not shown:
        raise UserError(f"--metric: no run has a positive {metric} to draw")
    floor = min(shown) / 2
    inks: Any = {
        key: INK[0] for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    }
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, **inks}):
        figure = Figure(figsize=(7.6, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for name, line in lines.items():
            look = look_of(name)
            dashes = "--" if "," in name else "-"
            _draw_line(axes, line, floor, color=look.colour, marker=look.marker, linestyle=dashes)
        _draw_peers(axes, peers)
        _dress(axes, floor)
        _label_lines(axes, lines, floor)
    axes.set_ylabel(f"Δ {metric} from full precision, log" if _is_perplexity(metric) else f"{metric}, log")
    axes.set_title(model, loc="left", fontsize=11)
    if any(point.hollow for line in lines.values() for point in line):
        label = "not distinguishable from full precision"
        axes.plot([], [], "o", color=MUTED[0], markerfacecolor="#ffffff", markersize=5, label=label)
        axes.legend(frameon=False, loc="upper right", fontsize=8)
    return figure


def _draw_peers(axes: Any, peers: Sequence[tuple[str, float, float]]) -> None:
    """Draw points of other programs; those that nearly cover each other share a label."""
    left = sorted(peers, key=lambda peer: (peer[1], peer[2]))
    while left:
        _, bits, value = left[0]
        near = [peer for peer in left if peer[1] == bits and peer[2] <= value * 1.3]
        left = [peer for peer in left if peer not in near]
        for _, at, height in near:
            axes.plot(at, height, "*", color=MUTED[0], markersize=9, markerfacecolor="#ffffff", zorder=4)
        names = " · ".join(name for name, _, _ in near)
        axes.annotate(names, (bits, near[-1][2]), (9, -1), textcoords="offset points", fontsize=8, color=MUTED[0])


def _label_lines(axes: Any, lines: dict[str, list[Point]], floor: float) -> None:
    """Write each line's name beside its end at the fewest bits, where lines are furthest apart, in the lines' order."""
    ends = []
    for name, line in lines.items():
        finite = [point for point in line if point.value < math.inf]
        if finite:
            ends.append((max(finite[0].value, floor), finite[0].bits_per_weight, name))
    ends.sort(reverse=True)
    low, high = (math.log(limit) for limit in axes.get_ylim())
    step, above = (high - low) / 19, math.inf
    left = min((bits for _, bits, _ in ends), default=2.0)
    right = axes.get_xlim()[1]
    axes.set_xlim(left - 1.75, right)
    axes.set_xticks([bits for bits in range(1, 17) if left - 0.5 <= bits <= right])
    for value, bits, name in ends:
        if bits > left + 2:  # too far for a line to its label
            offset = {"xytext": (-6, 8), "textcoords": "offset points", "ha": "right"}
            axes.annotate(look_of(name).label, (bits, value), fontsize=9, color=look_of(name).colour, **offset)
            continue
        above = min(math.log(value), above - step)
        look, at = look_of(name), (left - 0.25, math.exp(above))
        axes.annotate(look.label, at, ha="right", va="center", fontsize=9, color=look.colour)
        axes.plot([at[0] + 0.04, bits - 0.05], [at[1], value], color=look.colour, linewidth=0.5, alpha=0.6)


def _draw_line(axes: Any, line: list[Point], floor: float, **style: Any) -> None:
    """Draw the line of one method; values of zero or less, which a log axis lacks, lie at `floor` and are labelled."""
    line = [point for point in line if point.value < math.inf]
    x = [point.bits_per_weight for point in line]
    y = [max(point.value, floor) for point in line]
    axes.plot(x, y, linewidth=1.5, markersize=5, **style)
    below = [height - min(max(point.low, floor / 10), height) for height, point in zip(y, line, strict=True)]
    above = [max(point.high - height, 0) for height, point in zip(y, line, strict=True)]
    axes.errorbar(x, y, [below, above], fmt="none", ecolor=style["color"], capsize=3, elinewidth=1, zorder=1)
    for at, height, point in zip(x, y, line, strict=True):
        if point.hollow:
            axes.plot(at, height, **style, markersize=5, markerfacecolor="#ffffff", zorder=3)
        if point.value <= 0:
            axes.annotate("≤ 0", (at, floor), (6, -3), textcoords="offset points", fontsize=8)


def _dress(axes: Any, floor: float) -> None:
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(bottom=floor / 1.6)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color=LINE[0], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.minorticks_off()
    axes.set_xlabel("bits per weight (scales and zeros included)")


def read_peers(path: Path, metric: str) -> list[tuple[str, float, float]]:
    """Points of other programs. Raises UserError for a file that holds something else."""
    try:
        rows = json.loads(path.read_text())
        return [(row["name"], float(row["bits_per_weight"]), float(row[metric])) for row in rows if metric in row]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--peers {path}: cannot be read ({' '.join(str(error).split())})") from error


def save(figure: "Figure", path: Path) -> None:
    """Write a figure to a file; the same figure gives the same bytes."""
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "gptq_awq"}):
        figure.savefig(path, dpi=200, metadata=FORMATS[path.suffix], transparent=True)
    if path.suffix == ".svg":
        head, tag, rest = path.read_text().partition("<defs>")
        path.write_text(f"{head}{dark_style()}{tag}{rest}")


def _is_perplexity(name: str) -> bool:
    return "ppl" in name.rpartition("/")[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 with one line on stderr for a mistake the user can fix."""
    parser = argparse.ArgumentParser(description="Accuracy loss over bits per weight, one line per method.")
    parser.add_argument("root", help="a folder with runs (results.json) anywhere below it")
    parser.add_argument("--out", required=True, type=Path, help="the picture: .svg, .png or .pdf")
    parser.add_argument("--metric", help="which metric to draw; by default the one perplexity there is")
    parser.add_argument(
        "--peers", type=Path, help="points of other programs: a JSON list of name, bits_per_weight, METRIC"
    )
    parser.add_argument("--model", help="which model to draw, where there are several")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        if arguments.out.suffix not in FORMATS:
            raise UserError(f"--out: the file's ending must be one of {' '.join(FORMATS)}")
        runs, metric = choose(records(load(arguments.root)), arguments.model, arguments.metric)
        peers = [] if arguments.peers is None else read_peers(arguments.peers, metric)
        figure = draw(points(runs, metric), metric, runs[0]["model"], peers)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    save(figure, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
