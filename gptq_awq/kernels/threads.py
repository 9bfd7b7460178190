"""Number of threads in compiled loops."""

import numba
import torch


def match_torch() -> None:
    """Let numba use as many threads as torch (OMP_NUM_THREADS, torch.set_num_threads), up to its own limit.

    Several runs may share a machine. Starting numba's threads sets OpenMP's number, which is torch's as well: it is
    set back.
    """
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # pyright: ignore
    torch.set_num_threads(threads)
