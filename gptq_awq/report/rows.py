"""Results rows of many runs: which are comparable, and which did not finish."""

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_awq.errors import UserError
from gptq_awq.results import FAILURE, FILE_NAME, KEYS

if TYPE_CHECKING:
    import pandas as pd

Row = Mapping[str, Any]
FULL_PRECISION = "fp"
STARTED = ("config.yaml", "run.log", "ledger.partial.jsonl", FAILURE)
LISTED = 20
"""Largest number of names listed in a warning; the others are counted."""


def records(df: "pd.DataFrame") -> list[Row]:
    """Convert a table of `results.load` to dicts of the rows' keys and `path`, None (not NaN) for missing values.

    Metrics that are lists are left out, but for confidence intervals.
    """
    plain = df[[*KEYS, "path"]].astype(object)
    rows = [dict(zip(plain.columns, row, strict=True)) for row in plain.where(plain.notna(), None).to_numpy()]
    return [row | {"metrics": {n: v for n, v in row["metrics"].items() if _is_shown(n, v)}} for row in rows]


def _is_shown(name: str, value: Any) -> bool:
    return not isinstance(value, list) or name.endswith("ci95")


def measured(metrics: Mapping[str, Any]) -> list[str]:
    """Names of the measured metrics, without the values derived from them (NAME/baseline, NAME/delta, …)."""
    return [name for name in metrics if name.rpartition("/")[0] not in metrics and not name.endswith("ci95")]


def by_model(runs: Iterable[Row]) -> dict[str, list[Row]]:
    """Group runs by model; a name shared by different weights is extended by their hash, also in the rows' `model`."""
    runs = list(runs)
    weights: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        weights[run["model"]] |= {_weights(run)} - {""}
    found: dict[str, list[Row]] = {}
    for run in runs:
        several = len(weights[run["model"]]) > 1
        title = f"{run['model']} ({_weights(run)[:8] or 'unknown weights'})" if several else run["model"]
        found.setdefault(title, []).append({**run, "model": title})
    return found


def _weights(run: Row) -> str:
    return (run["manifest"].get("model") or {}).get("sha256") or ""


def is_full_precision(run: Row) -> bool:
    """Whether a run rounds nothing: no weights, no activations, no cached keys and values."""
    return run["method"] == FULL_PRECISION and not run.get("act") and not run.get("kv")


def is_perplexity(name: str) -> bool:
    """Whether a metric is a perplexity, such as `wikitext2/ppl@2048`."""
    return "ppl" in name.rpartition("/")[2]


def total_seconds(seconds: Mapping[str, float]) -> float:
    """Wall time of the whole run in seconds, without compiling, which only the first run on a machine does.

    It is `total` where that was recorded, else the sum of the phases.
    """
    compiling = seconds.get("compile", 0.0)
    return max(0.0, (seconds["total"] if "total" in seconds else sum(seconds.values())) - compiling)


def distinguishable(metrics: Mapping[str, Any], name: str) -> bool:
    """Whether metric `name` differs from full precision: False where the 95% interval contains 0 or is not known."""
    low, high = metrics.get(f"{name}/delta_ci95") or (-math.inf, math.inf)
    return low > 0 or high < 0


def check_protocols(runs: Iterable[Row]) -> None:
    """Raise UserError where runs scored one text or task by different protocols: other perplexities or other tokens."""
    ways: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        by_text: dict[str, list[str]] = defaultdict(list)
        for name in measured(run["metrics"]):
            by_text[name.rpartition("/")[0]] += [name] if is_perplexity(name) else []
        for text, perplexities in by_text.items():
            tokens = ((run["manifest"].get("tokens") or {}).get("eval") or {}).get(text) or "unknown"
            ways[text][" and ".join(sorted(perplexities)) or text, tokens].append(run["path"])
    for text, found in ways.items():
        if len(found) > 1:
            seen = "; ".join(
                f"{what} on tokens {tokens[:12]} in {len(paths)} run(s) such as {paths[0]}"
                for (what, tokens), paths in found.items()
            )
            raise UserError(f"{text} was scored by different protocols, report them apart: {seen}")


@dataclass(frozen=True)
class Folders:
    """Folders of runs that began but have no results, and of runs that failed where earlier results exist."""

    begun: Sequence[str] = ()
    failed_again: Sequence[str] = ()


def find_folders(roots: Iterable[Path | str]) -> Folders:
    """Find the folders of unfinished runs below `roots`, hidden folders excepted; sorted."""
    begun, failed = set(), set()
    for root in roots:
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            if FILE_NAME not in files and any(name in files for name in STARTED):
                begun.add(folder)
            if FAILURE in files and FILE_NAME in files:
                failed.add(folder)
    return Folders(sorted(begun), sorted(failed))


def warnings(rows: Iterable[Row], folders: Folders) -> list[str]:
    """Warn of runs that are left out, and of those that failed again and whose earlier results are shown."""
    missing = [
        f"{row['path']} ({row['status']}: {row['error'] or 'no reason given'})"
        for row in rows
        if row["status"] != "done"
    ]
    missing += [f"{folder} (no {FILE_NAME}: interrupted, or still running)" for folder in folders.begun]
    found = []
    if missing:
        found.append(f"{len(missing)} unfinished run(s) left out: {_listed(missing)}")
    if folders.failed_again:
        count, names = len(folders.failed_again), _listed(folders.failed_again)
        found.append(f"{count} run(s) failed when run again ({FAILURE}); their earlier results are shown: {names}")
    return found


def _listed(items: Sequence[str]) -> str:
    more = [f"and {len(items) - LISTED} more"] if len(items) > LISTED else []
    return ", ".join([*items[:LISTED], *more])
