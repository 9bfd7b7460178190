"""The log of a run, and the wall time of its phases."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from rich.console import Console
from rich.logging import RichHandler


@dataclass
class Clock:
    """Wall time of a run's phases, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)
    _started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body of the `with` statement as phase `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)

    def total(self) -> dict[str, float]:
        """Seconds of all phases so far, and as `total` those since the clock was made."""
        return self.seconds | {"total": round(time.perf_counter() - self._started, 3)}


@contextmanager
def logging_to(out: Path, console: Console, rank: int = 0) -> Iterator[None]:
    """Log this package's warnings to the terminal, and everything to OUT/run.log (ranks above 0: OUT/run.RANK.log)."""
    root = logging.getLogger("gptq_awq")
    to_file = logging.FileHandler(out / (f"run.{rank}.log" if rank else "run.log"), mode="w")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_terminal = RichHandler(logging.WARNING, console=console, show_path=False, show_time=False)
    root.setLevel(logging.DEBUG)
    for handler in (to_file, to_terminal):
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in (to_file, to_terminal):
            root.removeHandler(handler)
            handler.close()


def remove_unused_hydra_folder(out: Path) -> None:
    """Delete the folder that Hydra made for this run, which stays empty where `out` is another one."""
    if HydraConfig.initialized():
        folder = Path(HydraConfig.get().runtime.output_dir)
        if folder.resolve() != out.resolve():
            remove_empty_folder(folder)


def remove_empty_folder(folder: Path) -> None:
    """Delete a folder that Hydra made, and the two above it (outputs/DATE/TIME), as far as they are empty."""
    with suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()
        folder.parent.parent.rmdir()
