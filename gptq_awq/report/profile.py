"""Error profiles of runs: the quantization errors in their ledgers, averaged per block and site."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from gptq_awq.report.rows import Row
from gptq_awq.results import NON_FINITE

ERRORS = {"output": "error_after", "weights": "weight_error"}
LARGEST = 130_000
"""Largest count of numbers in all profiles together; further runs get no profile, so that the page stays small."""

Profile = Mapping[str, Mapping[str, Sequence[float | None]]]


def profiles(runs: Sequence[Row]) -> list[Profile | None]:
    """Error profile of each run: `{"output": {site: [error of block 0, …]}, "weights": …}`.

    Errors are relative, of outputs and of weights, and means over the linears of a site. Methods without calibration
    have errors of weights only; they observe no sites either, so theirs are taken from other runs of the model. A
    profile is None for a run without a ledger, for a mean over runs, and where the page would grow large.
    """
    seen: dict[tuple[str, str], str] = {}
    found: list[Profile | None] = []
    ledgers: list[list[dict[str, Any]]] = []
    room = LARGEST
    for run in runs:
        rows = _rows(run) if room > 0 and "count" not in run else []
        room -= len({(row["block"], row["site"], "error_after" in row) for row in rows}) * len(ERRORS)
        ledgers.append(rows)
        for row in rows:
            key = run["model"], row["name"]
            seen[key] = max(seen.get(key, ""), row["site"], key=len)
    for run, rows in zip(runs, ledgers, strict=True):
        sites = [seen[run["model"], row["name"]] for row in rows]
        one = {kind: _profile(zip(sites, rows, strict=True), key) for kind, key in ERRORS.items()}
        found.append({kind: errors for kind, errors in one.items() if errors} or None)
    return found


def _profile(rows: Iterable[tuple[str, dict[str, Any]]], key: str) -> dict[str, list[float | None]]:
    errors: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for site, row in rows:
        value = row.get(key)
        value = NON_FINITE.get(value) if isinstance(value, str) else value
        if value is not None and math.isfinite(value):
            errors[site][row["block"]].append(value)
    blocks = range(1 + max((block for site in errors.values() for block in site), default=-1))
    return {site: [_mean(by_block.get(block)) for block in blocks] for site, by_block in errors.items()}


def _rows(run: Row) -> list[dict[str, Any]]:
    """Read the ledger's rows that name their block and site; an unreadable ledger has no rows."""
    needed = ("name", "block", "site", *ERRORS.values())
    try:
        lines = (Path(run["path"]) / (run["ledger"] or "ledger.jsonl")).read_bytes().splitlines()
        rows = [{key: row[key] for key in needed if key in row} for row in map(orjson.loads, lines)]
    except (OSError, ValueError, TypeError):
        return []
    return [row for row in rows if {"name", "block", "site"} <= row.keys()]


def _mean(values: list[float] | None) -> float | None:
    return float(f"{sum(values) / len(values):.3g}") if values else None
