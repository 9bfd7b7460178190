"""Inner loops compiled for the hardware they run on, by numba for CPUs and by Triton for GPUs.

Tests compare their results with plain PyTorch.
"""
