"""Files that several processes share: written whole or not at all, and one writer at a time."""

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

log = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Within: a scratch file beside `path`, to be written; afterwards, on disk, it is `path`.

    Readers and crashes see the old file or the new one. Raises OSError (disk full); `path` is then as it was.
    """
    # Unique per writer, not per process: two nodes may share a folder and a process id.
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within: this process alone holds the lock file `path`; `waiting` is called once if another has it.

    The system takes the lock from a process that dies. Where a file system has no locks there is none, and the log
    says so: files are still written whole, but two processes may do the same work.
    """
    lock = filelock.FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        waiting()
        lock.acquire(poll_interval=0.2)
    except (OSError, NotImplementedError) as error:
        log.warning("no lock on %s (%s)", path, error)
    try:
        yield
    finally:
        lock.release()
