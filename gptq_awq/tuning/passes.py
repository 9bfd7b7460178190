"""Passes over the calibration set: which windows each step sees, and what losses the first and last pass had."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def shuffled(rows: int, per_step: int, steps: int, seed: int) -> Iterator[Int[Tensor, "per_step"]]:
    """Rows of each step: every one once, in random order, before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left) < per_step:
            left = torch.cat([left, torch.randperm(rows, generator=generator)])
        yield left[:per_step]
        left = left[per_step:]


def first_and_last(losses: Sequence[float], per_pass: int) -> tuple[float, float]:
    """Mean losses of the first and of the last pass."""
    first, last = losses[:per_pass], losses[-per_pass:]
    return sum(first) / len(first), sum(last) / len(last)
