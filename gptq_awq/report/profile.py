"""Error profiles of runs: the quantization errors in their ledgers, averaged per block and site."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from gptq_awq.report.rows import Row
from gptq_awq.results import NON_FINITE
from gptq_awq.storage.bounded import LEDGER_BYTES, read_bytes

log = logging.getLogger(__name__)

ERRORS = {"output": "error_after", "weights": "weight_error"}
LARGEST = 130_000
"""Largest count of numbers in all profiles together; further runs get no profile, so that the page stays small."""

MOST_BLOCKS = 10_000
"""Largest count of blocks that a profile has room for; a row of a later block is left out."""

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
    """Read the ledger's rows that name their block and site; a ledger that can't be read has none.

    The row may be a stranger's: its ledger is read inside of the run's own folder only, and up to a size.
    """
    folder = Path(run["path"])
    try:
        path = (folder / (run["ledger"] or "ledger.jsonl")).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise ValueError("it lies outside of the run's folder")
        lines = read_bytes(path, LEDGER_BYTES).splitlines()
        return [row for row in map(_known, map(orjson.loads, lines)) if row is not None]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        log.warning("no profile of %s: its ledger cannot be read (%s)", folder, error)
        return []


def _known(row: Any) -> dict[str, Any] | None:
    """Pick the keys of a ledger row that a profile needs; None where one is not there."""
    if not isinstance(row, dict) or type(row.get("block")) is not int or not 0 <= row["block"] < MOST_BLOCKS:
        return None
    if not isinstance(row.get("name"), str) or not isinstance(row.get("site"), str):
        return None
    errors = {key: row[key] for key in ERRORS.values() if key in row and _is_error(row[key])}
    return {"name": row["name"], "block": row["block"], "site": row["site"]} | errors


def _is_error(value: Any) -> bool:
    return value is None or type(value) in (int, float) or (isinstance(value, str) and value in NON_FINITE)


def _mean(values: list[float] | None) -> float | None:
    return float(f"{sum(values) / len(values):.3g}") if values else None
