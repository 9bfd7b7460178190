"""Quantizing one weight matrix, given the second moments of its input."""

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.calibration.moments import Moments
from gptq_awq.errors import UserError
from gptq_awq.grids.base import QuantizedWeight
from gptq_awq.grids.integer import IntGrid
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN


def quantize_weight(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"] | None = None,
    method: str = "gptq",
    bits: int = 4,
    group_size: int = 64,
    sym: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
    mse: bool = False,
    block_size: int = 128,
) -> QuantizedWeight:
    """Quantize one weight matrix, given the second moments of its input.

    Args:
        weight: (out, in).
        hessian: (in, in), Σ x xᵀ at any scale, not damped. `rtn` needs none.
        method: "gptq" or "rtn". (AWQ changes the layers before this one: see `quantize_model`.)
        bits: 2 to 8.
        group_size: columns that share a scale; -1 for per channel.
        sym: symmetric grid.
        act_order: round columns in order of falling diag(H).
        static_groups: fit all groups before rounding.
        damping: fraction of the mean diagonal of H added to the diagonal.
        mse: search for the range of least weight error, as the GPTQ code does.
        block_size: columns per lazy update.

    Returns:
        codes, scales, zeros, `dequantize()` and `loss` (½ tr(ΔHΔᵀ), as the GPTQ code sums it).

    Raises:
        UserError: unknown method, bits or group size; shapes that don't fit; non-finite input.
        NotPositiveDefiniteError: no damping made H positive definite.
    """
    if method not in ("gptq", "rtn"):
        raise UserError(f"method={method}: quantize_weight knows gptq and rtn; quantize_model knows every preset")
    if weight.dim() != 2:
        raise UserError(f"weight has shape {tuple(weight.shape)}: give a matrix (out, in)")
    columns = weight.shape[1]
    if hessian is None and method == "gptq":
        raise UserError("hessian is missing: GPTQ needs Σ x xᵀ of the layer's inputs (method='rtn' does not)")
    if hessian is not None and hessian.shape != (columns, columns):
        raise UserError(f"hessian has shape {tuple(hessian.shape)}: the weight's {columns} columns want a square of it")
    for name, tensor in (("weight", weight), ("hessian", hessian)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise UserError(f"{name} has non-finite values")
    grid = IntGrid(bits, group_size, sym, "mse" if mse else "minmax")
    solver = GPTQ(act_order, static_groups, damping, block_size) if method == "gptq" else RTN()
    moments = None
    if hessian is not None:
        h = hessian.float()
        moments = Moments(h, h.diagonal().clamp(min=0).sqrt(), tokens=1)
    return solver.solve(weight.detach().float(), moments, grid).quantized
