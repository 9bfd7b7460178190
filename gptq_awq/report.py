"""Tables of results: one run for the terminal, many runs as Markdown.

    python -m gptq_awq.report ROOT

prints a table of all runs below ROOT. Every metric is shown under its full name, which carries its protocol; runs
whose numbers come from different protocols (window length, token ids) are refused, not put side by side. A difference
from full precision whose 95% interval contains 0 is marked "not distinguishable".
"""

import argparse
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table

from gptq_awq.errors import UserError
from gptq_awq.results import Result, load

NOT_DISTINGUISHABLE = "not distinguishable"
SHOWN = ("method", "bits", "group_size", "sym", "model", "out")


# One run


def final_table(result: Result) -> Table:
    """What a run ends with: size, every metric beside its full-precision value, time and memory."""
    table = Table(title=_title(result), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("full precision", justify="right")
    table.add_column(result.method, justify="right")
    table.add_column("difference")
    table.add_row("bits per weight (scales, zeros included)", "", _number(result.bits_per_weight))
    reduction = _reduction(result.size_bytes, result.baseline_size_bytes)
    table.add_row("size", _bytes(result.baseline_size_bytes), _bytes(result.size_bytes), reduction)
    for name in measured(result.metrics):
        value, baseline = _number(result.metrics[name]), _number(result.metrics.get(f"{name}/baseline"))
        table.add_row(name, baseline, value, _difference(result.metrics, name))
    phases = ", ".join(f"{phase} {value:.1f}" for phase, value in result.seconds.items() if phase != "total")
    table.add_row("seconds", "", f"{total_seconds(result.seconds):.1f}", phases)
    table.add_row("peak memory", "", _bytes(result.peak_memory_bytes))
    if result.status != "done":
        table.caption = f"{result.status}: {result.error or 'no reason given'}"
    return table


def measured(metrics: Mapping[str, Any]) -> list[str]:
    """The names of what was measured, without what belongs to it (NAME/baseline, NAME/delta, …)."""
    return [name for name in metrics if name.rpartition("/")[0] not in metrics]


def total_seconds(seconds: Mapping[str, float]) -> float:
    """The whole run's wall time: `total` where it was recorded, else the sum of the phases."""
    return seconds["total"] if "total" in seconds else sum(seconds.values())


def distinguishable(metrics: Mapping[str, Any], name: str) -> bool:
    """Whether metric `name` differs from full precision: False where its interval contains 0 or is not known."""
    low, high = metrics.get(f"{name}/delta_ci95") or (-math.inf, math.inf)
    return not low <= 0 <= high


def _title(result: Result) -> str:
    parts = [f"{result.model}: {result.method}"]
    if result.bits is not None:
        parts.append(f"{result.bits:g} bits")
    if result.group_size is not None:
        parts.append(_group(result.group_size))
    if result.sym is not None:
        parts.append("symmetric" if result.sym else "asymmetric")
    return ", ".join(parts)


def _difference(metrics: Mapping[str, Any], name: str) -> str:
    """`+2.92 [+2.71, +3.12]`, and whether that can be told from 0."""
    delta, interval = metrics.get(f"{name}/delta"), metrics.get(f"{name}/delta_ci95")
    if delta is None:
        return ""
    if not interval:
        return _number(delta, sign="+")
    low, high = interval
    if low == high == 0:  # full precision against itself
        return "0"
    text = f"{_number(delta, sign='+')} [{_number(low, sign='+')}, {_number(high, sign='+')}]"
    return text if distinguishable(metrics, name) else f"{text} {NOT_DISTINGUISHABLE}"


# Many runs


def comparison(df: pd.DataFrame) -> str:
    """A Markdown table per model of the runs in `df` (rows of `results.load`).

    Runs that did not finish are named in a warning above the tables. Raises UserError where runs of one model were
    scored by different protocols.
    """
    done = df[df["status"] == "done"]
    parts = [_unfinished(df[df["status"] != "done"])]
    for model, runs in done.groupby("model"):
        check_protocols(runs)
        parts += [f"### {model}", _markdown(_cells(runs)), _baselines(runs)]
    return "\n\n".join(part for part in parts if part)


def check_protocols(df: pd.DataFrame) -> None:
    """Raise UserError where one text or task was scored in different ways: other perplexities, or other tokens."""
    ways: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in _rows(df):
        names = measured(row["metrics"])
        for text in dict.fromkeys(name.rpartition("/")[0] for name in names):
            perplexities = [name for name in names if name.rpartition("/")[0] == text and "ppl" in name]
            tokens = row["manifest"].get("tokens", {}).get("eval", {}).get(text, "unknown")
            ways[text][" and ".join(perplexities), tokens].append(row["path"])
    for text, runs in ways.items():
        if len(runs) > 1:
            seen = "; ".join(
                f"{perplexities or text} on tokens {tokens[:12]} in {len(paths)} run(s) such as {paths[0]}"
                for (perplexities, tokens), paths in runs.items()
            )
            raise UserError(f"{text} was scored by different protocols, report them apart: {seen}")


def _cells(runs: pd.DataFrame) -> pd.DataFrame:
    """The table's cells as text: what was run, what it cost, what was measured."""
    rows = sorted(
        _rows(runs), key=lambda row: (-(row["bits_per_weight"] or math.inf), row["method"], row["path"])
    )
    names = list(dict.fromkeys(name for row in rows for name in measured(row["metrics"])))
    varied = _varied([row["config"] for row in rows])
    return pd.DataFrame([_row_cells(row, names, varied) for row in rows]).fillna("")


def _row_cells(row: Mapping[str, Any], names: Iterable[str], varied: Iterable[str]) -> dict[str, str]:
    metrics = row["metrics"]
    cells = {
        "method": row["method"],
        "bits": _number(row["bits"], digits="g"),
        "group": "" if row["group_size"] is None else _group(row["group_size"]),
        "sym": "" if row["sym"] is None else str(row["sym"]).lower(),
    }
    cells |= {key: str(row["config"].get(key, "")) for key in varied}
    cells |= {
        "bits/weight": _number(row["bits_per_weight"]),
        "size": _bytes(row["size_bytes"]),
        "reduction": _reduction(row["size_bytes"], row["baseline_size_bytes"]),
    }
    for name in names:
        cells[name] = _number(metrics.get(name))
        if f"{name}/delta" in metrics:
            cells[f"Δ {name} [95%]"] = _difference(metrics, name)
    if "quantize" in row["seconds"]:
        cells["quantize s"] = f"{row['seconds']['quantize']:.1f}"
    cells["total s"] = f"{total_seconds(row['seconds']):.1f}"
    cells["peak memory"] = _bytes(row["peak_memory_bytes"])
    return cells


def _varied(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Top-level settings (seed, dtype, …) without which two rows of the table would look the same."""
    plain = {
        key for config in configs for key, value in config.items() if isinstance(value, (str, int, float))
    }
    return sorted(
        key for key in plain.difference(SHOWN) if len({str(config.get(key)) for config in configs}) > 1
    )


def _baselines(runs: pd.DataFrame) -> str:
    """One line of the full-precision values that the differences are measured from."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in _rows(runs):
        for name in measured(row["metrics"]):
            if f"{name}/baseline" in row["metrics"]:
                found[name].add(_number(row["metrics"][f"{name}/baseline"]))
    values = ", ".join(f"{name} {' or '.join(sorted(numbers))}" for name, numbers in found.items())
    return f"Full precision: {values}." if found else ""


def _unfinished(runs: pd.DataFrame) -> str:
    if runs.empty:
        return ""
    listed = ", ".join(f"{row['path']} ({row['status']}: {row['error'] or '?'})" for row in _rows(runs))
    return f"**Warning:** {len(runs)} unfinished run(s) left out: {listed}"


def _markdown(cells: pd.DataFrame) -> str:
    lines = [list(cells.columns), [":---"] + ["---:"] * (len(cells.columns) - 1), *cells.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _rows(df: pd.DataFrame) -> list[dict[str, Any]]:
    """The results rows as written: without the flattened columns, and None (not NaN) for what is missing."""
    keys = [key for key in df.columns if "/" not in key]
    plain = df[keys].astype(object)
    return plain.where(plain.notna(), None).to_dict("records")  # pyright: ignore[reportReturnType]


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


def _reduction(size: float | None, baseline: float | None) -> str:
    return f"{1 - size / baseline:.1%}" if size is not None and baseline else ""


def _group(size: float) -> str:
    return "per channel" if size == -1 else f"group {size:g}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 with one line on stderr for a mistake the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m gptq_awq.report", description="A Markdown table of runs."
    )
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
