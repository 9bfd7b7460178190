"""Numbers of torch's types as compiled loops see them: float32 as it is, bfloat16, which NumPy has not, as bits."""

import numba
import numpy as np
import torch

from gptq_awq.kernels.rank_k import bfloat16

NUMBERS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16}
"""Dtypes that loops for both take, each with the type that NumPy sees it as."""


@numba.njit
def number(x, half):  # pragma: no cover (compiled)
    """A float32 number, or the one whose bfloat16 bits are given."""
    return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32) if half else np.float32(x)


@numba.njit
def read(x, half, out):  # pragma: no cover (compiled)
    """Write a row of float32 numbers, or of bfloat16 ones as their bits, to a row of float32."""
    for j in range(len(x)):
        out[j] = number(x[j], half)


@numba.njit
def write(x, half, out):  # pragma: no cover (compiled)
    """Write a row of float32 numbers as they are, or rounded to bfloat16, as their bits."""
    bits = x.view(np.uint32)
    if half:
        for j in range(len(x)):
            out[j] = bfloat16(bits[j])
    else:
        for j in range(len(x)):
            out[j] = x[j]
