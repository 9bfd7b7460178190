"""Memory: what is free, what a run has used at most, and what calibration will need."""

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import nn

from gptq_awq.errors import UserError


def parse_bytes(text: str) -> int:
    """Bytes, as in "4e9", "4GB" (1000³) or "4GiB" (1024³). Raises ValueError."""
    parts = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(?:([kmgt]?)(i?)b?)\s*", text.lower())
    if parts is None:
        raise ValueError(f"{text} is no number of bytes")
    return int(float(parts[1]) * (1024 if parts[3] else 1000) ** " kmgt".index(parts[2] or " "))


def available_bytes(device: torch.device, budget: int | None = None) -> int:
    """Memory that may still be allocated on `device`; `budget`: of all that this process takes, but for GPUs."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    return free if budget is None else min(free, max(0, budget - resident_bytes()))


def resident_bytes() -> int:
    """Memory that this process has now."""
    return psutil.Process().memory_info().rss


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


SOLVED = 10
"""Bytes for each weight of the linear that is solved: itself again and what it came to in float32, its codes."""


def forecast_bytes(
    blocks: nn.ModuleList,
    widest: int,
    hidden: int,
    tokens: int,
    tokens_per_batch: int,
    itemsize: int,
    full: bool = False,
) -> int:
    """What calibration allocates at least, beyond the model.

    A block in the compute dtype (of `itemsize` bytes); beside it, one after the other, a copy in float32 to look for
    sites, and the moments and their factor for the widest site (two in × in matrices) with the linear that is solved,
    which has a row for each number of a hidden state; the streams of all tokens, and what one batch
    holds inside a block. What batches hold that wait for a site to be solved comes on top where it fits. With `full`
    precision beside, forwards, streams and the block's copies double, and three more in × in matrices say how the two
    differ.
    """
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    flowing = tokens * hidden * itemsize + held_bytes(tokens_per_batch, hidden, widest, itemsize)
    solving = (8 + 12 * full) * widest**2 + SOLVED * widest * hidden
    return (1 + full) * (itemsize * largest + flowing) + max(4 * largest, solving)


def held_bytes(tokens: int, hidden: int, widest: int, itemsize: int) -> int:
    """The activations that batches hold while they wait at a site, at most: hidden states before and after the norm,
    and what their attention or MLP has made so far (queries, keys, values and output; gate and up)."""
    return tokens * itemsize * (2 * hidden + max(4 * hidden, 2 * widest))


def head_bytes(weights: int) -> int:
    """What solving an output head of so many weights holds beside it, at most: measured, GPTQ with a range search.

    Round to nearest takes 16 bytes a weight. Blocks' copies and waiting batches are gone by then.
    """
    return 27 * weights


def routed_bytes(tokens: int, hidden: int, itemsize: int, squares: int) -> int:
    """What a mixture of experts adds: four hidden states of every token, which waits inside of the experts whatever
    becomes of other activations, or is kept for experts that few tokens reach; second moments of all experts of a
    block, where a method looks at them together (`squares`: the sum of columns²)."""
    return 4 * tokens * hidden * itemsize + 4 * squares


def require(needed: int, device: torch.device, what: str, budget: int | None = None) -> None:
    """Raise UserError unless `needed` bytes are free on `device`, and within `budget`."""
    free = available_bytes(device, budget)
    if needed > free:
        place = f"on {device}" if budget is None else f"of memory_budget={budget}"
        raise UserError(
            f"{what} needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free {place}: lower "
            "data.samples, data.seqlen or tokens_per_batch, choose a smaller model, or another device"
        )
