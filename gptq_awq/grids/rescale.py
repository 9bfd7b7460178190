"""Scales changed after rounding, codes kept: by tuning (tuning/linear.py) and by refinement (solvers/refine.py).

Whatever the format, a dequantized weight is proportional to its group's scale (and minimum). Formats whose scales are
quantized themselves leave no such freedom.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.grids.base import Grid
from gptq_awq.grids.integer import stored


def has_free_scales(grid: Grid) -> bool:
    """Whether a group's scale may be any number of the dtype that the format stores scales in."""
    return getattr(grid, "scale_dtype", None) is not None and grid.span == grid.group_size


def times(
    grid: Grid,
    scales: Float[Tensor, "out groups"],
    zeros: Float[Tensor, "out groups"],
    factor: Float[Tensor, "out groups"],
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Scales and zeros of a grid with free scales, multiplied and rounded to the precision that is stored."""
    dtype: str = grid.scale_dtype  # pyright: ignore[reportAttributeAccessIssue]
    if grid.arithmetic.kind != "minimum":
        return stored(scales * factor, dtype), zeros
    # Minimums are in weight units and stored in the precision of scales; a scale of 0 stays 0.
    return _rounded_to(dtype, scales * factor), _rounded_to(dtype, zeros * factor)


def _rounded_to(dtype: str, x: Tensor) -> Tensor:
    """Round numbers of either sign to `dtype` and back, clamped to its range."""
    most = torch.finfo(getattr(torch, dtype)).max
    return x.clamp(-most, most).to(getattr(torch, dtype)).to(x.dtype)
