"""Passes over the calibration set: the windows of each step, and the mean losses of the first and last pass."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def shuffled(rows: int, per_step: int, steps: int, seed: int) -> Iterator[Int[Tensor, "per_step"]]:
    """Yield the row indices of each step: every row comes once, in random order, before any is repeated."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left) < per_step:
            left = torch.cat([left, torch.randperm(rows, generator=generator)])
        yield left[:per_step]
        left = left[per_step:]


def first_and_last(losses: Sequence[float], per_pass: int) -> tuple[float, float]:
    """Mean loss of the first pass and of the last pass, `per_pass` steps each."""
    first, last = losses[:per_pass], losses[-per_pass:]
    return sum(first) / len(first), sum(last) / len(last)
