"""Programs in processes of their own that begin with everything imported: they are forked off one that has done so.

Importing torch and transformers takes longer than most of what the tests ask these programs for.
"""

import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

import helpers.auto_dtype  # noqa: F401  (in the forked process, which imports this module, too)
from helpers.paths import ROOT

RUN = ROOT / "run.py"
FORKS = multiprocessing.get_context("forkserver")


def import_everything() -> None:
    """Begin to, in the process that programs are forked off; to the libraries imported there the hub is unreachable."""
    FORKS.set_forkserver_preload(["gptq_awq.experiment.run", "helpers.warm"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        forkserver.ensure_running()


@dataclass
class Forked:
    """A program that was started: `subprocess.Popen` as far as tests need it, of what prints into files."""

    arguments: Sequence[str]
    process: BaseProcess
    printed: Path

    @property
    def returncode(self) -> int | None:
        """Exit code, -9 for SIGKILL; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """Exit code; None while it runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.process.kill()

    def wait(self, timeout: float) -> None:
        """Wait for its end. Raises subprocess.TimeoutExpired, once it is killed."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise subprocess.TimeoutExpired(list(self.arguments), timeout)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Output, once the program has ended; the second time nothing."""
        self.wait(timeout)
        if not self.printed.is_dir():
            return "", ""
        out, err = ((self.printed / name).read_text() for name in ("stdout", "stderr"))
        shutil.rmtree(self.printed)
        return out, err


def fork(program: Path | str, arguments: Sequence[object], environment: Mapping[str, str], folder: Path) -> Forked:
    """Start `python PROGRAM ARGUMENTS` in a folder; a program that is no path is a module, as after `python -m`."""
    words = [str(argument) for argument in arguments]
    printed = Path(tempfile.mkdtemp(prefix="printed-"))
    for name in ("stdout", "stderr"):
        (printed / name).touch()
    process = FORKS.Process(target=_run, args=(program, words, dict(environment), folder, printed))
    process.start()
    return Forked(words, process, printed)


def call(
    program: Path | str,
    arguments: Sequence[object],
    environment: Mapping[str, str],
    folder: Path,
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """`python PROGRAM ARGUMENTS` in a folder: exit code and what was printed.

    Raises:
        subprocess.TimeoutExpired: it is still running; it is killed.
    """
    forked = fork(program, arguments, environment, folder)
    out, err = forked.communicate(timeout)
    return subprocess.CompletedProcess(forked.arguments, forked.returncode or 0, out, err)


def call_run(
    arguments: Sequence[object], environment: Mapping[str, str], folder: Path, timeout: float = 300
) -> subprocess.CompletedProcess:
    """`python run.py ARGUMENTS` in a folder: see `call`."""
    if any("launcher" in str(argument) for argument in arguments):  # workers of joblib outlive a fork that ends
        command = [sys.executable, str(RUN), *map(str, arguments)]
        ways = {"capture_output": True, "text": True, "check": False, "timeout": timeout}
        return subprocess.run(command, env=environment, cwd=folder, **ways)
    return call(RUN, arguments, environment, folder, timeout)


def _run(program, arguments, environment, folder, printed) -> None:
    for stream, name in zip((1, 2), ("stdout", "stderr"), strict=True):
        os.dup2(os.open(printed / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [str(program), *arguments]
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
