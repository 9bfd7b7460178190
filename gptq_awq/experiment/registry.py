"""Registry of runs by what they compute: found again when they are finished, one process at a time while they are not.

`manifest.run` is a run's content hash (fingerprint.run_sha256). The cache remembers under it where the finished run
lies, so that a sweep started again, in whatever folder, skips what is done. A finished run's row carries hashes of all
of its files (folder.py): one that lost or changed a file is no finished run, and is computed anew.
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

from gptq_awq.experiment.folder import CHECKPOINTS, FILES, UNFINISHED, clear_earlier, damage, records
from gptq_awq.results import FILE_NAME, Result
from gptq_awq.runtime.runlog import LOG
from gptq_awq.runtime.source import environment
from gptq_awq.storage.assets import cache_dir
from gptq_awq.storage.atomic import locked, locked_folder, remove_all, replacing
from gptq_awq.storage.journal import Journal
from gptq_awq.storage.notes import note, noted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run: its content hash and its folder."""

    sha256: str
    out: Path

    @property
    def journal(self) -> Journal:
        """Journal of the finished blocks of a run that isn't finished.

        They are of use on this kind of machine alone: another CPU or number of threads sums in another order, and the
        rest of the run would not be what it would have been.
        """
        key = hashlib.sha256(json.dumps([self.sha256, environment()["machine"]]).encode()).hexdigest()
        return Journal(self._blocks, key)

    @property
    def _blocks(self) -> Path:
        return cache_dir() / "progress" / self.sha256

    @property
    def scratch(self) -> Path:
        """Folder for hidden states that don't fit into memory, while the run isn't finished."""
        return cache_dir() / "progress" / f"{self.sha256}-spilled"

    def forget_progress(self) -> None:
        """Delete the journal and the hidden states that were kept while the run wasn't finished."""
        self.journal.clear()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def finished(self, say: Callable[[str], None] = log.info) -> Path | None:
        """A folder that holds this very run, finished and complete; its own folder first.

        `say` hears of a folder that holds it no longer as it was stored.
        """
        for folder in dict.fromkeys((self.out.resolve(), self._remembered())):
            if folder is not None and self._holds(folder, say):
                return self.out if folder == self.out.resolve() else folder
        return None

    def adopt(self, folder: Path) -> Result:
        """Take the files of a finished run over into this one's folder: hard links, or copies. Raises OSError."""
        (self.out / UNFINISHED).unlink(missing_ok=True)
        result = Result.read(folder / FILE_NAME)
        if folder.resolve() != self.out.resolve():
            formats = list(result.manifest.get("checkpoints", {}))
            names = [*FILES[:-1], *(f"{CHECKPOINTS}/{name}" for name in formats)]
            names = [name for name in names if (folder / name).exists()]
            clear_earlier(self.out, formats, names)
            for name in names:
                _take_over(folder / name, self.out / name)
            if (folder / LOG).is_file() and not (self.out / LOG).exists():
                shutil.copyfile(folder / LOG, self.out / LOG)  # not linked, as this one goes on
            _take_over(folder / FILE_NAME, self.out / FILE_NAME)
        return result

    def remember(self) -> None:
        """Remember for later runs that this one is finished, and where its folder is."""
        try:
            note(self._memory, {"folder": str(self.out.resolve())})
        except OSError as error:
            log.warning("later runs won't know that this one is finished: %s", error)

    def settle(self) -> None:
        """Do what a kill may have kept a finished run from: have it remembered, and its progress forgotten."""
        known = self._remembered()
        if known is None or not (known / FILE_NAME).is_file():
            self.remember()
        if self._blocks.exists() or self.scratch.exists():
            self.forget_progress()

    @contextmanager
    def alone(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the lock of this run, so that no other process computes it; `waiting` says what is waited for."""
        lock = cache_dir() / "locks" / f"run-{self.sha256}"
        with locked(lock, lambda: waiting("another process is computing this very run")):
            yield

    @property
    def _memory(self) -> Path:
        return cache_dir() / "runs" / f"{self.sha256}.json"

    def _remembered(self) -> Path | None:
        folder = noted(self._memory).get("folder")
        return Path(folder) if isinstance(folder, str) else None

    def _holds(self, folder: Path, say: Callable[[str], None]) -> bool:
        try:
            row = Result.read(folder / FILE_NAME)
            if row.status != "done" or row.manifest.get("run") != self.sha256:
                return False
            stored = records(row)
        except (OSError, ValueError):
            return False
        changed = damage(folder, row, stored)
        if changed is not None:
            say(f"{folder}: {changed} is not what the run stored there; the run is computed anew")
        return changed is None


@contextmanager
def alone_in(out: Path, waiting: Callable[[str], None] | None) -> Iterator[None]:
    """Within: no other run touches this folder, which is made; of other machines, as far as the cache is shared.

    `waiting` says what is waited for; None: don't wait.

    Raises:
        BlockingIOError: another run is at work there, and `waiting` is None.
        OSError: the folder can't be made.
    """

    def waits() -> None:
        if waiting is None:
            raise BlockingIOError(f"another run is writing to {out}")
        waiting(f"another run is writing to {out}")

    name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()
    with locked(cache_dir() / "locks" / f"out-{name}", waits), locked_folder(out, waits):
        yield


def _take_over(source: Path, target: Path) -> None:
    """A file or folder under another name: linked where the file system can (files here are replaced, not changed)."""
    if source.is_dir():
        remove_all([target])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, copy_function=_link)
    else:
        with replacing(target) as scratch:
            _link(source, scratch)


def _link(source: Path | str, target: Path | str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
