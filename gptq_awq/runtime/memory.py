"""Memory: what is free, what a run has used at most, and what calibration will need."""

import ctypes
import re
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

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


def used_bytes(device: torch.device) -> int:
    """Memory that this process has now, on the device if it is a GPU; what the C library holds back is in it."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


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


def trim() -> None:
    """Give freed memory back that the C library holds for later, where it is one that can (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


MMAP_THRESHOLD = -3
"""mallopt's name for it, in malloc.h."""
LARGE = 4 * 2**20
"""Bytes. Page faults are what giving such tensors back at once costs: up to a fifth of the time of a small model."""


def return_large() -> None:
    """From now on give large tensors back to the system as soon as they are freed, in this process (glibc).

    Otherwise they come from a heap, whose holes no one else can use; over many blocks it grows, though nothing
    piles up.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE)


SOLVED = 10
"""Bytes for each weight of the linear that is solved: itself again and what it came to in float32, its codes."""


@dataclass(frozen=True)
class Calibration:
    """What calibration allocates beyond the model, in bytes, from numbers of weights and columns.

    Attributes:
        block: weights of the largest block.
        linear: of the largest linear among the widest.
        widest: columns of the widest site.
        hidden: width of hidden states.
        tokens: of all batches.
        tokens_per_batch: of one.
        itemsize: bytes of a number in forwards.
        held: bytes for each weight of a block: of a copy that forwards compute with, of a block that was on disk.
        full: full precision runs beside: forwards, streams and the copy double, and three more in × in matrices say
            how the two differ.
        spilled: hidden states between blocks lie in files.
        more: what else lasts, such as waiting batches' activations.
    """

    block: int
    linear: int
    widest: int
    hidden: int
    tokens: int
    tokens_per_batch: int
    itemsize: int
    held: int = 0
    full: bool = False
    spilled: bool = False
    more: int = 0

    @property
    def lasting(self) -> int:
        """Blocks' copies, and the streams of all tokens."""
        flowing = 0 if self.spilled else self.tokens * self.hidden * self.itemsize
        copies = self.block * (self.held + self.full * self.itemsize)
        return copies + (1 + self.full) * flowing + self.more

    @property
    def forwards(self) -> int:
        """A copy in float32 to look for sites; then what one batch holds, and the moments of the widest site."""
        batch = held_bytes(self.tokens_per_batch, self.hidden, self.widest, self.itemsize)
        return self.lasting + max(4 * self.block, (1 + self.full) * batch + 4 * self.widest**2)

    @property
    def solving(self) -> int:
        """Moments and their factor for the widest site, with the linear that is solved."""
        return self.lasting + (8 + 12 * self.full) * self.widest**2 + SOLVED * self.linear

    @property
    def most(self) -> int:
        """Whichever is more."""
        return max(self.forwards, self.solving)


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
