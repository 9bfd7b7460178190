"""Shared part of the drivers of benchmarks/peers.py: read the job, time the quantizing call, write the answer.

A driver runs in its library's own interpreter, as `python DRIVER.py FOLDER`. FOLDER/job.json holds the job (`Job`) and
FOLDER/tokens.safetensors the calibration tokens; the driver writes the dequantized weights to
FOLDER/weights.safetensors, and times, memory and versions to FOLDER/answer.json. This file imports nothing of gptq_awq,
which the libraries' environments don't have.
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
    """A quantization job: model, method, grid and settings.

    Attributes:
        folder: folder of the tokens and of the answer.
        model: a transformers folder, float32.
        method: rtn, gptq, awq or autoround.
        tuned: with the library's own best settings rather than the plain ones that all share.
        bits, group_size, sym: parameters of the integer grid.
        dtype: dtype of weights and forwards, "float32" or "bfloat16".
        batch_size: windows per forward, where that changes no result.
        damping: fraction of the mean diagonal of H (GPTQ).
        iters: steps per block (AutoRound).
        threads: number of torch's threads.
        scheme: name of a library's preset instead of integers (llm-compressor's nvfp4a16 and mxfp4a16).
        observer: llm-compressor's observer that chooses the preset's ranges.
        warm_up: whether nothing is measured, so that what takes long may be cut short.
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
    scheme: str | None = None
    observer: str | None = None
    warm_up: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as a torch.dtype."""
        return getattr(torch, self.dtype)

    def tokens(self) -> torch.Tensor:
        """The calibration tokens, int64 (windows, seqlen)."""
        return load_file(self.folder / "tokens.safetensors")["ids"]


def read_job() -> Job:
    """Read the job in the folder that the command line names, and set torch's number of threads."""
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
    """Run `call`; returns its wall time and peak memory."""
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


def answer(
    job: Job, package: str, took: Timed, weights: Mapping[str, torch.Tensor], settings: str, writing: float = 0.0
) -> None:
    """Write the answer: weights, times, memory and versions.

    Args:
        job: the job that was done.
        package: package whose version is reported.
        took: time and memory of the quantizing call.
        weights: parameter's name in the transformers model → its value; a parameter that is missing is unchanged.
        settings: the settings in the library's own terms.
        writing: seconds of the time in which the model wrote calibration text, once for all its runs.
    """
    whole = {name: tensor.detach().float().contiguous().clone() for name, tensor in weights.items()}
    save_file(whole, job.folder / "weights.safetensors")
    told = {
        "seconds": took.seconds,
        "writing": writing,
        "peak_bytes": took.peak_bytes,
        "package": f"{package} {version(package)}",
        "settings": settings,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    (job.folder / "answer.json").write_text(json.dumps(told))
