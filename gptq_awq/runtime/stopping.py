"""Being stopped: SIGTERM (Slurm's preemption) and SIGINT (Ctrl-C) end a command in one line, not in a traceback."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(KeyboardInterrupt):
    """Raised in the main thread by a signal, as Python does for SIGINT: no library takes it for an error of its own.

    Attributes:
        exit_code: 128 + the signal's number: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Within: the first SIGTERM or SIGINT raises `StoppedError`; a second Ctrl-C ends a clean-up that takes too long.

    A signal that this process was started to ignore (a background job's SIGINT) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise StoppedError(number)

    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)


def end(error: KeyboardInterrupt, kept: str) -> NoReturn:
    """Say in one line that the command was stopped and what is kept, and exit as a stopped process does."""
    sys.stderr.write(f"\nstopped: {kept}\n" if sys.stderr.isatty() else f"stopped: {kept}\n")
    sys.exit(error.exit_code if isinstance(error, StoppedError) else 128 + signal.SIGINT)
