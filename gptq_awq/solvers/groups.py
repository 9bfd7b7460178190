"""Scales and zeros of a weight's groups while a solver rounds it: fitted as the sweep reaches them, or all at once."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.grids.arithmetic import Params
from gptq_awq.grids.base import Fitted, Grid, concat_stores, fit_all, group_of_columns


@dataclass
class Groups:
    """Scales and zeros of a stack's groups, filled in span by span as the sweep fits them, or all at once."""

    grid: Grid
    scales: Float[Tensor, "out groups"]
    zeros: Float[Tensor, "out groups"]
    span_of_group: Int[Tensor, "groups"]
    stores: dict[int, Mapping[str, Tensor]]
    store: Mapping[str, Tensor] | None = None

    @classmethod
    def empty(cls, W: Tensor, group_of_column: Tensor, grid: Grid) -> "Groups":
        """Allocate the groups of W, none of them fitted yet."""
        columns, count = W.shape[1], int(group_of_column[-1]) + 1
        span_of_group = torch.zeros(count, dtype=torch.int64)
        span_of_group[group_of_column] = group_of_columns(columns, grid.span)
        return cls(grid, W.new_empty(len(W), count), W.new_empty(len(W), count), span_of_group, {})

    def all(self) -> Fitted:
        """Scales, zeros and stored tensors of all groups, once every span is fitted."""
        store = concat_stores([self.stores[span] for span in sorted(self.stores)]) if self.store is None else self.store
        return Fitted(self.scales, self.zeros, store)

    def fit_all(self, W: Tensor, hessian: Tensor | None) -> None:
        """Fit every span of W, whose columns are in natural order."""
        fitted = fit_all(self.grid, W, hessian)
        self.scales, self.zeros, self.store = fitted.scales, fitted.zeros, fitted.store
        self.stores = {span: {} for span in self.span_of_group.tolist()}

    def take(self, span: int, fitted: Fitted) -> None:
        """Enter the scales, zeros and stored tensors that were fitted to one span."""
        first = int((self.span_of_group < span).sum())
        groups = slice(first, first + fitted.scales.shape[1])
        self.scales[:, groups], self.zeros[:, groups] = fitted.scales, fitted.zeros
        self.stores[span] = fitted.store

    def per_column(self, group_of_column: Tensor) -> Params:
        """Scale and zero of each column, (out, columns) each, given the columns' groups."""
        return Fitted(self.scales, self.zeros).per_column(group_of_column)
