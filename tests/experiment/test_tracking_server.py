"""Tracking with a server, or what passes for one: runs go on in the same run, and a silent one costs seconds."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.example_results import AWQ_RESULT, RUN
from helpers.fake_wandb import FakeWandb, serving
from helpers.paths import TESTS

from gptq_awq.experiment.sweeps.tracking import NoTracking, WandbTracking


@pytest.mark.parametrize("end", ["failed", pytest.param("killed", marks=pytest.mark.slow)])  # wandb sends every 15 s
def test_a_run_goes_on_in_the_same_run_of_a_server(end: str, wandb_home: Path, monkeypatch) -> None:
    fake = FakeWandb()
    with serving(fake) as address:
        for name, value in online(address).items():
            monkeypatch.setenv(name, value)
        attempt(wandb_home, end, lambda: len(fake.rows(RUN[:16])) >= 3)
        tracker = WandbTracking(mode="online", dir=str(wandb_home)).start({}, "run", "sweep again", RUN)
        for block in (2, 3):  # the third block was told before the end, but its progress not yet stored
            tracker.log({"quantize/relative_error": block / 10}, step=block)
        tracker.finish(AWQ_RESULT)  # this server takes no tables: that loses them and nothing else
    assert set(fake.runs) == {RUN[:16]}
    assert fake.runs[RUN[:16]]["groupName"] == "sweep again"
    rows = fake.rows(RUN[:16])
    told = [(row["block"], row["quantize/relative_error"]) for row in rows if "block" in row]
    assert told == [(0, 0), (1, 0.1), (2, 0.2), (2, 0.2), (3, 0.3)]
    assert [row["_step"] for row in rows] == sorted({row["_step"] for row in rows})


def attempt(home: Path, end: str, told: Callable[[], bool]) -> None:
    """A process that tells three blocks, and then fails or is killed."""
    code = """
import sys, time
from dataclasses import replace
from helpers.example_results import AWQ_RESULT
from gptq_awq.experiment.sweeps.tracking import WandbTracking
tracker = WandbTracking(mode="online", dir=sys.argv[1]).start({}, "run", "sweep", sys.argv[2])
for block in (0, 1, 2):
    tracker.log({"quantize/relative_error": block / 10}, step=block)
if sys.argv[3] == "killed":
    time.sleep(600)
tracker.finish(replace(AWQ_RESULT, status="failed"))
"""
    command = [sys.executable, "-c", code, str(home), RUN, end]
    process = subprocess.Popen(command, cwd=TESTS, start_new_session=True)
    try:
        wait_for(lambda: told() and (end == "killed" or process.poll() is not None))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_id_of_a_run_that_was_deleted_does_not_leave_its_successor_untracked(wandb_home: Path, monkeypatch) -> None:
    fake = FakeWandb(deleted=RUN[:16])
    with serving(fake) as address:
        for name, value in online(address).items():
            monkeypatch.setenv(name, value)
        tracker = WandbTracking(mode="online", dir=str(wandb_home)).start({}, "run", run_id=RUN)
        assert not isinstance(tracker, NoTracking)
        tracker.finish(AWQ_RESULT)
    assert len(fake.runs) == 1
    assert RUN[:16] not in fake.runs


def online(address: str) -> dict[str, str]:
    return {
        "WANDB_BASE_URL": address,
        "WANDB_API_KEY": "0" * 40,
        "WANDB_MODE": "online",
    }


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def test_a_server_that_never_answers_costs_seconds_and_no_run(wandb_home: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("gptq_awq.experiment.sweeps.tracking.LIMITS", {"init_timeout": 1.0, "finish_timeout": 1.0})
    with serving(FakeWandb(silent=True)) as address:
        for name, value in online(address).items():
            monkeypatch.setenv(name, value)
        started = time.monotonic()
        with caplog.at_level(logging.WARNING):
            tracker = WandbTracking(mode="online", dir=str(wandb_home)).start({}, name="run", run_id=RUN)
        assert time.monotonic() - started < 30  # wandb looks who the user is for ten seconds before
    assert isinstance(tracker, NoTracking)
    assert "tracking.mode=offline" in caplog.text
    assert "\n" not in caplog.records[-1].getMessage()
