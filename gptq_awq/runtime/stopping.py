"""Being stopped: SIGTERM (Slurm's preemption) and SIGINT (Ctrl-C) end a command in one line, not in a traceback."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGAIN_SECONDS = 0.05


class StoppedError(KeyboardInterrupt):
    """Raised in the main thread by a signal, as Python does for SIGINT: no library takes it for an error of its own.

    Attributes:
        number: the signal's number.
        exit_code: 128 + that number: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.exit_code = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Within: the first SIGTERM or SIGINT raises `StoppedError`; a second Ctrl-C ends a clean-up that takes too long.

    A signal that this process was started to ignore (a background job's SIGINT) stays ignored. One that comes while a
    destructor runs, out of which Python lets no exception, is raised again a moment later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise StoppedError(number)

    def not_lost(unraisable: Any) -> None:
        if not isinstance(error := unraisable.exc_value, StoppedError):
            hook_before(unraisable)
            return
        signal.signal(error.number, stop)
        threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), error.number)).start()

    hook_before, sys.unraisablehook = sys.unraisablehook, not_lost
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        sys.unraisablehook = hook_before
        for number, handler in before.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)


def end(error: KeyboardInterrupt, kept: str) -> NoReturn:
    """Say in one line that the command was stopped and what is kept, and exit as a stopped process does."""
    sys.stderr.write(f"\nstopped: {kept}\n" if sys.stderr.isatty() else f"stopped: {kept}\n")
    sys.exit(error.exit_code if isinstance(error, StoppedError) else 128 + signal.SIGINT)
