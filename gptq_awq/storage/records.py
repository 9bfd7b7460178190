"""Records of files: their sha256, and size and time, by which a change is mostly noticed without reading them."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

SEAL = ".files.json"
"""File in a sealed folder that holds the records of the others."""
INTERVAL = 7 * 86400.0
"""Seconds after which the files of a sealed folder are read again, whatever their sizes and times say."""
SMALL = 1 << 20
"""Largest size in bytes of a file that is read whenever it is compared with its record."""


@dataclass(frozen=True)
class FileRecord:
    """Record of a file as it was written.

    Attributes:
        sha256: hex sha256 of its bytes.
        size_bytes: its size.
        mtime_ns: time of its last change, in nanoseconds since the epoch.
    """

    sha256: str
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Make the record of a file. Raises OSError."""
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            return cls(hashlib.file_digest(file, "sha256").hexdigest(), status.st_size, status.st_mtime_ns)

    @classmethod
    def read(cls, value: Any) -> Self:
        """Make a record of its JSON form. Raises ValueError."""
        try:
            return cls(str(value["sha256"]), int(value["size_bytes"]), int(value["mtime_ns"]))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"no record of a file: {value!r:.100}") from error

    def json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return asdict(self)

    def fits(self, path: Path, read: bool = False) -> bool:
        """Whether a file is what it was: by its size, and where its time differs, or it is small, by its bytes.

        Args:
            path: the file.
            read: whether to read it in any case.
        """
        try:
            status = path.stat()
            if status.st_size != self.size_bytes:
                return False
            if status.st_mtime_ns == self.mtime_ns and status.st_size > SMALL and not read:
                return True
            return FileRecord.of(path).sha256 == self.sha256
        except OSError:
            return False


def records_of(folder: Path, names: Iterable[str] = ("",)) -> dict[str, FileRecord]:
    """Record the named files of a folder, and all files in those that are folders, by their paths relative to it.

    Files that aren't there are left out. Raises OSError for one that can't be read.
    """
    paths = {path for name in names for path in [folder / name, *(folder / name).rglob("*")] if path.is_file()}
    return {path.relative_to(folder).as_posix(): FileRecord.of(path) for path in sorted(paths)}


def misfit(folder: Path, records: Mapping[str, FileRecord], read: bool = False) -> str | None:
    """Name of the first file of a folder that isn't what its record says; None where all are."""
    return next((name for name, record in records.items() if not record.fits(folder / name, read)), None)


def seal(folder: Path) -> None:
    """Keep the records of all files of a folder, which is complete, inside of it. Raises OSError."""
    known = {name: record.json() for name, record in records_of(folder).items() if name != SEAL}
    (folder / SEAL).write_text(json.dumps(known, indent=1) + "\n")


def broken_seal(folder: Path) -> str | None:
    """Name of a file of a sealed folder that isn't what it was (the seal's own, where there is none); None: all are.

    Files are read where their size or time has changed, and all of them when that was last done `INTERVAL` ago.
    """
    path = folder / SEAL
    try:
        known = {name: FileRecord.read(value) for name, value in json.loads(path.read_text()).items()}
        due = time.time() - path.stat().st_mtime > INTERVAL
        changed = misfit(folder, known, read=due)
        if due and changed is None:
            path.touch()
    except (OSError, ValueError, AttributeError):
        return SEAL
    return changed
