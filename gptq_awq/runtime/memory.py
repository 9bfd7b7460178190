"""Memory: bytes that are free, that a process uses and has used at most, and that calibration will need."""

import ctypes
import re
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from gptq_awq.errors import UserError
from gptq_awq.runtime.limits import Limit, memory_limits


def parse_bytes(text: str) -> int:
    """Bytes, as in "4e9", "4GB" (1000³) or "4GiB" (1024³). Raises ValueError."""
    parts = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(?:([kmgt]?)(i?)b?)\s*", text.lower())
    if parts is None:
        raise ValueError(f"{text} is no number of bytes")
    return int(float(parts[1]) * (1024 if parts[3] else 1000) ** " kmgt".index(parts[2] or " "))


def available_bytes(device: torch.device, budget: int | None = None) -> int:
    """Bytes that may still be allocated on `device`; on a CPU within `budget`, for all that this process takes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = tightest().free
    return free if budget is None else min(free, max(0, budget - resident_bytes()))


def tightest() -> Limit:
    """The tightest limit on this process's memory: the machine's, or its container's, job's or shell's."""
    machine = Limit(psutil.virtual_memory().available, "")
    return min([machine, *memory_limits()], key=lambda limit: limit.free)


def resident_bytes() -> int:
    """Bytes of memory that this process has now."""
    return psutil.Process().memory_info().rss


def used_bytes(device: torch.device) -> int:
    """Bytes that this process has now, on the device if it is a GPU, and with what the C library holds back."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of the peak, where the system allows it (Linux, CUDA); a sweep runs in one process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak of bytes used since `reset_peak`: on the device if it is a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    kilobytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes


def trim() -> None:
    """Return freed memory that the C library (glibc) holds for later to the system."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, from malloc.h: a heap with more free memory than this at its end returns it, and blocks above
this size are mapped, and returned when freed."""
LARGE = 4 * 2**20
"""Bytes of a large tensor. Returning it at once costs page faults: up to a fifth of the time of a small model."""
HUGE, FREE = 2**28, 2**30
"""Bytes of a tensor that is returned anyway (more than a window's logits), and of free memory that is kept."""


def return_large() -> None:
    """Return large tensors to the system as soon as they are freed, from now on in this process (glibc).

    Otherwise they come from a heap, whose holes no one else can use and which grows over many blocks.
    """
    _set_thresholds(LARGE, 2 * LARGE)


def keep_freed() -> None:
    """Keep the memory of freed tensors for those to come, from now on in this process (glibc).

    Pages that come from the system are cleared first, which otherwise takes a fifth of the time of gradients.
    """
    _set_thresholds(HUGE, FREE)


def _set_thresholds(mapped: int, free: int) -> None:
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(MMAP_THRESHOLD, mapped)
        library.mallopt(TRIM_THRESHOLD, free)


POPULATE_WRITE = 23
"""Advice of madvise, from mman.h of Linux 5.14: give the process pages of its own now."""
PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types whose data pointer says where their numbers lie."""


def make_private(tensors: Iterable[torch.Tensor]) -> None:
    """Give this process pages of its own for weights that are mapped from a file, before they are first read (Linux).

    Replacing a page that was read costs ten times as much when it is written to, as every processor must forget the
    old one first. Nothing is done where less than twice the weights' memory is free.
    """
    held = [x for x in tensors if type(x) in PLAIN and x.device.type == "cpu" and x.is_contiguous()]
    if sys.platform != "linux" or 2 * sum(x.nbytes for x in held) > available_bytes(torch.device("cpu")):
        return
    library, page = ctypes.CDLL(None), resource.getpagesize()
    for tensor in held:
        start = tensor.data_ptr() // page * page
        library.madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - start), POPULATE_WRITE
        )


SOLVED = 10
"""Bytes for each weight of the linear that is solved: itself again and its rounded values in float32, its codes."""


@dataclass(frozen=True)
class Calibration:
    """Bytes that calibration allocates beyond the model, from numbers of weights and columns.

    Attributes:
        block: weights of the largest block.
        linear: weights of the largest linear among the widest.
        widest: columns of the widest site.
        hidden: width of hidden states.
        tokens: tokens of all batches.
        tokens_per_batch: tokens of one batch.
        itemsize: bytes of a number in forwards.
        held: bytes for each weight of a block: of a copy that forwards compute with, of a block that was on disk.
        full: full precision runs beside: forwards, activations and the copy double, and three more in × in matrices
            hold how the two differ.
        spilled: hidden states between blocks are in files.
        more: bytes of anything else that lasts, such as waiting batches' activations.
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
        """Bytes of blocks' copies and of the activations of all tokens."""
        states = 0 if self.spilled else self.tokens * self.hidden * self.itemsize
        return self.block * (self.held + self.full * self.itemsize) + (1 + self.full) * states + self.more

    @property
    def most(self) -> int:
        """Peak bytes: of forwards, or of solving the widest site.

        Forwards look for sites with a copy in float32; then hold one batch, and the moments of the widest site.
        Solving takes these moments, their factor, and the linear that is solved.
        """
        batch = held_bytes(self.tokens_per_batch, self.hidden, self.widest, self.itemsize)
        forwards = max(4 * self.block, (1 + self.full) * batch + 4 * self.widest**2)
        solving = (8 + 12 * self.full) * self.widest**2 + SOLVED * self.linear
        return self.lasting + max(forwards, solving)


def held_bytes(tokens: int, hidden: int, widest: int, itemsize: int) -> int:
    """Bytes of activations that batches hold while they wait at a site, at most.

    Hidden states before and after the norm, and what their attention or MLP has made so far: queries, keys, values and
    output, or gate and up.
    """
    return tokens * itemsize * (2 * hidden + max(4 * hidden, 2 * widest))


def routed_bytes(tokens: int, hidden: int, itemsize: int, squares: int) -> int:
    """Bytes that a mixture of experts adds: four hidden states of every token, and the experts' second moments.

    Tokens wait inside of the experts whatever becomes of other activations, or are kept for experts that few reach.
    `squares`: sum of columns² over a block's experts, where a method looks at all of them together; else 0.
    """
    return 4 * tokens * hidden * itemsize + 4 * squares


def require(needed: int, device: torch.device, what: str, budget: int | None = None) -> None:
    """Raise UserError unless `needed` bytes are free on `device`, and within `budget`."""
    free = available_bytes(device, budget)
    if needed > free:
        within = tightest().source if device.type == "cpu" else ""
        here = f"on {device}" + (f" (limited by {within})" if within else "")
        place = here if budget is None else f"of memory_budget={budget}"
        raise UserError(
            f"{what} needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free {place}: lower "
            "data.samples, data.seqlen or tokens_per_batch, choose a smaller model, or another device"
        )
