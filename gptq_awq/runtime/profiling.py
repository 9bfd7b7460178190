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
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from rich import box
from rich.table import Table
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
    again: bool
    """Inside of a step of the same phase."""


@dataclass
class Recorder:
    """Records a run while it is entered; does nothing unless `on`.

    Attributes:
        events: all marks, and all ops of what was watched closely.
        seconds: wall time that was recorded, without what recording itself took between its parts.
        close_seconds: wall time that was watched closely.
        profile: what became of it, see `costs.profiled`.
    """

    on: bool
    events: list[Event] = field(default_factory=list)
    seconds: float = 0.0
    close_seconds: float = 0.0
    profile: "Profile | None" = None
    _started: float | None = None

    def __enter__(self) -> "Recorder":
        if self.on:
            self._start(every_op=False)
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End recording, if it goes on."""
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None
            self.events += _stop()

    def _start(self, every_op: bool) -> None:
        _start(every_op)
        self._started = time.perf_counter()

    def closely(self, steps: Generator[T]) -> Generator[T]:
        """The same steps; until the first is out, every op is recorded. No phase may be open between steps."""
        with closing(steps):
            if self.on:
                yield from self._first(steps)
            yield from steps

    def _first(self, steps: Generator[T]) -> Generator[T]:
        self.stop()
        before = self.seconds
        self._start(every_op=True)
        first = list(islice(steps, 1))
        self.stop()
        self.close_seconds = self.seconds - before
        self._start(every_op=False)
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
    own, again = [e.duration for e in marks], [False for _ in marks]
    within: list[int] = []  # the steps that are open, outermost first
    for i, mark in enumerate(marks):
        while within and not _reaches(marks[within[-1]], mark):
            within.pop()
        if within:
            outer = marks[within[-1]]
            if mark.start + mark.duration > outer.start + outer.duration:
                raise ValueError(f"{mark.name} begins inside of {outer.name} and ends after it")
            own[within[-1]] -= mark.duration
            again[i] = _phase(mark) == _phase(outer)
        within.append(i)
    found = []
    for mark, nanoseconds, inner in zip(marks, own, again, strict=True):
        size = tuple(map(int, mark.name.split()[1:]))
        found.append(Span(_phase(mark), size, mark.duration / 1e9, nanoseconds / 1e9, inner))
    return found


def _phase(mark: Event) -> str:
    return mark.name.removeprefix(PREFIX).split()[0]


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
        rows.append(PhaseTime(name, sum(step.own for step in members), sum(not step.again for step in members), *work))
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


@dataclass(frozen=True)
class Profile:
    """Where a run's time went.

    Attributes:
        seconds: all of it.
        phases: its parts.
        rates: operations per second of a matmul, measured on this machine, by dtype.
        ops: the most expensive ones of `close_seconds`, in which every op was recorded.
        machine: one line.
        events: for the trace.
    """

    seconds: float
    phases: Sequence[PhaseTime]
    rates: Mapping[str, float]
    ops: Sequence[OpTime]
    close_seconds: float
    machine: str
    events: Sequence[Event] = field(repr=False)

    def rows(self) -> list[tuple[str, ...]]:
        """The table of phases: a header, then text cells."""
        head = ("phase", "seconds", "share", "calls", "GFLOP", "GFLOP/s", "of the matmul rate", "GB", "what it is")
        return [head, *(self._row(phase) for phase in self.phases), ("all", f"{self.seconds:.2f}", "100%", *6 * [""])]

    def _row(self, phase: PhaseTime) -> tuple[str, ...]:
        share, calls = f"{phase.seconds / self.seconds:.1%}", str(phase.calls or "")
        work = ("", "", "", "")
        if phase.flops and phase.seconds > 0:
            speed, rate = phase.flops / phase.seconds, self.rates[phase.rate]
            known = (f"{phase.flops / 1e9:.1f}", f"{speed / 1e9:.1f}", f"{speed / rate:.0%} {phase.rate}")
            work = (*known, f"{phase.bytes / 1e9:.2f}")
        return (phase.name, f"{phase.seconds:.2f}", share, calls, *work, PHASES.get(phase.name, "what no mark covers"))

    def table(self) -> Table:
        """For the terminal: phases, seconds, shares."""
        head, *rows = self.rows()
        table = Table(title="where the time went", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        for i, name in enumerate(head[:-2]):
            table.add_column(name, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row[:-2])
        return table

    def markdown(self, run: str) -> str:
        """The page: phases, rates, ops; `run` is the run's hash."""
        rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in self.rates.items())
        ops = [("op", "seconds", "share", "calls")]
        ops += [(o.name, f"{o.seconds:.3f}", f"{o.seconds / self.close_seconds:.1%}", str(o.calls)) for o in self.ops]
        return f"""# Where the time went

Run {run[:12]}, {self.seconds:.1f} s of wall time, from loading to storing. {self.machine}.

{markdown_table(self.rows())}

Seconds are a phase's own, without the phases inside of it. GFLOP and GB are what the phase takes at the least (see
docs/profiling.md). A matmul of the model's largest linear reaches {rates} here.

## The most expensive ops

Of {self.close_seconds:.1f} s, from the start of quantization until the first block was out; seconds are an op's own.

{markdown_table(ops)}
"""

    def write(self, out: Path, run: str) -> None:
        """Write the page and the trace into a folder. Raises OSError."""
        (out / REPORT).write_text(self.markdown(run))
        write_trace(out / TRACE, self.events)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table in markdown, the first one its head; all but the first and a last text are right."""
    head, *rest = rows
    align = [":---" if i == 0 or name == "what it is" else "---:" for i, name in enumerate(head)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, align, *rest))
