"""Tables of results: one run for the terminal, many runs as Markdown.

    python -m gptq_awq.report ROOT

prints a table of all runs below ROOT. Every metric is shown under its full name, which carries its protocol;
runs whose numbers come from different protocols (window length, token ids) are refused, not put side by side.
A difference from full precision whose 95% interval contains 0 is marked "not distinguishable".
"""

import argparse
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gptq_awq.errors import UserError
from gptq_awq.results import KEYS, Result, load

if TYPE_CHECKING:
    import pandas as pd

NOT_DISTINGUISHABLE = "not distinguishable"
Row = Mapping[str, Any]
SHOWN = ("method", "grid", "bits", "group_size", "sym", "model", "out")


# One run


def final_table(result: Result) -> Table:
    """What a run ends with: size, every metric beside its full-precision value, time and memory."""
    # Text, escape: names and errors may hold [brackets], which rich would take for its markup.
    table = Table(title=Text(_title(result)), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("full precision", justify="right")
    table.add_column(result.method, justify="right")
    table.add_column("difference")
    table.add_row("bits per weight", "", _number(result.bits_per_weight), "with scales and zeros")
    reduction = _reduction(result.size_bytes, result.baseline_size_bytes)
    table.add_row(
        "size",
        _bytes(result.baseline_size_bytes),
        _bytes(result.size_bytes),
        reduction and f"{reduction} smaller",
    )
    for name in measured(result.metrics):
        value, baseline = _number(result.metrics[name]), _number(result.metrics.get(f"{name}/baseline"))
        table.add_row(escape(name), baseline, value, _difference(result.metrics, name, separator="\n"))
    phases = ", ".join(f"{phase} {value:.1f}" for phase, value in result.seconds.items() if phase != "total")
    table.add_row("time", "", _seconds(total_seconds(result.seconds)), phases)
    table.add_row("peak memory", "", _bytes(result.peak_memory_bytes))
    if result.status != "done":
        table.caption = Text(f"{result.status}: {result.error or 'no reason given'}")
    return table


def measured(metrics: Mapping[str, Any]) -> list[str]:
    """The names of what was measured, without what belongs to it (NAME/baseline, NAME/delta, …)."""
    return [name for name in metrics if name.rpartition("/")[0] not in metrics]


def total_seconds(seconds: Mapping[str, float]) -> float:
    """The whole run's wall time: `total` where it was recorded, else the sum of the phases."""
    return seconds["total"] if "total" in seconds else sum(seconds.values())


def distinguishable(metrics: Mapping[str, Any], name: str) -> bool:
    """Whether `name` differs from full precision: False where the interval contains 0 or is not known."""
    low, high = metrics.get(f"{name}/delta_ci95") or (-math.inf, math.inf)
    return low > 0 or high < 0


def _title(result: Result) -> str:
    parts = [f"{result.model}: {result.method}"]
    if result.grid not in (None, "int"):
        parts.append(result.grid)
    if result.bits is not None:
        parts.append(f"{result.bits:g} bits")
    if result.group_size is not None:
        parts.append(_group(result.group_size))
    if result.sym is not None:
        parts.append("symmetric" if result.sym else "asymmetric")
    return ", ".join(parts)


def _difference(metrics: Mapping[str, Any], name: str, separator: str = " ") -> str:
    """`+2.92 [+2.71, +3.12]`, and whether that can be told from 0."""
    delta, interval = metrics.get(f"{name}/delta"), metrics.get(f"{name}/delta_ci95")
    if delta is None:
        return ""
    if not interval:
        return _number(delta, sign="+")
    low, high = interval
    if low == high == 0:  # full precision against itself
        return "0"
    # As many decimals as the interval has meaning: two digits of its width.
    width = high - low
    digits = f".{max(0, 1 - math.floor(math.log10(width)))}f" if 0 < width < math.inf else ""
    delta, low, high = (_number(value, "+", digits) for value in (delta, low, high))
    text = f"{delta} [{low}, {high}]"
    return text if distinguishable(metrics, name) else f"{text}{separator}{NOT_DISTINGUISHABLE}"


# Many runs


def comparison(df: "pd.DataFrame") -> str:
    """A Markdown table per model of the runs in `df` (rows of `results.load`).

    Runs that did not finish are named in a warning above the tables. Raises UserError where runs of one model
    were scored by different protocols.
    """
    rows = records(df)
    done = [row for row in rows if row["status"] == "done"]
    parts = [_unfinished([row for row in rows if row["status"] != "done"])]
    for model in dict.fromkeys(row["model"] for row in done):
        runs = [row for row in done if row["model"] == model]
        check_protocols(runs)
        parts += [f"### {model}", _markdown(_cells(runs)), _baselines(runs)]
    return "\n\n".join(part for part in parts if part)


def records(df: "pd.DataFrame") -> list[Row]:
    """The rows of `results.load` as dicts of their keys and `path`, None (not NaN) for what is missing."""
    plain = df[[*KEYS, "path"]].astype(object)
    return [dict(zip(plain.columns, row, strict=True)) for row in plain.where(plain.notna(), None).to_numpy()]


def check_protocols(runs: Iterable[Row]) -> None:
    """Raise UserError where runs scored one text or task differently: another perplexity, or other tokens."""
    ways: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        by_text: dict[str, list[str]] = defaultdict(list)
        for name in measured(run["metrics"]):
            text, _, metric = name.rpartition("/")
            by_text[text] += [name] if "ppl" in metric else []
        for text, perplexities in by_text.items():
            tokens = run["manifest"].get("tokens", {}).get("eval", {}).get(text, "unknown")
            ways[text][" and ".join(sorted(perplexities)) or text, tokens].append(run["path"])
    for text, found in ways.items():
        if len(found) > 1:
            seen = "; ".join(
                f"{what} on tokens {tokens[:12]} in {len(paths)} run(s) such as {paths[0]}"
                for (what, tokens), paths in found.items()
            )
            raise UserError(f"{text} was scored by different protocols, report them apart: {seen}")


def _cells(runs: list[Row]) -> "pd.DataFrame":
    """The table's cells as text, the most bits first: what was run, what was measured, what it cost."""
    import pandas as pd

    runs = sorted(runs, key=lambda run: (-(run["bits_per_weight"] or math.inf), run["method"], run["path"]))
    names = list(dict.fromkeys(name for run in runs for name in measured(run["metrics"])))
    varied = _varied([run["config"] for run in runs])
    cells = pd.DataFrame([_row_cells(run, names, varied) for run in runs])
    return cells.loc[:, (cells != "").any()]


def _row_cells(run: Row, names: Iterable[str], varied: Iterable[str]) -> dict[str, str]:
    cells = {
        "method": run["method"],
        "grid": "" if run["grid"] in (None, "int") else run["grid"],
        "bits": _number(run["bits"], digits="g"),
        "group": "" if run["group_size"] is None else _group(run["group_size"]).removeprefix("group "),
        "sym": "" if run["sym"] is None else str(run["sym"]).lower(),
    }
    cells |= {key: str(run["config"].get(key, "")) for key in varied}
    cells |= {
        "bits/weight": _number(run["bits_per_weight"]),
        "size": _bytes(run["size_bytes"]),
        "reduction": _reduction(run["size_bytes"], run["baseline_size_bytes"]),
    }
    for name in names:
        cells |= {
            name: _number(run["metrics"].get(name)),
            f"Δ {name} [95%]": _difference(run["metrics"], name),
        }
    return cells | {
        "quantize": _seconds(run["seconds"].get("quantize")),
        "total": _seconds(total_seconds(run["seconds"])),
        "peak memory": _bytes(run["peak_memory_bytes"]),
    }


def _varied(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Top-level settings (seed, dtype, …) without which two rows of the table would look the same."""
    keys = {key for config in configs for key, value in config.items() if isinstance(value, (str, int, float))}
    return sorted(key for key in keys.difference(SHOWN) if len({str(config.get(key)) for config in configs}) > 1)


def _baselines(runs: Iterable[Row]) -> str:
    """One line of the full-precision values that the differences are measured from."""
    found: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for name in measured(run["metrics"]):
            if f"{name}/baseline" in run["metrics"]:
                found[name].add(_number(run["metrics"][f"{name}/baseline"]))
    values = ", ".join(f"{name} {' or '.join(sorted(numbers))}" for name, numbers in found.items())
    return f"Full precision: {values}." if found else ""


def _unfinished(runs: Sequence[Row]) -> str:
    listed = ", ".join(f"{run['path']} ({run['status']}: {run['error'] or 'no reason given'})" for run in runs)
    return f"**Warning:** {len(runs)} unfinished run(s) left out: {listed}" if runs else ""


def _markdown(cells: "pd.DataFrame") -> str:
    lines = [list(cells.columns), [":---"] + ["---:"] * (len(cells.columns) - 1), *cells.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


# Numbers as text


def _number(value: float | None, sign: str = "", digits: str = "") -> str:
    """Four significant digits, three for a signed difference: 22.15, 0.0312, +2.92, inf; nothing for None."""
    if value is None:
        return ""
    digits = digits or ("#.3g" if sign else "#.4g")
    return f"{value:{sign}{digits}}".rstrip(".")


def _bytes(count: float | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def _reduction(size: float | None, baseline: float | None) -> str:
    return f"{1 - size / baseline:.1%}" if size is not None and baseline else ""


def _group(size: float) -> str:
    return "per channel" if size == -1 else f"group {size:g}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 with one line on stderr for a mistake the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m gptq_awq.report", description="A Markdown table of runs.")
    parser.add_argument("root", help="a folder with runs (results.json) anywhere below it")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        df = load(parser.parse_args(argv).root)
        if df.empty:
            raise UserError("no results.json below ROOT: did a run finish there?")
        sys.stdout.write(comparison(df) + "\n")
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
