"""Where a run's time goes: phases, marked in the code and timed by torch's profiler.

    with phase("moments", tokens, width):
        ...

A mark is a range of torch.profiler's, so it costs microseconds, needs no object handed down, and shows in any trace
made with torch's tools. Its size (the numbers that its work is proportional to) is part of its name, from which
benchmarks/roofline.py counts operations. A `Recorder` keeps marks alone: every op of a run would take gigabytes, and
slow down the very thing that is measured.
"""

import gzip
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import RecordScope, _ExperimentalConfig
from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler, _enable_profiler, _prepare_profiler
from torch.profiler import ProfilerActivity, record_function

PREFIX = "gptq_awq::"
PHASES = {
    "load": "model, data, texts",
    "rotate": "the whole model into another basis",
    "embed": "calibration tokens to hidden states",
    "sites": "which linears share an input, what may absorb a scale",
    "forward": "calibration batches through the blocks",
    "moments": "H and mean abs x of sites' inputs",
    "factor": "inverse Cholesky of H",
    "search": "scales, ranges",
    "solve": "rounding, with error feedback",
    "tune": "gradients: codes, scales, norms",
    "ledger": "errors and hashes of every linear",
    "disk": "finished blocks, recorded moments",
    "score/forward": "evaluation texts to last hidden states",
    "score/head": "last hidden states to logits",
    "score/losses": "logits to losses, KL, agreement",
}
OTHER = "other"
TRACE, REPORT = "trace.json.gz", "profile.md"


def phase(name: str, *size: int) -> record_function:
    """Mark one step of a phase, as a context or decorator; `size` is what its work is proportional to."""
    return record_function(" ".join((f"{PREFIX}{name}", *map(str, size))))


@dataclass(frozen=True)
class Event:
    """A range that the profiler saw on one thread; `start` and `duration` in ns."""

    name: str
    start: int
    duration: int
    thread: int

    @property
    def end(self) -> int:
        """The first nanosecond after it."""
        return self.start + self.duration


@dataclass(frozen=True)
class Span:
    """One marked step: `own` seconds, without those of steps inside of it.

    `nested` where it is directly inside of a step of its own phase.
    """

    phase: str
    size: tuple[int, ...]
    own: float
    nested: bool = False


def spans(events: Iterable[Event]) -> list[Span]:
    """The marked steps, in the order they began.

    Raises:
        ValueError: two steps overlap, and neither is inside of the other.
    """
    marks = sorted((e for e in events if e.name.startswith(PREFIX)), key=lambda e: (e.thread, e.start, -e.duration))
    own, nested = [mark.duration for mark in marks], [False for _ in marks]
    open_: list[int] = []  # outermost first
    for i, mark in enumerate(marks):
        while open_ and (marks[open_[-1]].thread != mark.thread or marks[open_[-1]].end <= mark.start):
            open_.pop()
        if open_:
            outer = marks[open_[-1]]
            if mark.end > outer.end:
                raise ValueError(f"{mark.name} begins inside of {outer.name} and ends after it")
            own[open_[-1]] -= mark.duration
            nested[i] = _parsed(mark)[0] == _parsed(outer)[0]
        open_.append(i)
    return [Span(*_parsed(m), own=ns / 1e9, nested=n) for m, ns, n in zip(marks, own, nested, strict=True)]


def _parsed(mark: Event) -> tuple[str, tuple[int, ...]]:
    """Phase and size in a mark's name."""
    name, *size = mark.name.removeprefix(PREFIX).split()
    return name, tuple(map(int, size))


@dataclass(frozen=True)
class PhaseTime:
    """All steps of one phase: `seconds` without the phases inside of it."""

    name: str
    seconds: float
    calls: int


def by_phase(steps: Iterable[Span], total: float) -> list[PhaseTime]:
    """The phases as `PHASES` orders them, and last the time that no mark covers; they add up to `total` seconds."""
    found: dict[str, list[Span]] = {name: [] for name in PHASES}
    for step in steps:
        found.setdefault(step.phase, []).append(step)
    rows = [
        PhaseTime(name, sum(step.own for step in members), sum(not step.nested for step in members))
        for name, members in found.items()
        if members
    ]
    return [*rows, PhaseTime(OTHER, total - sum(row.seconds for row in rows), 0)]


class Recorder:
    """Records the phases of a run while it is entered; does nothing unless `on`."""

    def __init__(self, on: bool) -> None:
        self.on, self.seconds, self._started = on, 0.0, 0.0
        self._recorded: Any = None

    def __enter__(self) -> "Recorder":
        if self.on:
            _enable()
            self._started = time.perf_counter()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End recording, if it goes on."""
        if self.on and self._recorded is None:
            self.seconds = time.perf_counter() - self._started
            self._recorded = _disable_profiler()

    @cached_property
    def spans(self) -> list[Span]:
        """All marked steps, once recording has ended."""
        found = self._recorded.events() if self._recorded else ()
        return spans(Event(e.name(), e.start_ns(), e.duration_ns(), e.start_thread_id()) for e in found)

    @property
    def phases(self) -> list[PhaseTime]:
        """Seconds by phase."""
        return by_phase(self.spans, self.seconds)

    def write(self, out: Path, run: str, device: torch.device) -> None:
        """Write the table of phases and torch's trace into a folder; `run` is the run's hash. Raises OSError."""
        self.stop()
        (out / REPORT).write_text(page(self.phases, run, device))
        with tempfile.TemporaryDirectory(dir=out, prefix=".trace-") as scratch:
            self._recorded.save(str(trace := Path(scratch) / "trace.json"))
            (out / TRACE).write_bytes(gzip.compress(trace.read_bytes(), compresslevel=5))


def _enable() -> None:
    # torch.profiler.profile records every op or nothing; the functions below it take what to record.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it announces start and stop on stderr
    config = ProfilerConfig(ProfilerState.KINETO, False, False, False, False, False, _ExperimentalConfig())
    _prepare_profiler(config, {ProfilerActivity.CPU})
    scopes = {RecordScope.USER_SCOPE}
    _enable_profiler(config, {ProfilerActivity.CPU}, scopes)  # pyright: ignore[reportCallIssue] (stub lacks the third)


def page(phases: Sequence[PhaseTime], run: str, device: torch.device) -> str:
    """Table of phases as a page in markdown; `run` is the run's hash."""
    total = sum(phase.seconds for phase in phases)
    table: list[tuple[str, ...]] = [("phase", "seconds", "share", "calls", "what it is")]
    for phase in phases:
        cells = phase.name, f"{phase.seconds:.2f}", f"{phase.seconds / total:.1%}", str(phase.calls or "")
        table.append((*cells, PHASES.get(phase.name, "what no mark covers")))
    table.append(("all", f"{total:.2f}", "100%", "", ""))
    return f"""# Where the time went

Run {run[:12]}, wall time from loading to storing. {machine(device)}.

{markdown_table(table)}

Seconds are a phase's own, without the phases inside of it.
"""


def machine(device: torch.device) -> str:
    """The machine in one line: version of torch, processor, threads."""
    name = torch.cpu.get_capabilities().get("cpu_name")
    if device.type == "cuda":
        waits = os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
        name = torch.cuda.get_device_name(device) + ("" if waits else " (phases end when their work is queued)")
    return f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table in markdown, the first one its head; all but the first and a last text are right."""
    head, *rest = rows
    align = [":---" if i == 0 or name == "what it is" else "---:" for i, name in enumerate(head)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, align, *rest))
