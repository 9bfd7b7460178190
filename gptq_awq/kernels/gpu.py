"""Where the Triton kernels run. Importing this takes no Triton; importing triton_columns.py does."""

from importlib.util import find_spec

import torch

LEAST_CAPABILITY = 8, 0
"""Ampere: the oldest GPUs that Triton supports."""


def available(device: torch.device) -> bool:
    """Whether the kernels of triton_columns.py run there: a CUDA (or ROCm) device, and Triton installed."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
