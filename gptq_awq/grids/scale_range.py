"""Scales beyond the range of the dtype that they are stored in: clamped, flushed to zero, or rounded coarsely.

Float16 ends at 65504 above, and below 6.1e-5 its numbers are 6e-8 apart, so that a weight of 1e-9 has no scale at all.
Such a scale is the nearest one that the dtype has, and the weights of its group lose what it cannot say.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gptq_awq.grids.base import QuantizedWeight, group_of_columns


def scales_out_of_range(
    quantized: QuantizedWeight, weight: Float[Tensor, "out in"], dead: Bool[Tensor, "in"] | None = None
) -> int:
    """Number of scales that are clamped, or rounded by more than a sixteenth or by a code at the end of the range.

    Args:
        quantized: the quantized weight.
        weight: the weight that its scales were fitted to; groups that are zero in it need no scale.
        dead: True at columns that the solver sets to zero; None: no column is.
    """
    grid = quantized.grid
    limits = torch.finfo(getattr(torch, grid.stored_dtype))
    if limits.dtype == "float32":
        return 0
    scales = quantized.store.get("d", quantized.scales).abs()
    finest = limits.tiny * limits.eps  # distance of the smallest numbers
    short = scales < finest * max(grid.arithmetic.max_code / 2, 8)
    far = scales >= limits.max
    if grid.arithmetic.kind == "minimum":
        far |= quantized.store.get("dmin", quantized.zeros).abs() >= limits.max
    if short.any():
        weight = weight if dead is None else weight.masked_fill(dead.to(weight.device), 0)
        short &= _needs_scale(quantized, weight, 128 * finest)
    return int((short | far).sum())


def _needs_scale(
    quantized: QuantizedWeight, weight: Float[Tensor, "out in"], least: float
) -> Bool[Tensor, "out scales"]:
    """True where the columns of a stored scale are neither all zero nor, above a minimum, all one held value.

    Values below `least` have too few bits in the dtype to count as held.
    """
    blocks = "d" in quantized.store
    index = group_of_columns(weight.shape[1], quantized.grid.span) if blocks else quantized.group_of_column
    index = index.to(weight.device)
    count = (quantized.store["d"] if blocks else quantized.scales).shape[1]
    zeros = weight.new_zeros(len(weight), count)
    index = index.expand(len(weight), -1)
    high, low = (zeros.scatter_reduce(1, index, weight, how, include_self=False) for how in ("amax", "amin"))
    nonzero = (high != 0) | (low != 0)
    if quantized.grid.arithmetic.kind != "minimum":
        return nonzero
    return nonzero & ((high > low) | (high.abs() < least))
