"""Runs, known by what they compute: found again when they are finished, one process at a time while they are not.

`manifest.run` is a run's content hash (manifest.run_sha256). The cache remembers under it where the finished run lies,
so that a sweep started again, in whatever folder, skips what is done.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gptq_awq.experiment.fingerprint import environment
from gptq_awq.results import FILE_NAME, Result
from gptq_awq.storage.assets import cache_dir
from gptq_awq.storage.atomic import locked, replacing
from gptq_awq.storage.journal import Journal

log = logging.getLogger(__name__)
FILES = ("config.yaml", "ledger.jsonl", "allocation.json", "scores.npz", "checkpoints", FILE_NAME)
"""What a finished run is made of; the row comes last, so that it never stands without the rest."""


@dataclass(frozen=True)
class Run:
    """One run: its content hash and its folder."""

    sha256: str
    out: Path

    @property
    def journal(self) -> Journal:
        """Its finished blocks, while it isn't finished.

        They are of use on this kind of machine alone: another CPU or number of threads sums in another order, and the
        rest of the run would not be what it would have been.
        """
        key = hashlib.sha256(json.dumps([self.sha256, environment()["machine"]]).encode()).hexdigest()
        return Journal(cache_dir() / "progress" / self.sha256, key)

    @property
    def scratch(self) -> Path:
        """For hidden states that don't fit into memory, while it isn't finished."""
        return cache_dir() / "progress" / f"{self.sha256}-spilled"

    def forget_progress(self) -> None:
        """Delete what was kept of it while it wasn't finished."""
        self.journal.clear()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def finished(self) -> Path | None:
        """A folder that holds this very run, finished and complete; its own folder first."""
        for folder in (self.out, self._remembered()):
            if folder is not None and self._holds(folder):
                return folder
        return None

    def adopt(self, folder: Path) -> Result:
        """Take the files of a finished run over into this one's folder: hard links, or copies. Raises OSError."""
        if folder.resolve() != self.out.resolve():
            for name in FILES:
                if (folder / name).exists():
                    _take_over(folder / name, self.out / name)
        return Result.read(self.out / FILE_NAME)

    def remember(self) -> None:
        """For later runs: this one is finished, and lies in its folder."""
        try:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._memory) as scratch:
                scratch.write_text(json.dumps({"folder": str(self.out.resolve())}))
        except OSError as error:
            log.warning("later runs won't know that this one is finished: %s", error)

    @contextmanager
    def alone(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Within: no other process computes this run, or any run in this folder; `waiting` says what is waited for."""
        locks = cache_dir() / "locks"
        folder = hashlib.sha256(str(self.out.resolve()).encode()).hexdigest()
        with (
            locked(locks / f"out-{folder}", lambda: waiting(f"another run is writing to {self.out}")),
            locked(locks / f"run-{self.sha256}", lambda: waiting("another process is computing this very run")),
        ):
            yield

    @property
    def _memory(self) -> Path:
        return cache_dir() / "runs" / f"{self.sha256}.json"

    def _remembered(self) -> Path | None:
        try:
            return Path(json.loads(self._memory.read_text())["folder"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _holds(self, folder: Path) -> bool:
        try:
            row = Result.read(folder / FILE_NAME)
        except (OSError, ValueError):
            return False
        checkpoints = row.manifest.get("checkpoints", {}).values()
        parts = [folder / "ledger.jsonl", *(folder / checkpoint["path"] for checkpoint in checkpoints)]
        same = row.status == "done" and row.manifest.get("run") == self.sha256
        return same and all(part.exists() for part in parts)


def _take_over(source: Path, target: Path) -> None:
    """A file or folder under another name: linked where the file system can (files here are replaced, not changed)."""
    if target.is_dir():
        shutil.rmtree(target)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link)
    else:
        with replacing(target) as scratch:
            _link(source, scratch)


def _link(source: Path | str, target: Path | str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
