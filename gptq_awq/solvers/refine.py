"""Refinement after the sweep: coordinate descent over codes (QuantEase, Behdin et al., arXiv 2309.01885) and scales.

GPTQ rounds a column once, before it knows what later columns will do. With E = Ŵ - W, the error tr(E H Eᵀ) as a
function of one column of Ŵ is least at

    ŵ_j - (E H)_j / H_jj

so the nearest grid point replaces ŵ_j, column after column. As a function of the factor f by which one group's scale
changes it is least at

    f = 1 - Σ_i∈g ŵ_i (E H)_i / (ŵ_g H_gg ŵ_gᵀ)

which follows once the group's columns are done, where the format has free scales (COMQ, Zhang et al., arXiv 2403.07134,
descends over both). No step raises the error.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.grids.arithmetic import KINDS, Params, in_numbers
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.grids.rescale import has_free_scales, times
from gptq_awq.kernels import gpu
from gptq_awq.kernels.columns import LANES
from gptq_awq.kernels.descent import BFLOAT16, FARTHEST, FLOAT16, FLOAT32, KEPT, descend
from gptq_awq.numerics.linalg import quadratic

INNER = 2
"""Times that a group's columns are taken before the next group's: they need no product with the whole of H."""
STORAGE = {None: KEPT, "float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}

Columns = slice | Tensor


def refined(
    quantized: QuantizedWeight, target: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], passes: int
) -> QuantizedWeight:
    """A rounded weight after some passes of coordinate descent towards its target.

    Args:
        quantized: the weight, of a grid that rounds column by column.
        target: W, the weight that it stands for.
        hessian: H = E[x xᵀ], damped, so that its diagonal is positive.
        passes: times that every group of columns, and then its scale, is taken.
    """
    compiled = target.device.type == "cpu"
    return (refined_compiled if compiled else refined_plain)(quantized, target, hessian, passes)


def refined_compiled(quantized: QuantizedWeight, target: Tensor, hessian: Tensor, passes: int) -> QuantizedWeight:
    """Refine a weight on the CPU, each thread some of its rows (kernels/descent.py); arguments as `refined` has."""
    grid, order = quantized.grid, None
    if not quantized.natural_order:
        order = torch.argsort(quantized.group_of_column, stable=True)
        hessian, target = hessian[order][:, order], target[:, order]
    counts = torch.bincount(quantized.group_of_column, minlength=quantized.scales.shape[1])
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    value = (quantized.dequantize() if order is None else quantized.dequantize()[:, order]).contiguous()
    scales, zeros = (each.clone(memory_format=torch.contiguous_format) for each in (quantized.scales, quantized.zeros))
    codes = torch.empty_like(value)
    storage = STORAGE[getattr(grid, "scale_dtype", None) if has_free_scales(grid) else None]
    height = min(LANES, -(-len(value) // torch.get_num_threads()))
    given = (each.contiguous().numpy() for each in (value, target, hessian, starts, scales, zeros))
    numbers = in_numbers(grid.arithmetic)
    descend(*given, *numbers, storage, height, passes, INNER, codes.numpy())  # pyright: ignore[reportCallIssue]
    loss = quadratic(value - target, hessian) / 2
    codes = codes if order is None else codes[:, torch.argsort(order)]
    return replace(quantized, codes=codes.to(torch.uint8), scales=scales, zeros=zeros, loss=loss)


def refined_plain(quantized: QuantizedWeight, target: Tensor, hessian: Tensor, passes: int) -> QuantizedWeight:
    """Refine a weight in PyTorch on any device, one group of all rows at a time; arguments as `refined` has."""
    grid = quantized.grid
    codes, scales, zeros = quantized.codes.clone(), quantized.scales.clone(), quantized.zeros.clone()
    E = quantized.dequantize() - target
    groups = list(_groups(quantized))
    for _ in range(passes):
        for group, columns in enumerate(groups):
            rows_of_h = hessian[columns]
            h = rows_of_h[:, columns].contiguous()
            value, slope = E[:, columns] + target[:, columns], E @ rows_of_h.T  # as H is symmetric
            params = scales[:, group, None], zeros[:, group, None]
            chosen = _descended(grid, value, slope, h, params)
            if has_free_scales(grid):
                params, value = _rescaled(grid, chosen, value, slope, h, params)
                scales[:, group], zeros[:, group] = params[0][:, 0], params[1][:, 0]
            codes[:, columns] = chosen.to(torch.uint8)
            E[:, columns] = value - target[:, columns]
    return replace(quantized, codes=codes, scales=scales, zeros=zeros, loss=quadratic(E, hessian) / 2)


def _groups(quantized: QuantizedWeight) -> Iterator[Columns]:
    """Columns of each group: a slice where neighbours, an index elsewhere."""
    of_column = quantized.group_of_column
    for group in range(quantized.scales.shape[1]):
        columns = (of_column == group).nonzero()[:, 0]
        first, last = int(columns[0]), int(columns[-1])
        yield slice(first, last + 1) if last - first == len(columns) - 1 else columns.to(quantized.codes.device)


def _descended(grid: Grid, value: Tensor, slope: Tensor, h: Tensor, params: Params) -> Float[Tensor, "rows cols"]:
    """Codes of a group after coordinate descent; `value` and `slope` = (E H)_g are changed in place with them."""
    descended = _by_triton if gpu.available(value.device) else descended_plain
    return descended(grid, value, slope, h, params)


def _by_triton(grid: Grid, value: Tensor, slope: Tensor, h: Tensor, params: Params) -> Float[Tensor, "rows cols"]:
    """Codes of a group by the compiled GPU kernel, in one launch (kernels/triton_descent.py)."""
    from gptq_awq.kernels.triton_descent import descend

    codes, arithmetic = torch.empty_like(value), grid.arithmetic
    scale, zero = (each[:, 0].contiguous() for each in params)
    levels, kind = value.new_tensor(arithmetic.levels), KINDS.index(arithmetic.kind)
    descend(value, slope, h, scale, zero, arithmetic.max_code, kind, levels, INNER, codes)
    return codes


def descended_plain(
    grid: Grid,
    value: Float[Tensor, "rows cols"],
    slope: Float[Tensor, "rows cols"],
    h: Float[Tensor, "cols cols"],
    params: Params,
) -> Float[Tensor, "rows cols"]:
    """Codes of a group after coordinate descent, in plain PyTorch on any device: one line for each step."""
    codes = torch.empty_like(value)
    for _ in range(INNER):
        for i in range(value.shape[1]):
            wanted = value[:, i : i + 1] - slope[:, i : i + 1] / h[i, i]
            code = grid.encode(wanted, params)
            new = grid.decode(code, params)
            slope += (new - value[:, i : i + 1]) * h[i]
            value[:, i : i + 1], codes[:, i : i + 1] = new, code
    return codes


def _rescaled(
    grid: Grid, codes: Tensor, value: Tensor, slope: Tensor, h: Tensor, params: Params
) -> tuple[Params, Float[Tensor, "rows cols"]]:
    """Scale and zero of a group that leave the least error to its codes, and its values with them.

    Both are what they were where storing them spoils that.
    """
    along = (value * slope).sum(1, keepdim=True)
    curvature = ((value @ h) * value).sum(1, keepdim=True)
    factor = 1 - along / curvature.clamp(min=torch.finfo(value.dtype).tiny)
    new = times(grid, *params, factor.clamp(1 / float(FARTHEST), float(FARTHEST)))
    moved = grid.decode(codes, new)
    change = moved - value
    better = ((2 * slope + change @ h) * change).sum(1, keepdim=True) < 0
    scale, zero = (torch.where(better, after, before) for after, before in zip(new, params, strict=True))
    return (scale, zero), torch.where(better, moved, value)
