"""A linear layer's weight and the second moments of its inputs, drawn at random."""

import torch

from gptq_awq.calibration.moments import Moments


def problem(rows=24, columns=96, seed=0):
    """A random weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator)
    X = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return W, X.T @ X / len(X)


def moments(H):
    """Moments of which only the Hessian counts."""
    return Moments(H, H.diagonal().sqrt(), tokens=1)
