"""Grid, the number format that weights are rounded to, and QuantizedWeight, a weight rounded to one.

A grid sees one span of columns at a time: `fit` chooses a scale and a zero per row and group, `encode` rounds to
integer codes, `decode` maps codes back. Solvers decide *which* grid point a weight is rounded to; grids
only define the points. A new number format is one file with one frozen dataclass that derives from `Grid`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from gptq_awq.grids.arithmetic import Arithmetic, Params
from gptq_awq.storage.checksummed import ChecksummedFile

AT_ONCE = 2**22
"""Entries of a weight that are encoded or decoded at a time."""


@dataclass(frozen=True)
class Fitted:
    """Scales and zeros fitted to some groups of columns.

    Attributes:
        scales: (rows, groups), in weight units.
        zeros: (rows, groups), in the units that the grid's `Arithmetic` defines.
        store: tensors that the format stores in place of these, where it quantizes scales: the second level of
            k-quants or of double quantization. Of any width; those of spans are concatenated along dimension 1.
    """

    scales: Float[Tensor, "rows groups"]
    zeros: Float[Tensor, "rows groups"]
    store: Mapping[str, Tensor] = field(default_factory=dict)

    def per_column(self, group_of_column: Int[Tensor, "cols"]) -> Params:
        """Scale and zero of each column, (rows, cols) each."""
        index = group_of_column.to(self.scales.device)
        # Not scales[:, index], which takes ten times as long.
        return self.scales.index_select(1, index), self.zeros.index_select(1, index)

    def rows(self, rows: slice) -> "Fitted":
        """Scales and zeros of some rows, of a grid that fits rows independently."""
        store = {name: x[rows] for name, x in self.store.items()}
        return Fitted(self.scales[rows], self.zeros[rows], store)

    def split(self, sizes: Sequence[int]) -> "list[Fitted]":
        """Split into consecutive parts of the given numbers of rows, each a copy."""
        ends = list(accumulate(sizes))
        parts = [self.rows(slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
        return [Fitted(p.scales.clone(), p.zeros.clone(), {k: x.clone() for k, x in p.store.items()}) for p in parts]


@dataclass(frozen=True)
class Place:
    """Place of a weight in a model, by which a `GridChoice` chooses its grid.

    Attributes:
        name: full name of the module in the model.
        columns: number of columns of its weight.
        block: index of its block, -1 outside of the blocks.
        blocks: number of blocks.
        shared_kv: query heads per key-value head.
        tied: whether the module is an embedding that is the output head too.
        head: whether it is an output head that is to be quantized, whatever the mix does with heads by default.
    """

    name: str
    columns: int
    block: int = -1
    blocks: int = 0
    shared_kv: int = 1
    tied: bool = False
    head: bool = False


@runtime_checkable
class GridChoice(Protocol):
    """Choice of a grid for each weight: one for all (`Grid`), or a mix."""

    @property
    def bits(self) -> float:
        """Stored bits of most weights' codes, for tables."""
        ...

    @property
    def group_size(self) -> int:
        """Group size of most weights, for tables."""
        ...

    @property
    def needs_hessian(self) -> bool:
        """Whether `fit` of any of its grids needs a Hessian."""
        ...

    @property
    def label(self) -> str:
        """Name of the grid in tables."""
        ...

    def at(self, place: Place) -> "Grid | None":
        """Grid of the weight at a place; None leaves the weight unquantized."""
        ...


class Grid(ABC):
    """A number format: the points that weights may be rounded to, given a scale and a zero per row and group."""

    group_size: int
    """Columns that share a scale; -1 means all of them."""

    bits: float
    """Stored bits of one code."""

    @property
    @abstractmethod
    def arithmetic(self) -> Arithmetic:
        """Arithmetic that maps codes to weights, given a scale and a zero."""

    @property
    @abstractmethod
    def overhead_bits(self) -> float:
        """Stored bits per row and group besides the codes: scales and zeros."""

    @property
    @abstractmethod
    def needs_hessian(self) -> bool:
        """Whether `fit` needs the span's diagonal block of the Hessian."""

    @abstractmethod
    def without_search(self) -> "Grid":
        """This grid with its cheapest fit, which needs no Hessian."""

    @abstractmethod
    def fit(self, w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "*spans cols cols"] | None = None) -> Fitted:
        """Choose scale and zero for every row and group of one span.

        Each row is fitted independently where `rows_independent`, and where a span is only a part of the weight, so
        that `fit_all` can pass neighbouring spans as rows: with a stack of n Hessian blocks, row k is of span k mod n.
        """

    @property
    def label(self) -> str:
        """Name of the grid in tables."""
        return type(self).__name__.removesuffix("Grid").lower()

    def at(self, place: Place) -> "Grid | None":
        """This grid inside of blocks and for a head with `place.head`; None for embeddings and other heads."""
        return self if place.block >= 0 or place.head else None

    @property
    def stored_dtype(self) -> str:
        """Dtype that scales are stored in, those of super-blocks where groups' scales are codes themselves."""
        return getattr(self, "scale_dtype", "float32")

    @property
    def span(self) -> int:
        """Number of columns fitted together, a multiple of `group_size` (a super-block); -1 means all of them."""
        return self.group_size

    @property
    def unit(self) -> int:
        """Number of neighbouring columns that are rounded together: 1, or those of a vector."""
        return 1

    @property
    def rows_independent(self) -> bool:
        """Whether fitting a part of a weight's rows gives them the same scales as fitting all rows."""
        return self.span != -1 or self.group_size == -1

    @property
    def shared_by_tensor(self) -> bool:
        """Whether the format stores something once per weight, which `for_weights` chooses."""
        return False

    def for_weights(self, weights: Sequence[Float[Tensor, "_ in"]]) -> "Grid":  # noqa: ARG002
        """This grid for some whole weights, with what they share: NVFP4's scale of the tensor. Else the grid itself.

        The linears of a site are given together, as engines fuse them.
        """
        return self

    def check_columns(self, columns: int, where: str) -> None:  # noqa: B027 (most grids take any width)
        """Raise UserError where the format cannot hold a weight of that many columns; `where` names the weight."""

    def encode(self, w: Float[Tensor, "rows cols"], params: Params) -> Float[Tensor, "rows cols"]:
        """Codes of the grid points nearest to the weights (integers from 0, in a float tensor)."""
        return self.arithmetic.encode(w, params)

    def decode(self, codes: Float[Tensor, "rows cols"], params: Params) -> Float[Tensor, "rows cols"]:
        """Weights that the codes stand for."""
        return self.arithmetic.decode(codes, params)


class SearchedGrid(Grid):
    """A grid whose ranges may be searched for: `search` says how (search.py)."""

    search: str
    """How a group's range is chosen; "hessian" is the only search that reads the Hessian."""

    @property
    def needs_hessian(self) -> bool:
        """True for `search=hessian`."""
        return self.search == "hessian"

    def without_search(self) -> Self:
        """This grid with ranges that come from the weights themselves, without a search."""
        grid: Any = self  # a dataclass, as all grids are
        return replace(grid, search="minmax")


def extremes(w: Float[Tensor, "rows cols"]) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """Smallest and largest weight of every row."""
    return w.amin(1, keepdim=True), w.amax(1, keepdim=True)  # aminmax over rows takes four times as long


def group_spans(columns: int, group_size: int) -> list[tuple[int, int]]:
    """First column and one past the last column of every group; the last group may be shorter."""
    size = columns if group_size == -1 else group_size
    return [(start, min(start + size, columns)) for start in range(0, columns, size)]


def group_of_columns(columns: int, group_size: int) -> Int[Tensor, "in"]:
    """Index of the group that each column belongs to, for groups of neighbouring columns."""
    return torch.arange(columns) // (columns if group_size == -1 else group_size)


def fit_all(grid: Grid, w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "cols cols"] | None) -> Fitted:
    """Fit every span of a weight in natural column order; `hessian` is read only where the grid needs it."""
    hessian = hessian if grid.needs_hessian else None
    columns = w.shape[1]
    size = columns if grid.span == -1 else grid.span
    count = columns // size
    whole = count * size
    if count <= 1 or not grid.rows_independent:
        spans = group_spans(columns, size)
        return concat_columns([grid.fit(w[:, a:b], None if hessian is None else hessian[a:b, a:b]) for a, b in spans])
    blocks = None if hessian is None else diagonal_blocks(hessian[:whole, :whole], count)
    parts = [_fit_rows(grid, w[rows], hessian, size, blocks) for rows in row_parts(w)]
    scales, zeros = (torch.cat([getattr(part, name) for part in parts]) for name in ("scales", "zeros"))
    return Fitted(scales, zeros, {name: torch.cat([part.store[name] for part in parts]) for name in parts[0].store})


def _fit_rows(
    grid: Grid,
    w: Float[Tensor, "rows cols"],
    hessian: Float[Tensor, "cols cols"] | None,
    size: int,
    blocks: Float[Tensor, "count size size"] | None,
) -> Fitted:
    """Fit all spans to some rows of a weight; `blocks` are the Hessian's diagonal blocks of the whole spans."""
    (rows, columns), count = w.shape, w.shape[1] // size
    whole = count * size  # the whole spans at once, as rows
    parts = [_unstacked(grid.fit(w[:, :whole].reshape(rows * count, size), blocks), rows)]
    if whole < columns:
        parts.append(grid.fit(w[:, whole:], None if hessian is None else hessian[whole:, whole:]))
    return concat_columns(parts)


def nearest(grid: Grid, w: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """Weights rounded to nearest and dequantized, on the grid fitted without a search."""
    grid = grid.without_search().for_weights([w])
    out = torch.empty_like(w)
    for rows in row_parts(w) if grid.rows_independent else [slice(None)]:
        out[rows] = _nearest(grid, w[rows])
    return out


def row_parts(w: Float[Tensor, "rows cols"] | UInt8[Tensor, "rows cols"]) -> Iterator[slice]:
    """Slices of rows to process one after the other, so that temporaries stay small beside the result."""
    step = max(1, AT_ONCE // w.shape[1])
    yield from (slice(first, first + step) for first in range(0, len(w), step))


def _nearest(grid: Grid, w: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    fitted, size = fit_all(grid, w, None), grid.group_size
    rows, columns = w.shape
    if size == -1 or columns % size:
        params = fitted.per_column(group_of_columns(columns, size))
        return grid.decode(grid.encode(w, params), params)
    groups = w.reshape(-1, size)  # one row per group, so that scales broadcast instead of being copied to columns
    params = fitted.scales.reshape(-1, 1), fitted.zeros.reshape(-1, 1)
    return grid.decode(grid.encode(groups, params), params).view(rows, columns)


def diagonal_blocks(hessian: Float[Tensor, "*spans cols cols"], count: int) -> Float[Tensor, "blocks size size"]:
    """Cut the diagonal of a Hessian, or of each of a stack, into the blocks of `count` equal spans."""
    size = hessian.shape[-1] // count
    blocks = hessian.reshape(-1, count, size, count, size).diagonal(dim1=1, dim2=3)
    return blocks.permute(0, 3, 1, 2).reshape(-1, size, size).contiguous()


def sub_blocks(
    w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "*spans cols cols"] | None, size: int
) -> tuple[Float[Tensor, "parts size"], Float[Tensor, "blocks size size"] | None]:
    """Every row's sub-blocks of `size` columns as rows, and their Hessian blocks, as `Grid.fit` takes spans."""
    count = w.shape[1] // size
    return w.reshape(-1, size), None if hessian is None else diagonal_blocks(hessian, count)


def _unstacked(fitted: Fitted, rows: int) -> Fitted:
    """Reshape scales and zeros that were fitted to spans as rows into the groups of `rows` rows."""
    store = {name: x.reshape(rows, -1) for name, x in fitted.store.items()}
    return Fitted(fitted.scales.reshape(rows, -1), fitted.zeros.reshape(rows, -1), store)


def concat_columns(parts: list[Fitted]) -> Fitted:
    """Concatenate scales, zeros and stores of neighbouring spans, in the order of their columns."""
    if len(parts) == 1:
        return parts[0]
    scales, zeros = torch.cat([p.scales for p in parts], 1), torch.cat([p.zeros for p in parts], 1)
    return Fitted(scales, zeros, concat_stores([part.store for part in parts]))


def concat_stores(stores: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the stores of neighbouring spans along their columns."""
    return {name: torch.cat([store[name] for store in stores], 1) for name in stores[0]}


@dataclass(frozen=True)
class QuantizedWeight:
    """One linear's quantized weight: exactly what a checkpoint stores.

    Attributes:
        codes: integer codes, (out, in), columns in the layer's own order.
        scales: (out, groups), in weight units.
        zeros: (out, groups), in code units (affine arithmetic) or weight units (minimum).
        group_of_column: (in,), the group of each column (`g_idx`); natural order unless act_order permuted it.
        grid: number format of the weight.
        loss: the solver's own objective ½ tr(ΔHΔᵀ) (H damped, as GPTQ sums it), None where no H was given.
        store: see `Fitted.store`.
    """

    codes: UInt8[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
    zeros: Float[Tensor, "out groups"]
    group_of_column: Int[Tensor, "in"]
    grid: Grid
    loss: float | None = None
    store: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        grid: Grid,
        codes: Float[Tensor, "out in"] | UInt8[Tensor, "out in"],
        fitted: Fitted,
        group_of_column: Int[Tensor, "in"],
        loss: float | None = None,
    ) -> "QuantizedWeight":
        """Assemble a weight from the codes that a solver chose and the groups that it fitted."""
        return cls(codes.to(torch.uint8), fitted.scales, fitted.zeros, group_of_column, grid, loss, fitted.store)

    @classmethod
    def concat_rows(cls, parts: "Sequence[QuantizedWeight]") -> "QuantizedWeight":
        """Concatenate parts of a weight's rows into one weight, of a grid that fits rows independently."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        codes, scales, zeros = (torch.cat([getattr(p, name) for p in parts]) for name in ("codes", "scales", "zeros"))
        loss = None if first.loss is None else sum(p.loss for p in parts if p.loss is not None)
        store = {name: torch.cat([p.store[name] for p in parts]) for name in first.store}
        return cls(codes, scales, zeros, first.group_of_column, first.grid, loss, store)

    def rows(self, index: Int[Tensor, "rows"]) -> "QuantizedWeight":
        """Rows by index, in that order, of a grid that fits rows independently; the loss stays the whole weight's."""
        store = {name: x[index] for name, x in self.store.items()}
        return replace(self, codes=self.codes[index], scales=self.scales[index], zeros=self.zeros[index], store=store)

    def dequantize(self) -> Float[Tensor, "out in"]:
        """Dequantized weight, as an inference engine computes with it."""
        out = torch.empty_like(self.codes, dtype=self.scales.dtype)
        for rows in row_parts(self.codes):
            params = Fitted(self.scales[rows], self.zeros[rows]).per_column(self.group_of_column)
            out[rows] = self.grid.decode(self.codes[rows].to(out.dtype), params)
        return out

    def sha256(self) -> str:
        """Hash of all that a checkpoint stores: codes, scales, zeros, column order, and the tensors of `store`."""
        stored = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros, "groups": self.group_of_column}
        return ChecksummedFile(
            stored | {f"store/{name}": x for name, x in self.store.items()}, {"grid": str(self.grid)}
        ).sha256()

    @property
    def natural_order(self) -> bool:
        """Whether groups consist of neighbouring columns, so that no g_idx is needed."""
        columns = self.codes.shape[1]
        return bool((self.group_of_column.cpu() == group_of_columns(columns, self.grid.group_size)).all())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: codes, scales, zeros, and the column order where it isn't natural."""
        order_bits = 0 if self.natural_order else 32 * self.codes.shape[1]
        stored = self.codes.numel() * self.grid.bits + self.scales.numel() * self.grid.overhead_bits + order_bits
        return stored / self.codes.numel()
