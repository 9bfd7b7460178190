"""Which devices run the Triton kernels; importing this module needs no Triton, importing triton_columns.py does."""

from importlib.util import find_spec

import torch

LEAST_CAPABILITY = 8, 0
"""Least CUDA compute capability that Triton supports: Ampere's."""


def available(device: torch.device) -> bool:
    """Whether `device` runs the kernels of triton_columns.py: a CUDA (or ROCm) device, with Triton installed."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
