"""The folder of a run: what it is made of, records by which changed files are noticed, and what kills leave in it.

All of it is to be done while no other run is at work there (`registry.alone_in`).
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptq_awq.results import FILE_NAME, Result
from gptq_awq.storage.atomic import remove_all
from gptq_awq.storage.records import FileRecord, misfit

log = logging.getLogger(__name__)
LEDGER = "ledger.jsonl"
UNFINISHED = "ledger.partial.jsonl"
CHECKPOINTS = "checkpoints"
FILES = ("config.yaml", LEDGER, "allocation.json", "scores.npz", "samples.jsonl", FILE_NAME)
"""Files that a finished run is made of, beside its checkpoints; the row is last, so that it never stands alone."""
CARD = "README.md"
VERIFICATION = "verification.json"
"""File by which a folder is known to be a checkpoint that a run wrote."""


def write_recorded(result: Result, files: Mapping[str, FileRecord], folder: Path) -> Result:
    """Write the row, with the records of all files of its run and a hash of itself, and return it. Raises OSError."""
    known: dict[str, Any] = {name: record.json() for name, record in files.items()}
    unsigned = replace(result, manifest=dict(result.manifest) | {"files": known})
    sha256 = _row_sha256(unsigned.write(folder))
    signed = replace(unsigned, manifest=dict(unsigned.manifest) | {"files": known | {FILE_NAME: {"sha256": sha256}}})
    signed.write(folder)
    return signed


def records(result: Result) -> dict[str, FileRecord]:
    """Read the records of all files of a run, but for the row itself, from its row. Raises ValueError."""
    files = result.manifest.get("files")
    if not isinstance(files, dict):
        raise ValueError("the row has no records of its files")
    return {name: FileRecord.read(value) for name, value in files.items() if name != FILE_NAME}


def damage(folder: Path, result: Result, files: Mapping[str, FileRecord]) -> str | None:
    """Name of a file of a finished run that is missing, changed, or of another run; None where all is well.

    Model cards are the user's to edit: they need only be there.
    """
    if result.manifest["files"].get(FILE_NAME) != {"sha256": _row_sha256(folder / FILE_NAME)}:
        return FILE_NAME
    needed = [LEDGER, *(f"{CHECKPOINTS}/{name}/" for name in result.manifest.get("checkpoints", {}))]
    for part in needed:
        if not any(name.startswith(part) for name in files):
            return part
    cards = [name for name in files if name.endswith(f"/{CARD}")]
    lost = next((name for name in cards if not (folder / name).exists()), None)
    return lost or misfit(folder, {name: record for name, record in files.items() if name not in cards})


def clear_leftovers(out: Path) -> list[Path]:
    """Delete what killed runs left in a folder, and return it; a checkpoint that one was replacing is put back."""
    checkpoints = out / CHECKPOINTS
    for old in checkpoints.glob(".*.old-*"):
        place = checkpoints / old.name[1:].rpartition(".old-")[0]
        with suppress(OSError):
            if not place.exists():
                old.rename(place)
    hidden = [*checkpoints.glob(".*"), *checkpoints.glob(f"*/.{CARD}.*"), *out.glob(".storing-*"), *out.glob(".*.tmp")]
    gone = remove_all(hidden)
    if gone:
        log.info("deleted %s, which runs that were killed had left", ", ".join(path.name for path in gone))
    return gone


def clear_earlier(out: Path, formats: Iterable[str], kept: Iterable[str]) -> None:
    """Delete what an earlier run stored in a folder, except the checkpoints `formats` and the files `kept`."""
    keep = set(formats)
    old = [path.parent for path in (out / CHECKPOINTS).glob(f"*/{VERIFICATION}") if path.parent.name not in keep]
    for path in old:
        log.info("deleted %s: it was the checkpoint of an earlier run in this folder", path)
    files = set(kept)
    remove_all([*old, *(out / name for name in FILES[:-1] if name not in files and (out / name).exists())])
    with suppress(OSError):
        (out / CHECKPOINTS).rmdir()


def _row_sha256(path: Path) -> str:
    """Hash of a stored row, all but the place in it where this hash is kept. Raises OSError, ValueError."""
    row = json.loads(path.read_bytes())
    row["manifest"]["files"].pop(FILE_NAME, None)
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
