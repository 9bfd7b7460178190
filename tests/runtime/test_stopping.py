"""Laws of being stopped, of the log, the clock and the provenance of a run."""

import logging
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from io import StringIO

import numba
import pytest
from helpers.paths import ROOT
from rich.console import Console

from gptq_awq import __version__
from gptq_awq.runtime.provenance import git_state, provenance
from gptq_awq.runtime.runlog import LOG, Clock, RunLog
from gptq_awq.runtime.stopping import StoppedError, stoppable

PROGRAM = """
import os, signal, sys, time
from gptq_awq.runtime.stopping import end, stoppable
try:
    with stoppable():
        os.kill(os.getpid(), {number})
        time.sleep(60)
except KeyboardInterrupt as stop:
    end(stop, "kept in out")
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_in_one_line_and_its_exit_code(number, code):
    command = [sys.executable, "-c", PROGRAM.format(number=int(number))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (code, "stopped: kept in out\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_in_a_destructor_ends_the_command_all_the_same(number):
    program = PROGRAM.replace("        os.kill(os.getpid(), {number})\n", "        Dying()\n").replace(
        "try:\n",
        "class Dying:\n    def __del__(self):\n        os.kill(os.getpid(), {number})\n        time.sleep(1)\ntry:\n",
    )
    command = [sys.executable, "-c", program.format(number=int(number))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (128 + number, "stopped: kept in out\n")


def test_handlers_are_put_back_and_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background: ignored
    try:
        with stoppable():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with stoppable():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_library_takes_a_stop_for_an_error_of_its_own():
    assert not issubclass(StoppedError, Exception)
    assert StoppedError(signal.SIGTERM).exit_code == 143


def test_compiling_is_a_phase_of_its_own():
    seconds = iter([0.0, 1.0, 3.0, 3.0])
    clock = Clock(compiled=lambda: next(seconds))
    with clock.phase("quantize"):
        time.sleep(0.01)
    assert clock.seconds["quantize"] < 0, "two seconds that went to the compiler are not its own"
    assert clock.total()["compile"] == 3.0


def test_the_clock_hears_of_kernels_that_are_compiled():
    clock = Clock()
    with clock.phase("quantize"):
        numba.njit(lambda x: x * x + 1)(2.0)
    total = clock.total()
    assert total["compile"] > 0
    assert total["quantize"] + total["compile"] <= total["total"] + 0.01


def test_a_log_touches_no_folder_before_it_is_opened_and_keeps_what_was_logged_there(tmp_path):
    log = logging.getLogger("gptq_awq.test")
    console = Console(file=StringIO())
    (tmp_path / LOG).write_text("an earlier run\n")
    with RunLog(console):
        log.info("refused")
    assert (tmp_path / LOG).read_text() == "an earlier run\n"
    with RunLog(console) as run_log:
        log.info("before")
        run_log.open(tmp_path)
        log.info("after")
    lines = (tmp_path / LOG).read_text().splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["run", "before", "after"]


def test_provenance_names_date_command_commit_host_and_version():
    found = provenance(["run.py", "method=awq", "data.path=a b"])
    assert set(found) == {"date", "command", "git", "host", "version"}
    assert datetime.now(UTC) - datetime.fromisoformat(found["date"]) < timedelta(minutes=1)
    assert found["command"] == "run.py method=awq 'data.path=a b'"
    assert found["version"] == __version__
    assert found["host"]


def test_the_commit_is_that_of_the_checkout_that_the_code_lies_in(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert git_state(package) is None

    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@y")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "empty")
    assert git_state(package) is None, "an environment inside of someone's checkout is no part of it"
    git("add", ".")
    git("commit", "-m", "package")
    clean = git_state(package)
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (package / "new.py").write_text("")
    assert git_state(package) == clean | {"dirty": True}
