"""Memory: what is free, what a run has used at most, and what calibration will need."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import nn

from gptq_awq.errors import UserError


def available_bytes(device: torch.device) -> int:
    """Memory that may still be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def reset_peak(device: torch.device) -> None:
    """Start measuring the peak anew, where the system allows it (Linux, CUDA); a sweep runs in one process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Most memory used since `reset_peak`: on the device if it is a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    kilobytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes


def forecast_bytes(blocks: nn.ModuleList, widest: int, hidden: int, tokens: int, tokens_per_batch: int) -> int:
    """What calibration allocates at most, beyond the model.

    Two float32 copies of a block; the moments, their factor and the factorization's scratch for the widest
    site (five in × in matrices); the streams of all tokens, and the activations of one batch inside a block.
    """
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    streams = tokens * (2 * hidden + widest)
    activations = tokens_per_batch * 6 * max(widest, hidden)
    return 4 * (2 * largest + 5 * widest**2 + streams + activations)


def require(needed: int, device: torch.device, what: str) -> None:
    """Raise UserError unless `needed` bytes are free on `device`."""
    free = available_bytes(device)
    if needed > free:
        raise UserError(
            f"{what} needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on {device}: lower "
            "data.samples, data.seqlen or tokens_per_batch, choose a smaller model, or another device"
        )
