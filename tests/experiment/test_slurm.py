"""A sweep on a real Slurm: one run killed, one requeued, and the table is complete in the end."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.paths import ROOT

from gptq_awq import results

LOCAL = Path(os.environ.get("TMPDIR", "/tmp")) / "gptq_awq_slurm" / "slurm.conf"
KILLED, REQUEUED = 2, 3


@pytest.fixture(scope="module")
def slurm() -> Callable[..., str]:
    """Call one of Slurm's commands; the cluster is the machine's own or that of scripts/slurm_local.sh."""
    if shutil.which("sinfo") is None:
        pytest.skip("Slurm is not installed (apt-get install slurm-wlm munge)")
    if LOCAL.is_file() and "SLURM_CONF" not in os.environ:
        os.environ["SLURM_CONF"] = str(LOCAL)

    def call(*arguments: str) -> str:
        return subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=30).stdout

    try:
        nodes = call("sinfo", "--noheader", "--format=%T")
    except (subprocess.SubprocessError, OSError):
        pytest.skip("no Slurm answers (scripts/slurm_local.sh start)")
    if not any(state in nodes for state in ("idle", "mixed", "allocated")):
        pytest.skip(f"Slurm has no node that works: {nodes.strip() or 'none'}")
    return call


@pytest.fixture
def sweep(shared, stories15m, tmp_path):
    """Start the sweep, as one would type it; its data are so much that a kill after the first block is never late."""
    stories = shared / "data" / "tinystories"
    command = [
        *(sys.executable, ROOT / "run.py", "-m", "hydra/launcher=slurm", "method=rtn,gptq", "bits=3,4"),
        *("hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2", "hydra.launcher.timeout_min=15"),
        *("hydra.launcher.array_parallelism=2", "group_size=32", "model=local", f"model.path={stories15m}"),
        *("data=local", f"data.path={stories / 'tinystories_10k.txt'}", "data.samples=1024", "data.seqlen=256"),
        *(f"eval.perplexity.path={stories / 'tinystories_val.txt'}", "eval.perplexity.seqlen=256"),
        *("eval.perplexity.windows=8",),
    ]
    settings = {"GPTQ_AWQ_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    # A run inside of xdist must not hand its worker's settings to the jobs.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | settings
    started: list[subprocess.Popen] = []

    def start(log: str) -> subprocess.Popen:
        with (tmp_path / log).open("w") as file:
            process = subprocess.Popen(
                [str(part) for part in command], env=environment, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def until(condition: Callable[[], object], seconds: float, what: str):
    """Wait for something and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


def job_of(root: Path) -> str | None:
    """The id of the job array, once it is submitted."""
    scripts = list(root.glob("multirun/*/*/.submitit/*/*_submission.sh"))
    return scripts[0].parent.name if scripts else None


def blocks_done(root: Path, index: int) -> int:
    """Blocks of one run that are on disk."""
    files = list(root.glob(f"multirun/*/*/{index}_*/ledger.partial.jsonl"))
    rows = results.read_ledger(files[0]) if files and files[0].stat().st_size else None
    return 0 if rows is None or rows.empty else rows["block"].nunique()


@pytest.mark.slow
@pytest.mark.fresh
def test_a_sweep_survives_a_kill_and_a_requeue(slurm, sweep, tmp_path):
    first = sweep("first.log")
    job = until(lambda: job_of(tmp_path), 60, "sbatch")
    try:
        until(lambda: blocks_done(tmp_path, KILLED), 180, "the first block of the run to kill")
        slurm("scancel", "--signal=KILL", f"{job}_{KILLED}")
        until(lambda: blocks_done(tmp_path, REQUEUED), 120, "the first block of the run to requeue")
        slurm("scontrol", "requeue", f"{job}_{REQUEUED}")
        until(lambda: not slurm("squeue", "--noheader", f"--jobs={job}").strip(), 240, "the end of all jobs")
    finally:
        subprocess.run(["scancel", job], check=False)
    done = results.load(tmp_path / "multirun")
    assert sorted(zip(done["method"], done["bits"], strict=True)) == [("gptq", 4), ("rtn", 3), ("rtn", 4)]
    assert done.set_index("method").loc["gptq", "manifest"]["resumed"], "the requeued run began anew"

    first.kill()  # without accounting it can't know that a job was killed
    second = sweep("second.log")
    assert second.wait(timeout=240) == 0, (tmp_path / "second.log").read_text()
    table = results.load(tmp_path / "multirun")
    assert sorted(zip(table["method"], table["bits"], strict=True)) == [
        *(("gptq", 3), ("gptq", 4), ("rtn", 3), ("rtn", 4)),
    ]
    assert set(table["status"]) == {"done"}
    killed = table[(table["method"] == "gptq") & (table["bits"] == 3)].iloc[0]
    assert killed["manifest"]["resumed"], "the killed run began anew"
    assert killed["metrics"]["tinystories_val/kl"] < 0.5
