"""Rows of many runs: which can stand side by side, and which did not finish."""

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_awq.errors import UserError
from gptq_awq.results import FILE_NAME, KEYS

if TYPE_CHECKING:
    import pandas as pd

Row = Mapping[str, Any]
FULL_PRECISION = "fp"
STARTED = ("config.yaml", "run.log", "ledger.partial.jsonl")


def records(df: "pd.DataFrame") -> list[Row]:
    """The rows of `results.load` as dicts of their keys and `path`, None (not NaN) for what is missing."""
    plain = df[[*KEYS, "path"]].astype(object)
    return [dict(zip(plain.columns, row, strict=True)) for row in plain.where(plain.notna(), None).to_numpy()]


def measured(metrics: Mapping[str, Any]) -> list[str]:
    """The names of what was measured, without what belongs to it (NAME/baseline, NAME/delta, …)."""
    return [name for name in metrics if name.rpartition("/")[0] not in metrics]


def by_model(runs: Iterable[Row]) -> dict[str, list[Row]]:
    """Runs by model; where one name stands for several weights, by name and hash, which is then in their `model`."""
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


def is_perplexity(name: str) -> bool:
    """Whether a metric is a perplexity: `wikitext2/ppl@2048`."""
    return "ppl" in name.rpartition("/")[2]


def total_seconds(seconds: Mapping[str, float]) -> float:
    """The whole run's wall time: `total` where it was recorded, else the sum of the phases."""
    return seconds["total"] if "total" in seconds else sum(seconds.values())


def distinguishable(metrics: Mapping[str, Any], name: str) -> bool:
    """Whether `name` differs from full precision: False where the interval contains 0 or is not known."""
    low, high = metrics.get(f"{name}/delta_ci95") or (-math.inf, math.inf)
    return low > 0 or high < 0


def check_protocols(runs: Iterable[Row]) -> None:
    """Raise UserError where runs scored one text or task differently: another perplexity, or other tokens."""
    ways: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        by_text: dict[str, list[str]] = defaultdict(list)
        for name in measured(run["metrics"]):
            by_text[name.rpartition("/")[0]] += [name] if is_perplexity(name) else []
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


def unfinished(rows: Iterable[Row], folders: Sequence[str] = ()) -> list[str]:
    """Each run that did not finish, and what is known of why; `folders` are those that have no row at all."""
    failed = [
        f"{row['path']} ({row['status']}: {row['error'] or 'no reason given'})"
        for row in rows
        if row["status"] != "done"
    ]
    return failed + [f"{folder} (no {FILE_NAME}: interrupted, or still running)" for folder in folders]


def started_folders(roots: Iterable[Path | str]) -> list[str]:
    """Folders of runs below `roots` that began and have no results, sorted."""
    found = set()
    for root in roots:
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            if FILE_NAME not in files and any(name in files for name in STARTED):
                found.add(folder)
    return sorted(found)
