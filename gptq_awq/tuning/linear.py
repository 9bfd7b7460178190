"""A linear whose quantized weight is tuned through its scales: Ŵ exp(δ), one δ per row and group, codes fixed.

Whatever the format, Ŵ is proportional to a group's scale (and minimum), so with G = ∂L/∂Ŵ

    ∂L/∂δ = Σ over the group of G ⊙ Ŵ

and the tuned scale is s exp(δ). Formats whose scales are quantized themselves have no such freedom.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import Function

from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.grids.rescale import has_free_scales, times
from gptq_awq.models.linear import matrix


class ColumnGroups:
    """The groups of a weight's columns: products with one factor per group, and sums over each group."""

    def __init__(self, weight: QuantizedWeight) -> None:
        columns, size = weight.codes.shape[1], weight.grid.group_size
        self._size = columns if size == -1 else size
        self._whole = columns - columns % self._size
        self._of_column: Int[Tensor, "in"] | None = None if weight.natural_order else weight.group_of_column
        self._count = weight.scales.shape[1]

    def times(self, w: Float[Tensor, "out in"], factor: Float[Tensor, "out groups"]) -> Float[Tensor, "out in"]:
        """Multiply every column by its group's factor."""
        if self._of_column is not None:
            return w * factor.index_select(1, self._of_column.to(w.device))
        whole = w[:, : self._whole].unflatten(1, (-1, self._size)) * factor[:, : self._whole // self._size, None]
        if self._whole == w.shape[1]:
            return whole.flatten(1)
        return torch.cat([whole.flatten(1), w[:, self._whole :] * factor[:, -1:]], 1)

    def sums(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out groups"]:
        """Sum the columns of every group."""
        if self._of_column is not None:
            return w.new_zeros(len(w), self._count).index_add_(1, self._of_column.to(w.device), w)
        whole = w[:, : self._whole].unflatten(1, (-1, self._size)).sum(2)
        if self._whole == w.shape[1]:
            return whole
        return torch.cat([whole, w[:, self._whole :].sum(1, keepdim=True)], 1)


class _Scaled(Function):
    """Autograd function X (Ŵ exp δ)ᵀ, with gradients in X and δ."""

    @staticmethod
    def forward(ctx, x: Tensor, delta: Tensor, rounded: Tensor, groups: ColumnGroups) -> Tensor:
        W = groups.times(rounded.float(), delta.exp()).to(x.dtype)
        ctx.save_for_backward(x, W)
        ctx.groups = groups
        return x @ W.T

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, W = ctx.saved_tensors
        (g,) = grads
        G = (g.flatten(0, -2).T @ x.flatten(0, -2)).float()
        return g @ W if ctx.needs_input_grad[0] else None, ctx.groups.sums(G.mul_(W)), None, None


class TunedLinear(nn.Module):
    """Replacement of a linear (or GPT-2's Conv1D) while its scales are tuned.

    Attributes:
        delta: δ, (out, groups) float32.
        bias: bias of the replaced linear, or None.
    """

    def __init__(self, linear: nn.Module, weight: QuantizedWeight) -> None:
        super().__init__()
        self.bias: nn.Parameter | None = linear.bias  # pyright: ignore[reportAttributeAccessIssue]
        self.delta = nn.Parameter(torch.zeros_like(weight.scales, dtype=torch.float32))
        self._rounded = matrix(linear)
        self._groups = ColumnGroups(weight)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Output of the linear with its scales as tuned so far."""
        out = _Scaled.apply(x, self.delta, self._rounded, self._groups)
        return out if self.bias is None else out + self.bias


def check_scales(grid: Grid, where: str) -> None:
    """Raise UserError for a format whose scales cannot be tuned; `where` is the option that the message names."""
    if not has_free_scales(grid):
        raise UserError(f"{where}: the format of grid={grid.label} leaves no freedom to tune its scales")


def tuned_linears(model: nn.Module, weights: Mapping[str, QuantizedWeight]) -> dict[str, TunedLinear]:
    """Replace every linear named in `weights` by a `TunedLinear`; the model must hold the dequantized weights."""
    tuned = {}
    for name, weight in weights.items():
        parent, _, last = name.rpartition(".")
        tuned[name] = TunedLinear(model.get_submodule(name), weight)
        setattr(model.get_submodule(parent), last, tuned[name])
    return tuned


def scale_rates(
    linears: Mapping[str, nn.Module], weights: Mapping[str, QuantizedWeight], lr: float
) -> list[dict[str, Any]]:
    """Optimizer parameter groups for all δ, each with its `largest` step, lr / 2^b.

    Such a step moves the last of 2^b codes by about lr codes: relative to the rounding error, the effect of a relative
    step of a scale doubles with every bit.
    """
    return [
        {"params": [linear.get_parameter("delta")], "largest": lr / (weights[name].grid.arithmetic.max_code + 1)}
        for name, linear in linears.items()
    ]


@torch.no_grad()
def rescaled(weight: QuantizedWeight, delta: Float[Tensor, "out groups"]) -> QuantizedWeight:
    """Quantized weight with scales s exp(δ), rounded to the format's scale precision; codes are unchanged."""
    scales, zeros = times(weight.grid, weight.scales, weight.zeros, delta.exp())
    return replace(weight, scales=scales, zeros=zeros, loss=None)
