"""Inner loops compiled for the hardware they run on: numba for CPUs, Triton for GPUs; what they compute is tested
against plain PyTorch."""
