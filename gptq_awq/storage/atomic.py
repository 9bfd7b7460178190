"""Files that several processes share: atomic replacement and locks."""

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
    """Replace `path` atomically by the scratch file beside it that is yielded and must be written.

    Readers, also after a crash, see the old file or the new one. Raises OSError (disk full); `path` is then unchanged.
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
    """Hold the lock file `path` exclusively; `waiting` is called once if another process has it.

    The system releases the lock of a process that dies. On a file system without locks a warning is logged and nothing
    is locked: files are still written whole, but two processes may do the same work.
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
