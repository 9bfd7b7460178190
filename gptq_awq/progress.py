"""Progress reporting without a progress bar in library code.

Long loops take a `Track`: a function that wraps an iterable and may report on it. The command line passes
`rich_track`; a library caller who passes nothing gets silence.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
Track = Callable[[Iterable[T], str, int], Iterable[T]]
"""`track(iterable, description, total)` yields the iterable's items."""


def no_track(items: Iterable[T], description: str, total: int) -> Iterable[T]:  # noqa: ARG001
    """Report nothing."""
    return items


@contextmanager
def rich_track(console: Console) -> Iterator[Track]:
    """A `Track` that draws one bar per phase, with elapsed and remaining time, on `console`."""
    columns = (
        TextColumn("{task.description}", justify="left"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def track(items: Iterable[T], description: str, total: int) -> Iterable[T]:
            return progress.track(items, total=total, description=description)

        yield track
