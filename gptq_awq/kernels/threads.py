"""How many threads compiled loops use."""

import numba
import torch


def match_torch() -> None:
    """As many as torch does (OMP_NUM_THREADS, torch.set_num_threads), where numba may; several runs share a machine."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # pyright: ignore
