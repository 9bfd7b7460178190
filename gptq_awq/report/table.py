"""A table of runs as a value: columns, cells with numbers and marks, notes; `render` and `webpage` draw it."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from gptq_awq.report import text
from gptq_awq.report.rows import Row, is_full_precision, is_perplexity, measured, total_seconds
from gptq_awq.report.settings import varied
from gptq_awq.report.verdicts import Verdict, Verdicts

_TIES = "; ≈: not distinguishable from it"
Kind = Literal["setting", "size", "metric", "difference", "cost"]


@dataclass(frozen=True)
class Cell:
    """A table cell: text, value to sort by, and marks: `best` of its bits, `ties` with it, `same` as full precision."""

    text: str = ""
    value: float | str | None = None
    best: bool = False
    ties: bool = False
    same: bool = False


@dataclass(frozen=True)
class Table:
    """The table of one model's finished runs, sorted by falling bits per weight; row i of `cells` shows `runs[i]`."""

    model: str
    columns: Sequence[tuple[str, Kind]]
    cells: Sequence[Sequence[Cell]]
    runs: Sequence[Row]
    notes: Sequence[str]


def make_table(model: str, runs: Sequence[Row], verdicts: Verdicts, metrics: Sequence[str] = ()) -> Table:
    """Tabulate the runs of one model, with columns for `metrics` (all, if none are named) and without empty columns."""
    runs = sorted(runs, key=lambda run: (-(run["bits_per_weight"] or math.inf), run["method"], run["path"]))
    names = shown_metrics(runs, metrics)
    settings = varied(runs)
    columns: dict[tuple[str, Kind], list[Cell]] = defaultdict(list)
    for index, run in enumerate(runs):
        for column, cell in _row(run, names, {key: values[index] for key, values in settings.items()}, verdicts):
            columns[column].append(cell)
    shown = {column: cells for column, cells in columns.items() if any(cell.text for cell in cells)}
    return Table(model, list(shown), list(zip(*shown.values(), strict=True)), runs, _notes(runs, names, verdicts))


def shown_metrics(runs: Iterable[Row], chosen: Sequence[str] = ()) -> list[str]:
    """Metrics to show, in order of appearance; a loss difference (`dnll`) only where its text has no perplexity."""
    names = dict.fromkeys(name for run in runs for name in measured(run["metrics"]))
    if chosen:
        return [name for name in names if name in chosen]
    texts = {name.rpartition("/")[0] for name in names if is_perplexity(name)}
    return [name for name in names if not (name.endswith("/dnll") and name.removesuffix("/dnll") in texts)]


def _row(
    run: Row, names: Iterable[str], settings: dict[str, str], verdicts: Verdicts
) -> Iterable[tuple[tuple[str, Kind], Cell]]:
    group = "" if run["group_size"] is None else text.group(run["group_size"]).removeprefix("group ")
    yield ("method", "setting"), Cell(run["method"], run["method"])
    yield ("grid", "setting"), _word("" if run["grid"] in (None, "int") else run["grid"])
    yield ("bits", "setting"), Cell(text.number(run["bits"], digits="g"), run["bits"])
    yield ("group", "setting"), Cell(group, run["group_size"])
    yield ("sym", "setting"), _word("" if run["sym"] is None else str(run["sym"]).lower())
    yield ("act", "setting"), _word(run["act"] or "")
    yield ("kv", "setting"), _word(run["kv"] or "")
    for key, value in settings.items():
        yield (key, "setting"), _word(value)
    if "count" in run:
        yield ("runs", "setting"), Cell(str(run["count"]), run["count"])
    yield ("bits/weight", "size"), Cell(text.number(run["bits_per_weight"]), run["bits_per_weight"])
    yield ("size", "size"), Cell(text.size(run["size_bytes"]), run["size_bytes"])
    reduction = text.reduction(run["size_bytes"], run["baseline_size_bytes"])
    yield ("reduction", "size"), Cell(reduction, float(reduction[:-1]) if reduction else None)
    for name in names:
        yield from _metric(run, name, verdicts.get((run["path"], name), Verdict()))
    total = total_seconds(run["seconds"])
    yield ("quantize", "cost"), Cell(text.seconds(run["seconds"].get("quantize")), run["seconds"].get("quantize"))
    yield ("total", "cost"), Cell(text.seconds(total), total)
    yield ("peak memory", "cost"), Cell(text.size(run["peak_memory_bytes"]), run["peak_memory_bytes"])


def _metric(run: Row, name: str, verdict: Verdict) -> Iterable[tuple[tuple[str, Kind], Cell]]:
    metrics, deviations = run["metrics"], run.get("spread", {})
    value, delta = metrics.get(name), metrics.get(f"{name}/delta")
    number = text.spread(value, deviations.get(name))
    yield (name, "metric"), Cell(number, value, best=verdict.best, ties=verdict.ties)
    change = text.difference(metrics, name)
    if deviations.get(f"{name}/delta"):
        change = text.spread(delta, deviations[f"{name}/delta"], sign="+")
    label = f"Δ {name}" if "count" in run else f"Δ {name} [95%]"
    yield (label, "difference"), Cell(change, delta, same=verdict.same and change not in ("", "0"))


def _word(value: str) -> Cell:
    try:
        return Cell(value, float(value))
    except ValueError:
        return Cell(value, value)


def _notes(runs: Sequence[Row], names: Sequence[str], verdicts: Verdicts) -> list[str]:
    """Notes below a table: the full-precision scores, and the meaning of the marks that occur in it."""
    found = [verdicts.get((run["path"], name), Verdict()) for run in runs for name in names]
    notes = [_baselines(runs, names)]
    if any("count" in run for run in runs):
        notes.append("Mean ± standard deviation over the runs of a row; nothing is tested.")
        return [note for note in notes if note]
    tested, ranked = any(v.p is not None for v in found), any(v.p_best is not None for v in found)
    if any(v.best for v in found):
        notes.append(f"Bold: the best at its number of bits{_rounded(runs)}{_TIES if ranked else ''}.")
    if tested or ranked:
        notes.append(
            "Not distinguishable: by paired tests on the same tokens and items, adjusted by Holm's method over the "
            "table. Intervals are each run's own, unadjusted."
        )
    untested = [run for run in runs if any(_by_interval(run, name, verdicts) for name in names)]
    if untested:
        notes.append(
            f"{len(untested)} of {len(runs)} run(s) cannot be tested in full (no scores.npz, or too few blocks): there "
            "a run's own interval, unadjusted, says whether it differs from full precision, and nothing is compared "
            "with the best of as many bits."
        )
    return [note for note in notes if note]


def _rounded(runs: Iterable[Row]) -> str:
    """Name what is rounded besides weights in any of the runs: activations, cache."""
    names = {"act": "activations", "kv": "cache"}
    return "".join(f", {name}" for key, name in names.items() if any(run.get(key) for run in runs))


def _by_interval(run: Row, name: str, verdicts: Verdicts) -> bool:
    """Whether metric `name` has an interval but no paired test against full precision."""
    low, high = run["metrics"].get(f"{name}/delta_ci95") or (0, 0)
    known = not is_full_precision(run) and (low, high) != (0, 0)
    return known and verdicts.get((run["path"], name), Verdict()).p is None


def _baselines(runs: Iterable[Row], names: Sequence[str]) -> str:
    """One line with the full-precision values that differences are measured from."""
    found: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for name in names:
            if f"{name}/baseline" in run["metrics"]:
                found[name].add(text.number(run["metrics"][f"{name}/baseline"]))
    values = ", ".join(f"{name} {' or '.join(sorted(numbers))}" for name, numbers in found.items())
    return f"Full precision: {values}." if found else ""


def labels(table: Table) -> list[str]:
    """Labels of the runs in plots: method, bits, and the settings that distinguish them."""
    varies = [
        index
        for index, (name, kind) in enumerate(table.columns)
        if kind == "setting"
        and name not in ("method", "bits")
        and len({row[index].text for row in table.cells} - {""}) > 1
    ]
    labels = []
    for run, row in zip(table.runs, table.cells, strict=True):
        parts = [run["method"], "" if run["bits"] is None else f"{run['bits']:g} bits"]
        for index in varies:
            name, text = table.columns[index][0], row[index].text
            parts.append(text and (text if name == "grid" else f"{name} {text}"))
        labels.append(", ".join(part for part in parts if part))
    return labels


PERFECT = {"kl": "0", "top1_agreement": "1"}
"""Metrics that full precision has by definition."""


def full_row(table: Table) -> list[str] | None:
    """Text of a row for full precision, a cell per column; None where one of the runs is full precision."""
    if any(is_full_precision(run) for run in table.runs) or not table.runs:
        return None
    found = {"method": "full precision", "bits": "16", "bits/weight": "16"}
    sizes = [run["baseline_size_bytes"] for run in table.runs if run["baseline_size_bytes"]]
    found |= {"size": text.size(max(sizes)), "reduction": "0%"} if sizes else {}
    for name, kind in table.columns:
        if kind == "metric":
            known = {
                text.number(run["metrics"][key]) for run in table.runs if (key := f"{name}/baseline") in run["metrics"]
            }
            found[name] = " or ".join(sorted(known)) or PERFECT.get(name.rpartition("/")[2], "")
    return [found.get(name, "") for name, _ in table.columns]
