"""Progress reporting that keeps progress bars out of library code.

Long loops take a `Track`: a function that wraps an iterable and may report on it. The command line passes what
`rich_track` yields; the default, `no_track`, reports nothing.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
Track = Callable[[Iterable[T], str, int], Iterable[T]]
"""`track(iterable, description, total)` yields the iterable's items."""


def no_track(items: Iterable[T], description: str, total: int) -> Iterable[T]:  # noqa: ARG001
    """A `Track` that reports nothing."""
    return items


@contextmanager
def rich_track(console: Console, brief: bool = False) -> Iterator[Track]:
    """A `Track` that reports each phase on `console`, with elapsed and remaining time.

    On a terminal, or in a notebook with ipywidgets: one bar per phase, and a bar for a loop inside it while that runs.
    Elsewhere (a CI log, a file): a line when a phase ends and one each half minute before that; nothing for
    inner loops. `brief`: bars are gone when all is done, and a phase that took less than half a minute has no line.
    """
    bars = find_spec("ipywidgets") is not None if console.is_jupyter else console.is_interactive
    if not bars:
        yield line_track(console, brief=brief)
        return
    columns = (
        TextColumn("{task.description}", justify="left", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # The remaining time is estimated from all steps: rich's default window of 30 s is shorter than one large block.
    with Progress(*columns, console=console, speed_estimate_period=math.inf, transient=brief) as progress:
        yield _bar_track(progress)


def line_track(
    console: Console, every: float = 30.0, clock: Callable[[], float] = time.monotonic, brief: bool = False
) -> Track:
    """A `Track` that prints plain lines: when a phase ends, and every `every` seconds of `clock` until then.

    `brief`: the end of a phase that was not spoken of before isn't, either.
    """
    open_phases: list[str] = []

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    def track(items: Iterable[T], description: str, total: int) -> Iterable[T]:
        if open_phases:
            yield from items
            return
        open_phases.append(description)
        start = last = clock()
        done = 0
        try:
            for item in items:
                yield item
                done += 1
                now = clock()
                if now - last >= every and done < total:
                    left = (now - start) / done * (total - done)
                    say(f"{description}: {done}/{total} after {now - start:.0f} s, about {left:.0f} s left")
                    last = now
        finally:  # also where the loop is left early: the log says how far it came
            open_phases.remove(description)
            if not brief or last > start:
                say(f"{description}: {done}/{total} in {clock() - start:.1f} s")

    return track


def _bar_track(progress: Progress) -> Track:
    def track(items: Iterable[T], description: str, total: int) -> Iterable[T]:
        inner = any(not task.finished and task.stop_time is None for task in progress.tasks)
        bar = progress.add_task(description, total=total)
        try:
            for item in items:
                yield item
                progress.advance(bar)
        finally:
            progress.stop_task(bar)  # a loop left early must not seem to run on
            if inner:  # a model has dozens of blocks: bars of their inner loops would fill the screen
                progress.remove_task(bar)

    return track
