"""The results of a run on disk: one `results.json` per run, one `ledger.jsonl` row per linear layer.

Both are strict JSON. JSON has no infinity and no NaN, which a broken 2-bit model does reach, so they are
written as the strings "inf", "-inf" and "nan"; the readers here turn them back into floats in metrics and in
ledger rows.
"""

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, Self

import orjson

from gptq_awq.errors import UserError
from gptq_awq.runtime.collection import uncollected
from gptq_awq.storage.atomic import replacing
from gptq_awq.storage.bounded import ROW_BYTES, read_bytes

if TYPE_CHECKING:  # 65 MB and half a second, which a run that only writes its row need not spend
    import pandas as pd

log = logging.getLogger(__name__)

FILE_NAME = "results.json"
FAILURE = "failed.json"
"""File that a failed run writes in place of results.json where that holds an earlier run's results."""
NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


@dataclass(frozen=True)
class Result:
    """The results row of one run, finished or failed; values that a failed run did not reach are None or empty.

    `bits_per_weight` counts scales and zeros. `metrics` is a flat map: `wikitext2/ppl@2048`, and with that name as
    prefix the values derived from it: `.../baseline` (full precision), `.../delta`, `.../delta_ci95` ([low, high]).
    `seconds` maps phases to wall time; `ledger` is a path relative to the run's folder. `manifest` holds hashes and
    versions; its `tokens.eval` maps each evaluated text ("wikitext2", "lm_eval/TASK") to the hash of its tokens.
    `grid` is the number format of the weights ("int", "nf4", "q4_k_m"), None in rows older than that option; `act`
    and `kv` are the formats of activations and of cached keys and values during evaluation ("int8"), None where they
    were not rounded. `forecast`, where one was made, holds the predicted `seconds` and `peak_memory_bytes`.
    """

    method: str
    bits: float | None
    bits_per_weight: float | None
    group_size: int | None
    sym: bool | None
    model: str
    status: Literal["done", "failed"]
    metrics: Mapping[str, Any]
    size_bytes: int | None
    baseline_size_bytes: int | None
    seconds: Mapping[str, float]
    peak_memory_bytes: int | None
    ledger: str | None
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    error: str | None = None
    grid: str | None = None
    act: str | None = None
    kv: str | None = None
    forecast: Mapping[str, Any] | None = None

    def write(self, out_dir: Path | str, name: str = FILE_NAME) -> Path:
        """Write the row to `out_dir/name`, whole or not at all, and return its path. Raises OSError (disk full)."""
        row = asdict(self)
        for key in ("error", "forecast"):
            if row[key] is None:
                del row[key]
        path = Path(out_dir) / name
        text = json.dumps(_jsonable(row), indent=1, allow_nan=False) + "\n"
        with replacing(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read the result stored in the file `path`. Raises OSError, or ValueError where it is no results.json."""
        return cls(**_read_row(path))


KEYS = tuple(field.name for field in fields(Result))
OPTIONAL = ("error", "grid", "act", "kv", "forecast")


@dataclass(frozen=True)
class Ledger:
    """The file `ledger.jsonl`: one line per linear layer, appended block by block, so a killed run keeps its blocks."""

    path: Path

    @classmethod
    def create(cls, path: Path | str) -> Self:
        """Create an empty ledger, replacing any earlier one."""
        Path(path).write_bytes(b"")
        return cls(Path(path))

    @classmethod
    def resume(cls, path: Path | str, rows: int) -> Self:
        """Continue a ledger after its first `rows` rows; rows of a block that was interrupted are dropped.

        Raises ValueError where the ledger has fewer rows.
        """
        with Path(path).open("r+b") as file:
            whole = [line for line in file if line.endswith(b"\n")]
            if len(whole) < rows:
                raise ValueError(f"{path} has {len(whole)} rows, not the {rows} of the finished blocks")
            file.truncate(sum(map(len, whole[:rows])))
        return cls(Path(path))

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append the rows of one block; they are on disk (fsync) when this returns."""
        lines = "".join(json.dumps(_jsonable(row), allow_nan=False) + "\n" for row in rows)
        with self.path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())


def read_ledger(path: Path | str) -> "pd.DataFrame":
    """Read a ledger as a table, one row per linear layer; a half-written line is skipped with a warning."""
    import pandas as pd

    rows = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append({key: _with_floats(value) for key, value in orjson.loads(line).items()})
            except (ValueError, AttributeError):
                log.warning("skipped line %d of %s: not a ledger row", number, path)
    return pd.DataFrame(rows)


def load(*roots: Path | str, copies: bool = False) -> "pd.DataFrame":
    """Read all runs below `roots` (hidden folders excepted) into a table, one row per results.json, sorted by path.

    Columns: the keys of `Result` (`metrics`, `seconds`, `manifest` and `config` stay dicts), `path` (the run's
    folder), then every metric under its own name (`wikitext2/ppl@2048`) and every phase as `seconds/PHASE`. A
    file that is not a complete results row is skipped with a warning.

    Rows with the same `manifest.run` are one computation, reused or repeated: the first by path is kept, a finished
    one before a failed one; `copies=True` keeps all. Raises UserError where a root is no folder.
    """
    import pandas as pd

    for root in roots:
        if not Path(root).is_dir():
            raise UserError(f"no folder of runs at {root}")
    with uncollected():
        rows = list(_rows(sorted({path for root in roots for path in _find(root)})))
        if not copies:
            rows = _computations(rows)
        return pd.DataFrame(rows, columns=None if rows else [*KEYS, "path"])


def count(root: Path | str) -> int:
    """Number of results.json files below `root`, hidden folders excepted, whether or not they can be read."""
    return len(set(_find(root)))


def without_copies(table: "pd.DataFrame") -> "pd.DataFrame":
    """Keep one row per computation of a table of `load(…, copies=True)`, as `load` does."""
    columns = (table[name] for name in ("manifest", "status", "path"))
    rows: list[dict[str, Any]] = [{"manifest": m, "status": s, "path": p} for m, s, p in zip(*columns, strict=True)]
    kept = [row["path"] for row in _computations(rows)]
    return table.loc[table["path"].isin(kept)].reset_index(drop=True)


def _rows(paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        try:
            row = _read_row(path)
        except (OSError, ValueError) as error:
            log.warning("skipped %s: %s", path, error)
        else:
            yield flat_row(row, path=os.path.dirname(path))  # noqa: PTH120 (pathlib is slow ten thousand times)


def _computations(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep one row per `manifest.run`: the first finished one, else the first; rows without that key are all kept."""
    kept: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = row["manifest"].get("run") or row["path"]
        if key not in kept or (kept[key]["status"] != "done" and row["status"] == "done"):
            kept[key] = row
    return sorted(kept.values(), key=lambda row: row["path"])


def flat_row(row: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Flatten a results row into one table row: its keys, then `more`, then its metrics and `seconds/PHASE`."""
    seconds = {f"seconds/{phase}": value for phase, value in row["seconds"].items()}
    return {key: row.get(key) for key in KEYS} | more | dict(row["metrics"]) | seconds


def _find(root: Path | str) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]  # each run has a .hydra
        if FILE_NAME in files:
            yield f"{folder}/{FILE_NAME}"


def _read_row(path: Path | str) -> dict[str, Any]:
    row = orjson.loads(read_bytes(path, ROW_BYTES))
    if not isinstance(row, dict):
        raise ValueError("not a results row")
    missing = [key for key in KEYS if key not in row and key not in OPTIONAL]
    if missing:
        raise ValueError(f"not a results row: no {missing[0]!r}")
    if not all(isinstance(row[key], dict) for key in ("metrics", "seconds", "manifest", "config")):
        raise ValueError("not a results row: metrics, seconds, manifest and config must be maps")
    if _depth_over(row, _DEEPEST):
        raise ValueError(f"not a results row: nested more than {_DEEPEST} deep")
    row["metrics"] = {name: _with_floats(value) for name, value in row["metrics"].items()}
    if (wrong := wrong_field(row)) is not None:
        raise ValueError(f"not a results row: {wrong}")
    return {key: row[key] for key in KEYS if key in row}


_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("method", "model", "status"), (str,)),
    **dict.fromkeys(("ledger", "error", "grid", "act", "kv"), (str, NoneType)),
    **dict.fromkeys(("bits", "bits_per_weight", "group_size", "size_bytes"), (int, float, NoneType)),
    **dict.fromkeys(("baseline_size_bytes", "peak_memory_bytes"), (int, float, NoneType)),
    **{"sym": (bool, NoneType), "forecast": (dict, NoneType)},
}
_DEEPEST = 50
"""Largest depth of maps and lists in a row; those of a run have some six."""


def wrong_field(row: Mapping[str, Any]) -> str | None:
    """Name the first field of a row whose type is not the contract's, and say what it must be; None if all are."""
    for key, kinds in _TYPES.items():
        if type(row.get(key)) not in kinds and key in row:  # not isinstance: a boolean is no number here
            return f"{key} must be {' or '.join(kind.__name__.replace('NoneType', 'null') for kind in kinds)}"
    if row["status"] not in ("done", "failed"):
        return "status must be done or failed"
    return _wrong_number(row) or _wrong_in_manifest(row["manifest"])


def _wrong_number(row: Mapping[str, Any]) -> str | None:
    for name, value in row["metrics"].items():
        if name in KEYS or name == "path" or name.startswith("seconds/"):
            return f"metrics: {name!r} is the name of another column"
        limits = value if isinstance(value, list) else [value]
        if name.endswith("ci95") and value is not None and len(limits) != 2:
            return f"metrics: {name!r} must be a pair of numbers"
        if value is not None and not all(type(limit) in (int, float) for limit in limits):
            return f"metrics: {name!r} must be a number"
    for phase, value in row["seconds"].items():
        if type(value) not in (int, float):
            return f"seconds: {phase!r} must be a number"
    return None


def _wrong_in_manifest(manifest: Mapping[str, Any]) -> str | None:
    for key in ("model", "tokens", "sources", "packages", "machine", "checkpoints"):
        if not isinstance(manifest.get(key), (dict, NoneType)):
            return f"manifest.{key} must be a map"
    if not isinstance(manifest.get("run"), (str, NoneType)):
        return "manifest.run must be text"
    if not isinstance((manifest.get("model") or {}).get("sha256"), (str, NoneType)):
        return "manifest.model.sha256 must be text"
    for key in ("tokens", "sources"):
        of_eval = (manifest.get(key) or {}).get("eval")
        if not isinstance(of_eval, (dict, NoneType)):
            return f"manifest.{key}.eval must be a map"
        if not all(isinstance(value, (str, NoneType)) for value in (of_eval or {}).values()):
            return f"manifest.{key}.eval must map to text"
    return None


def _depth_over(value: Any, most: int) -> bool:
    """Whether maps and lists are nested more than `most` deep."""
    if not isinstance(value, (dict, list)):
        return False
    return most == 0 or any(_depth_over(x, most - 1) for x in (value.values() if isinstance(value, dict) else value))


def _with_floats(value: Any) -> Any:
    """Turn the strings that stand for non-finite floats in JSON back into floats, in a value or a list of values."""
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def _jsonable(value: Any) -> Any:
    """Convert `value` to JSON's own types: arrays and tensors to lists or numbers, anything unknown to its string."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return _jsonable(value.tolist()) if hasattr(value, "tolist") else str(value)
