"""Progress of a sweep: one line per run, how many are left and about how long they will take, and what failed.

    3/12  awq 3 bits     wikitext2/kl 0.6667   1 min 12 s   about 14 min left

Runs of a sweep may be in one process, in several or on several nodes, so what ended is kept in the sweep's folder, a
line per run. Runs that were finished before are counted at the end and have no line of their own.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from gptq_awq.results import Result

STATE, ENDED = ".sweep.json", ".sweep.jsonl"
IN_LABEL = ("method", "grid", "bits", "model", "experiment")
"""Options that a label has in words of its own."""


@dataclass(frozen=True)
class Sweep:
    """A sweep that is under way.

    Attributes:
        folder: of the sweep.
        total: number of its runs; None where it isn't known before.
        varies: names of the options that differ among its runs.
        started: when it began, in seconds since the epoch.
    """

    folder: Path
    total: int | None
    varies: tuple[str, ...]
    started: float

    @classmethod
    def begin(cls, config: DictConfig) -> Self:
        """Begin a sweep: count its runs, and forget what an earlier one in this folder has noted. Raises OSError."""
        folder = Path(config.hydra.sweep.dir)
        total, varies = count_runs(config)
        sweep = cls(folder, total, tuple(varies), time.time())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ENDED).write_text("")
        (folder / STATE).write_text(json.dumps({"total": total, "varies": varies, "started": sweep.started}))
        return sweep

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The sweep in a folder, as `begin` noted it; one of unknown length where it didn't."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            noted = json.loads((folder / STATE).read_text())
            return cls(folder, noted["total"], tuple(noted["varies"]), noted["started"])
        return cls(folder, None, (), time.time())

    def ended(self) -> "list[Ended]":
        """The runs that have ended so far."""
        found = []
        with suppress(OSError):
            for line in (self.folder / ENDED).read_text().splitlines():
                with suppress(ValueError, TypeError):
                    found.append(Ended(**json.loads(line)))
        return found

    def note(self, run: "Ended") -> None:
        """Note that a run has ended; a disk that is full keeps nobody from going on."""
        with suppress(OSError):
            descriptor = os.open(self.folder / ENDED, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps(asdict(run)) + "\n")

    def line(self, run: "Ended") -> str:
        """The line that tells of a run that has just ended and been noted."""
        ended = self.ended()
        parts = [f"{len(ended)}/{self.total or '?'}", run.label, run.told, duration(run.seconds)]
        left = self.seconds_left(ended, time.time())
        return "  ".join([*(part for part in parts if part), *([f"about {duration(left)} left"] if left else [])])

    def seconds_left(self, ended: "Sequence[Ended]", now: float) -> float | None:
        """Seconds that the runs to come will take, as those before did; None where nothing can be said."""
        computed = [run for run in ended if run.state != "taken over"]
        if self.total is None or not computed or len(ended) >= self.total:
            return None
        return (now - self.started) / len(computed) * (self.total - len(ended))


@dataclass(frozen=True)
class Ended:
    """A run of a sweep that has ended.

    Attributes:
        number: within the sweep.
        label: what tells it apart.
        state: whether it was computed, taken over from an earlier sweep, or failed.
        seconds: that it took.
        told: a metric, or why it failed.
        log: file that says more, of a failed one.
    """

    number: int
    label: str
    state: Literal["done", "taken over", "failed"]
    seconds: float
    told: str = ""
    log: str | None = None


def count_runs(config: DictConfig) -> tuple[int | None, list[str]]:
    """Number of runs of a sweep, None where the sweeper decides as it goes; and the options that differ among them."""
    sweeper = config.hydra.sweeper
    params = dict(sweeper.get("params") or {}) if isinstance(sweeper.get("params"), Mapping) else {}
    given = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    total, varies = 1, []
    for override in OverridesParser.create().parse_overrides([str(each) for each in given]):
        if override.is_sweep_override():
            varies.append(override.get_key_element())
            total *= sum(1 for _ in override.sweep_string_iterator()) if override.is_discrete_sweep() else 1
    trials = sweeper.get("n_trials")
    return (trials if isinstance(trials, int) else total), varies


def label_of(method: str, grid: str | None, bits: float | None, model: str | None, varies: Sequence[str] = ()) -> str:
    """Label that tells a run of a sweep apart: `awq 3 bits damping=0.1`."""
    words = [model] if model and any(key.partition(".")[0] in ("model", "model.path") for key in varies) else []
    words += [method, *([grid] if grid not in (None, "int") else [])]
    words += [f"{bits:g} bits"] if bits is not None and grid in (None, "int") else []
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    pairs = [override.lstrip("+").partition("=") for override in given]
    words += [f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs if key in varies and key not in IN_LABEL]
    return " ".join(words)


def tell_done(result: Result, folder: Path, number: int, taken: bool, seconds: float) -> None:
    """Note a run that is done, and print its line; one that was taken over has none."""
    sweep = Sweep.read(folder)
    label = label_of(result.method, result.grid, result.bits, result.model, sweep.varies)
    run = Ended(number, label, "taken over" if taken else "done", round(seconds, 1), told_metric(result.metrics))
    sweep.note(run)
    if not taken:
        sys.stderr.write(f"{sweep.line(run)}\n")


def tell_failed(config: Any, folder: Path, number: int, reason: str, log: Path | None) -> None:
    """Note a run that failed, and print its line."""
    sweep = Sweep.read(folder)
    grid = config["grid"] if isinstance(config["grid"], Mapping) else {}
    kind, model = grid.get("label") or grid.get("name"), config["model"]
    bits = config["bits"] if isinstance(config["bits"], int | float) else None
    name = (model.get("name") or Path(str(model.get("path") or model.get("id") or "")).name) or None
    label = label_of(config["method"]["name"], kind, bits, name, sweep.varies)
    run = Ended(number, label, "failed", 0.0, f"error: {reason}", None if log is None else str(log))
    sweep.note(run)
    sys.stderr.write(f"{sweep.line(run)}\n")


def told_metric(metrics: Mapping[str, Any]) -> str:
    """The metric of a run that says most in one word: the first KL, else the first perplexity."""
    for part in ("/kl", "/ppl@"):
        for name, value in metrics.items():
            if part in name and "/" not in name.partition(part)[2] and isinstance(value, int | float):
                return f"{name} {value:#.4g}"
    return ""


def duration(seconds: float) -> str:
    """Seconds in words: `52 s`, `14 min`, `2 h 5 min`; empty for none."""
    if not seconds or not math.isfinite(seconds):
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
