"""Where a run's time goes: phases, marked in the code and read off torch's profiler.

    with phase("moments", tokens, width):
        ...

A mark is a range of torch.profiler's, so it costs microseconds, needs no object handed down, and shows in any trace
made with torch's tools. Its size (what the work is proportional to) is part of its name: `costs.py` turns it into
flops and bytes. With `profile=true` a `Recorder` keeps the marks of the whole run, and every op until the first
block is quantized; recording every op of a run would take gigabytes and slow down the very thing it measures.
"""

import gzip
import json
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch._C._profiler import RecordScope, _ExperimentalConfig
from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler, _enable_profiler, _prepare_profiler
from torch.profiler import ProfilerActivity, record_function

PREFIX = "gptq_awq::"
PHASES = {
    "load": "model, data, texts",
    "embed": "calibration tokens to hidden states",
    "forward": "calibration batches through the blocks",
    "moments": "H and mean abs x of sites' inputs",
    "factor": "inverse Cholesky of H",
    "search": "scales, ranges",
    "solve": "rounding, with error feedback",
    "ledger": "errors and hashes of every linear",
    "score/forward": "evaluation texts to last hidden states",
    "score/head": "last hidden states to logits",
}
OTHER = "other"
TRACE, REPORT = "trace.json.gz", "profile.md"
T = TypeVar("T")


def phase(name: str, *size: int) -> record_function:
    """A mark around one step of a phase, as a context or decorator; `size` is as `costs.py` reads it."""
    return record_function(" ".join((f"{PREFIX}{name}", *map(str, size))))


@dataclass(frozen=True)
class Event:
    """What the profiler saw: `start` and `duration` in ns; `where`, a thread or a GPU's stream."""

    name: str
    start: int
    duration: int
    where: str


@dataclass(frozen=True)
class Span:
    """One marked step: `own`, its seconds without the steps inside of it."""

    phase: str
    size: tuple[int, ...]
    seconds: float
    own: float


@dataclass
class Recorder:
    """Records a run while it is entered; does nothing unless `on`.

    Attributes:
        events: all marks, and all ops of what was watched closely.
        closely_ns: when that began and ended.
    """

    on: bool
    events: list[Event] = field(default_factory=list)
    closely_ns: tuple[int, int] | None = None

    def __enter__(self) -> "Recorder":
        if self.on:
            _start(every_op=False)
        return self

    def __exit__(self, *_error: object) -> None:
        if self.on:
            self.events += _stop()

    def closely(self, steps: Generator[T]) -> Generator[T]:
        """The same steps; until the first is out, every op is recorded. No phase may be open between steps."""
        with closing(steps):
            if self.on:
                yield from self._first(steps)
            yield from steps

    def _first(self, steps: Generator[T]) -> Generator[T]:
        self.events += _stop()
        _start(every_op=True)
        try:
            first = list(islice(steps, 1))
        finally:
            seen = _stop()
            _start(every_op=False)
        self.events += seen
        if seen:
            self.closely_ns = (min(e.start for e in seen), max(e.start + e.duration for e in seen))
        yield from first


def _start(every_op: bool) -> None:
    # torch.profiler.profile records every op or nothing; the functions below it take what to record.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it announces start and stop on stderr
    activities = {ProfilerActivity.CPU}
    if every_op and torch.cuda.is_available():
        activities.add(ProfilerActivity.CUDA)
    config = ProfilerConfig(ProfilerState.KINETO, False, False, False, False, False, _ExperimentalConfig())
    _prepare_profiler(config, activities)
    scopes = set() if every_op else {RecordScope.USER_SCOPE}
    _enable_profiler(config, activities, scopes)  # pyright: ignore[reportCallIssue] (its stub lacks the third)


def _stop() -> list[Event]:
    return [
        Event(e.name(), e.start_ns(), e.duration_ns(), f"{e.device_type().name} {e.device_resource_id()}")
        for e in _disable_profiler().events()
    ]


def spans(events: Iterable[Event]) -> list[Span]:
    """The marked steps, in the order they began.

    Raises:
        ValueError: two steps overlap, and neither is inside of the other.
    """
    marks = [e for e in events if e.name.startswith(PREFIX) and e.where.startswith("CPU")]
    marks.sort(key=lambda e: (e.where, e.start, -e.duration))
    own = [e.duration for e in marks]
    within: list[int] = []  # the steps that are open, outermost first
    for i, mark in enumerate(marks):
        while within and not _reaches(marks[within[-1]], mark):
            within.pop()
        if within:
            outer = marks[within[-1]]
            if mark.start + mark.duration > outer.start + outer.duration:
                raise ValueError(f"{mark.name} begins inside of {outer.name} and ends after it")
            own[within[-1]] -= mark.duration
        within.append(i)
    found = []
    for mark, nanoseconds in zip(marks, own, strict=True):
        name, *size = mark.name.removeprefix(PREFIX).split()
        found.append(Span(name, tuple(map(int, size)), mark.duration / 1e9, nanoseconds / 1e9))
    return found


def _reaches(outer: Event, mark: Event) -> bool:
    return outer.where == mark.where and mark.start < outer.start + outer.duration


@dataclass(frozen=True)
class Cost:
    """What a step takes at the least: operations (a multiplication and an addition are two) and bytes of memory.

    `rate` names the matmul rate that it can reach at most: a dtype.
    """

    flops: float
    bytes: float
    rate: str


@dataclass(frozen=True)
class PhaseTime:
    """All steps of one phase: `seconds` without the phases inside of it; costs where they are known."""

    name: str
    seconds: float
    calls: int
    flops: float = 0.0
    bytes: float = 0.0
    rate: str = ""

    @property
    def flops_per_second(self) -> float:
        """Achieved; 0 where flops are not known."""
        return self.flops / self.seconds if self.seconds else 0.0


def by_phase(steps: Sequence[Span], total: float, cost: Callable[[Span], Cost | None]) -> list[PhaseTime]:
    """The phases as `PHASES` orders them, and last what no mark covers; they add up to `total` seconds."""
    found: dict[str, list[Span]] = {name: [] for name in PHASES}
    for step in steps:
        found.setdefault(step.phase, []).append(step)
    rows = []
    for name, members in found.items():
        costs = [c for c in map(cost, members) if c is not None]
        rate = costs[0].rate if costs else ""
        work = (sum(c.flops for c in costs), sum(c.bytes for c in costs), rate)
        rows.append(PhaseTime(name, sum(step.own for step in members), len(members), *work))
    rows = [row for row in rows if row.calls]
    return [*rows, PhaseTime(OTHER, total - sum(row.seconds for row in rows), 0)]


@dataclass(frozen=True)
class OpTime:
    """All calls of one op: `seconds` without the ops inside of it."""

    name: str
    seconds: float
    calls: int


def by_op(events: Iterable[Event], count: int = 10) -> list[OpTime]:
    """The most expensive ops, on the CPU, and on the GPU where there is one."""
    seen = [e for e in events if not e.name.startswith(PREFIX)]
    seen.sort(key=lambda e: (e.where, e.start, -e.duration))
    own, calls = dict.fromkeys((e.name for e in seen), 0), dict.fromkeys((e.name for e in seen), 0)
    within: list[Event] = []
    for event in seen:
        while within and not _reaches(within[-1], event):
            within.pop()
        if within:
            own[within[-1].name] -= event.duration
        within.append(event)
        own[event.name] += event.duration
        calls[event.name] += 1
    ops = [OpTime(name, nanoseconds / 1e9, calls[name]) for name, nanoseconds in own.items()]
    return sorted(ops, key=lambda op: -op.seconds)[:count]


def write_trace(path: Path, events: Iterable[Event]) -> None:
    """The events in Chrome's trace format, which Perfetto opens."""
    threads: dict[str, int] = {}
    lines = []
    for e in sorted(events, key=lambda e: e.start):
        place = {"pid": 1, "tid": threads.setdefault(e.where, len(threads) + 1)}
        kind = "phase" if e.name.startswith(PREFIX) else "op"
        times = {"ts": e.start / 1000, "dur": e.duration / 1000}
        lines.append({"ph": "X", "name": e.name.removeprefix(PREFIX), "cat": kind} | times | place)
    names = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": where}}
        for where, tid in threads.items()
    ]
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=5) as file:
        json.dump({"traceEvents": names + lines, "displayTimeUnit": "ms"}, file)
