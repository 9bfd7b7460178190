"""Where the error of a run comes from: its ledger, as one number per block and site."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from gptq_awq.report.rows import Row
from gptq_awq.results import NON_FINITE

LARGEST = 80_000
"""Numbers in all profiles together; runs beyond get none, so that the page stays small."""


def profiles(runs: Sequence[Row]) -> list[dict[str, Any] | None]:
    """For each run its `profile`, None without a ledger, for means over runs, and where the page would grow large."""
    found: list[dict[str, Any] | None] = []
    room = LARGEST
    for run in runs:
        one = profile(run) if room > 0 and "count" not in run else None
        room -= sum(map(len, one["sites"].values())) if one else 0
        found.append(one)
    return found


def profile(run: Row) -> dict[str, Any] | None:
    """`{"output": whether errors are of outputs, "sites": {site: [error of block 0, …]}}`, means over a site's linears.

    The error is the relative output error after quantization; for methods without calibration, which don't know it,
    the relative weight error.
    """
    rows = _rows(run)
    output = all("error_after" in row for row in rows)
    errors: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        value = row.get("error_after" if output else "weight_error")
        value = NON_FINITE.get(value) if isinstance(value, str) else value
        if value is not None and math.isfinite(value):
            errors[str(row["site"])][int(row["block"])].append(value)
    if not errors:
        return None
    blocks = range(1 + max(block for site in errors.values() for block in site))
    return {"output": output, "sites": {name: [_mean(site.get(b)) for b in blocks] for name, site in errors.items()}}


def _rows(run: Row) -> list[dict[str, Any]]:
    path = Path(run["path"]) / (run["ledger"] or "ledger.jsonl")
    try:
        lines = path.read_bytes().splitlines()
        rows = [orjson.loads(line) for line in lines]
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict) and "site" in row and "block" in row]


def _mean(values: list[float] | None) -> float | None:
    return float(f"{sum(values) / len(values):.3g}") if values else None
