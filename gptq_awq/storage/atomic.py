"""Files that several processes share: atomic replacement, locks, and what killed writers leave behind."""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

log = logging.getLogger(__name__)
OWNED = re.compile(r"\.(?:.+\.|partial-|storing-)([0-9a-f]{8})-(\d+)-[0-9a-f]{12}(?:\.tmp|-.*)?")
"""Name of a scratch file or folder: what it is for, its writer's machine and process, a random part."""
UNOWNED = re.compile(r"\..+\.[0-9a-f]{32}\.tmp|\.(?:partial|storing)-\w{8}")
"""Name of a scratch file or folder that an earlier version wrote: without an owner."""
LONG_AGO = 86400.0
"""Seconds after which the writer of a scratch file on another machine, which can't be asked, counts as dead."""


def owner() -> str:
    """Part of a scratch file's name that says whose it is: this machine, this process, and a random part."""
    return f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def leftover(path: Path) -> bool:
    """Whether a path is a scratch file or folder whose writer is dead; of another machine's, once it is a day old."""
    named = OWNED.fullmatch(path.name)
    if named is None and UNOWNED.fullmatch(path.name) is None:
        return False
    if named is not None and named[1] == _machine():
        return not _alive(int(named[2]))
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > LONG_AGO
    return False


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def remove_all(paths: Iterable[Path]) -> list[Path]:
    """Delete files and folders, and return those that are gone; it is no error if another process was faster."""
    gone = []
    for path in paths:
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            gone.append(path)
    return gone


def discard(folder: Path) -> None:
    """Take a folder out of the way at once, then delete it; who reads its files goes on reading them."""
    aside = folder.with_name(f".{folder.name}.{owner()}.tmp")
    with suppress(OSError):
        folder.rename(aside)
    remove_all([aside])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace `path` atomically by the scratch file beside it that is yielded and must be written.

    Readers, also after a crash, see the old file or the new one. Raises OSError (disk full); `path` is then unchanged.
    """
    # Unique per writer, not per process: two nodes may share a folder and a process id.
    scratch = path.with_name(f".{path.name}.{owner()}.tmp")
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


@contextmanager
def locked_folder(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock on the folder itself, which is made if there is none; nothing in it is touched for that.

    `waiting` is called once if another process has it. On a file system without such locks nothing is locked. Raises
    OSError where the folder can't be made.
    """
    descriptor = _opened(folder)
    try:
        while not _flock(descriptor, folder, waiting):  # it was deleted while this process waited: lock its successor
            os.close(descriptor)
            descriptor = _opened(folder)
        yield
    finally:
        os.close(descriptor)


def remove_unlocked(folder: Path) -> None:
    """Delete an empty folder on which no process holds `locked_folder`. Raises OSError where it isn't deleted."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.rmdir()
    finally:
        os.close(descriptor)


def _opened(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    return os.open(folder, os.O_RDONLY)


def _flock(descriptor: int, folder: Path, waiting: Callable[[], None]) -> bool:
    """Lock an open folder; whether it still is the one that goes by the name `folder`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            log.debug("no lock on %s (%s)", folder, error)
            return True
        waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    return False
