"""What every contestant of benchmarks/peers.py does but for quantizing: read the job, time it, answer.

A driver runs in its library's own interpreter, as `python DRIVER.py FOLDER`. FOLDER/job.json says what to do
(`Job`) and FOLDER/tokens.safetensors holds the calibration tokens; the driver leaves the dequantized weights in
FOLDER/weights.safetensors and how it went in FOLDER/answer.json. This file imports nothing of gptq_awq, which the
libraries' environments don't have.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Job:
    """What to quantize, and how.

    Attributes:
        folder: where tokens are and answers go.
        model: a transformers folder, float32.
        method: rtn, gptq, awq or autoround.
        tuned: with the library's own best settings rather than the plain ones that all share.
        bits, group_size, sym: the grid.
        dtype: of weights and forwards, "float32" or "bfloat16".
        batch_size: windows per forward, where that changes no result.
        damping: fraction of the mean diagonal of H (GPTQ).
        iters: steps per block (AutoRound).
        threads: of torch.
    """

    folder: Path
    model: str
    method: str
    tuned: bool
    bits: int
    group_size: int
    sym: bool
    dtype: str
    batch_size: int
    damping: float
    iters: int
    threads: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return getattr(torch, self.dtype)

    def tokens(self) -> torch.Tensor:
        """The calibration tokens, int64 (windows, seqlen)."""
        return load_file(self.folder / "tokens.safetensors")["ids"]


def read_job() -> Job:
    """The job in the folder that the command line names; torch's threads are set."""
    folder = Path(sys.argv[1])
    job = Job(folder=folder, **json.loads((folder / "job.json").read_text()))
    torch.set_num_threads(job.threads)
    return job


@dataclass(frozen=True)
class Timed:
    """Seconds of a call, and the most memory that was resident in this process during it, the model included."""

    seconds: float
    peak_bytes: int


def timed(call: Callable[[], Any]) -> Timed:
    """Run a call."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    started = time.perf_counter()
    call()
    return Timed(time.perf_counter() - started, _peak_bytes())


def _peak_bytes() -> int:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def answer(job: Job, package: str, took: Timed, weights: Mapping[str, torch.Tensor], settings: str) -> None:
    """Leave the answer.

    Args:
        job: that was done.
        package: whose version is told.
        took: what quantizing took.
        weights: parameter's name in the transformers model → its value; what is not among them was left as it was.
        settings: what was asked for, in the library's own words.
    """
    whole = {name: tensor.detach().float().contiguous().clone() for name, tensor in weights.items()}
    save_file(whole, job.folder / "weights.safetensors")
    told = {
        "seconds": took.seconds,
        "peak_bytes": took.peak_bytes,
        "package": f"{package} {version(package)}",
        "settings": settings,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    (job.folder / "answer.json").write_text(json.dumps(told))
