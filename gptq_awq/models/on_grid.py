"""Weights that lie on a grid already: releases trained for few bits, and files that were dequantized.

Rounding them again onto that grid changes nothing, and any other grid starts from what the first one left. A grid of
b bits in groups of g columns leaves at most 2^b different values in a group; weights of another origin have nearly as
many values as the group has columns.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gptq_awq.errors import UserError
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import is_linear, matrix

LINEARS, ROWS = 8, 32
"""Linears that are looked at, spread over the blocks, and rows of each."""
GROUPS = (16, 32, 64, 128, 256)
BITS = (1, 2, 3, 4, 5, 8)


@torch.no_grad()
def grid_of(model: nn.Module) -> str | None:
    """The grid that the weights in a model's blocks lie on, as a sentence; None where they lie on none.

    Of the grids that all of the looked at weights lie on, it is the one of fewest bits, in the largest groups.
    """
    try:
        _, blocks = find_blocks(model)
    except UserError:
        return None
    linears = [m for m in blocks.modules() if is_linear(m)]
    chosen = linears[:: max(1, len(linears) // LINEARS)][:LINEARS]
    weights = [matrix(m)[:ROWS].detach().float().cpu() for m in chosen]
    for bits in BITS:
        fitting = [size for size in GROUPS if size > 2**bits + 2**bits // 2 and _all_on(weights, bits, size)]
        if fitting:
            return f"at most {2**bits} values in each group of {max(fitting)} columns ({bits} bits)"
    return None


def _all_on(weights: list[Float[Tensor, "rows in"]], bits: int, size: int) -> bool:
    """Whether no group of `size` columns has more than 2^bits values, and some have more than half as many."""
    counts = [values_in(w, size) for w in weights if w.shape[1] >= size]
    if not counts or len(counts) < len(weights) / 2:
        return False
    found = torch.cat(counts)
    return bool((found <= 2**bits).all()) and int(found.max()) > 2 ** (bits - 1)


def values_in(weight: Float[Tensor, "rows in"], size: int) -> Tensor:
    """Number of different values in each whole group of `size` columns."""
    groups = weight[:, : weight.shape[1] // size * size].reshape(-1, size).sort(-1).values
    return (groups.diff(dim=-1) != 0).sum(-1) + 1
