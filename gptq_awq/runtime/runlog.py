"""The log of a run, and the wall time of its phases."""

import logging
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.logging import RichHandler

LOG = "run.log"


@dataclass
class Clock:
    """Wall time of a run's phases, in seconds.

    What kernels take to be compiled, which happens when one is first called on a machine, is in no phase but in
    "compile": else the first run would seem slower than the others.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    compiled: Callable[[], float] = field(default_factory=lambda: compile_seconds())
    _started: float = field(default_factory=time.perf_counter)
    _compiled_before: float = field(init=False)

    def __post_init__(self) -> None:
        self._compiled_before = self.compiled()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body of the `with` statement as phase `name`."""
        start, compiled = time.perf_counter(), self.compiled()
        yield
        compiling = self.compiled() - compiled
        self.seconds[name] = round(time.perf_counter() - start - compiling, 3)

    def total(self) -> dict[str, float]:
        """Seconds of all phases so far, "compile" among them, and as `total` those since the clock was made."""
        compiling = {"compile": round(self.compiled() - self._compiled_before, 3)}
        return self.seconds | compiling | {"total": round(time.perf_counter() - self._started, 3)}


def compile_seconds() -> Callable[[], float]:
    """Make a function that returns the seconds that numba has spent on compiling since now, in this process."""
    from numba.core import event  # half a second, which a refused command need not spend

    listener = event.TimingListener()
    event.register("numba:compile", listener)

    def seconds() -> float:
        return listener.duration if listener.done else 0.0

    weakref.finalize(seconds, event.unregister, "numba:compile", listener)
    return seconds


class RunLog:
    """Log of this package: warnings go to the terminal, and everything to OUT/run.log once `open` says so.

    Until then, records wait in memory: a folder is touched only when the run has it for itself, and a run that is
    refused leaves none. What earlier runs logged there stays.
    """

    def __init__(self, console: Console) -> None:
        self._waiting = MemoryHandler(capacity=10**6, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._terminal = RichHandler(logging.WARNING, console=console, show_path=False, show_time=False)
        self._file: logging.FileHandler | None = None

    def __enter__(self) -> Self:
        root = logging.getLogger("gptq_awq")
        root.setLevel(logging.DEBUG)
        for handler in (self._waiting, self._terminal):
            root.addHandler(handler)
        return self

    def open(self, out: Path, rank: int = 0) -> None:
        """Append to OUT/run.log (ranks above 0: OUT/run.RANK.log) from now on, what has waited first.

        Raises OSError.
        """
        if self._file is not None:
            return
        self._file = _QuietFileHandler(out / (f"run.{rank}.log" if rank else LOG))
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._waiting.setTarget(self._file)
        self._waiting.flush()
        root = logging.getLogger("gptq_awq")
        root.removeHandler(self._waiting)
        root.addHandler(self._file)

    def __exit__(self, *_: object) -> None:
        root = logging.getLogger("gptq_awq")
        for handler in (self._waiting, self._terminal, self._file):
            if handler is not None:
                root.removeHandler(handler)
                handler.close()


class _QuietFileHandler(logging.FileHandler):
    """A file handler for disks that may be full: a line that can't be written is lost, and no traceback printed."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by logging."""
