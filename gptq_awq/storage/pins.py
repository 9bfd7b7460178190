"""Pins: entries of the cache that a live process goes on reading, and that no other may delete meanwhile.

A pin is a locked file in the hidden folder `.pins/NAME` beside the entry NAME. The system releases the lock of a
process that dies, so a pin without its lock is stale.
"""

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import filelock

from gptq_awq.storage.atomic import locked


@contextmanager
def pinned(*entries: Path) -> Iterator[None]:
    """Context in which no other process prunes or clears the entries, whether or not they exist yet."""
    with ExitStack() as stack:
        for entry in entries:
            stack.enter_context(_pinned(entry))
        yield


def delete_unpinned(entry: Path, delete: Callable[[], None]) -> bool:
    """Call `delete` unless a live process has pinned the entry; returns whether it was called."""
    pins = _pins(entry)
    with locked(_guard(entry)):
        if pins.is_dir() and any(_held(pin) for pin in pins.iterdir()):
            return False
        delete()
        shutil.rmtree(pins, ignore_errors=True)
    return True


@contextmanager
def _pinned(entry: Path) -> Iterator[None]:
    pin = _pins(entry) / uuid.uuid4().hex
    with ExitStack() as stack:
        with locked(_guard(entry)):
            stack.enter_context(locked(pin))
        try:
            yield
        finally:
            stack.close()
            with suppress(OSError):
                pin.unlink()
            with suppress(OSError):  # other pins are in it
                pin.parent.rmdir()


def _held(pin: Path) -> bool:
    """Whether a live process holds the pin; on a file system without locks every pin counts as held."""
    lock = filelock.FileLock(pin)
    try:
        lock.acquire(timeout=0)
    except (filelock.Timeout, OSError, NotImplementedError):
        return True
    lock.release()
    return False


def _pins(entry: Path) -> Path:
    return entry.parent / ".pins" / entry.name


def _guard(entry: Path) -> Path:
    """Path of the lock under which pins are made, and entries deleted: nobody is between looking and deleting."""
    return entry.parent / ".pins" / ".guard"
