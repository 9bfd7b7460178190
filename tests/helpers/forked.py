"""run.py in a process of its own that begins with everything imported: it is forked off one that has done so.

Importing torch and transformers takes longer than most of the runs that the tests ask for.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from multiprocessing import forkserver

import pytest

import helpers.auto_dtype  # noqa: F401  (in the forked process, which imports this module, too)
from helpers.paths import ROOT

RUN = ROOT / "run.py"
FORKS = multiprocessing.get_context("forkserver")


def import_everything() -> None:
    """Begin to, in the process that runs are forked off; to the libraries imported there the hub is unreachable."""
    FORKS.set_forkserver_preload(["gptq_awq.experiment.run"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        forkserver.ensure_running()


def call_run(arguments, environment, folder, timeout=300) -> subprocess.CompletedProcess:
    """`python run.py ARGUMENTS` in a folder: exit code and what was printed.

    Raises:
        subprocess.TimeoutExpired: it is still running; it is killed.
    """
    if any("launcher" in argument for argument in arguments):  # workers of joblib outlive a fork that ends
        command = [sys.executable, str(RUN), *arguments]
        ways = {"capture_output": True, "text": True, "check": False, "timeout": timeout}
        return subprocess.run(command, env=environment, cwd=folder, **ways)
    printed = [folder / ".stdout", folder / ".stderr"]
    process = FORKS.Process(target=_run, args=(arguments, environment, folder, printed))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise subprocess.TimeoutExpired(arguments, timeout)
    out, err = (path.read_text() for path in printed)
    for path in printed:
        path.unlink()
    return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def _run(arguments, environment, folder, printed) -> None:
    for stream, path in zip((1, 2), printed, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [str(RUN), *arguments]
    runpy.run_path(str(RUN), run_name="__main__")
