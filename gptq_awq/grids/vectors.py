"""llama.cpp's grids of vectors, IQ2_XXS to IQ3_S: four or eight columns' magnitudes are one entry of a codebook.

    ŵ = d u (2σ + 1) · ±m     m an entry's magnitudes, σ 4 bits per sub-block, d float16 per block of 256, u a constant

            entries   columns   signs             sub-block   u      bits per weight
  IQ2_XXS   256       8         7 bits of eight   32          1/8    2.0625
  IQ2_XS    512       8         7 bits of eight   16          1/8    2.3125
  IQ2_S     1024      8         free              16          1/8    2.5625
  IQ3_XXS   256       4         7 bits of eight   32          1/4    3.0625
  IQ3_S     512       4         free              32          1      3.4375

7 bits of eight: the number of negative signs is even. Codes here are of single columns (a level and a sign), so that
everything but rounding treats such a weight as any other; rounding sees whole vectors, in the block form of GPTQ's
recursion (LDLQ, arXiv 2307.13304; with codebooks, QuIP#, arXiv 2402.04396). Codebooks are read from the gguf library.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import gguf
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.grids.arithmetic import Arithmetic, Params
from gptq_awq.grids.base import Fitted, SearchedGrid, sub_blocks
from gptq_awq.grids.kquant import BLOCK, half
from gptq_awq.grids.search import search_ranges
from gptq_awq.kernels.vectors import UNIT, sweep_vectors
from gptq_awq.runtime.options import Search, checked_dataclass

MOST = 15
"""Largest σ."""
CANDIDATES = {4: 24, 8: 32}
"""Entries that are tried for a vector, by its columns; 32 at most (kernels/vectors.py)."""
COARSE, FINE = tuple(0.8**i for i in range(7)), (1.0, 0.97, 1.03, 0.94, 1.06)
"""Ranges of a sub-block that are tried: in parts of the widest, then in parts of the best of these."""


@dataclass(frozen=True)
class VectorType:
    """Layout of one of llama.cpp's vector types.

    Attributes:
        index: bits of an entry's index.
        columns: columns of an entry.
        sub_block: columns that share σ.
        unit: u of the module's docstring.
        even: whether the number of negative signs in eight columns is even.
    """

    index: int
    columns: int
    sub_block: int
    unit: float
    even: bool


VECTOR_TYPES = {
    "iq2_xxs": VectorType(8, 8, 32, 1 / 8, even=True),
    "iq2_xs": VectorType(9, 8, 16, 1 / 8, even=True),
    "iq2_s": VectorType(10, 8, 16, 1 / 8, even=False),
    "iq3_xxs": VectorType(8, 4, 32, 1 / 4, even=True),
    "iq3_s": VectorType(9, 4, 32, 1.0, even=False),
}


@dataclass(frozen=True)
class Codebook:
    """Entries of a vector type.

    Attributes:
        magnitudes: (v, K) of the entries.
        levels: (L,) the different magnitudes, ascending.
        indices: (K, v) each magnitude's index among the levels.
        middles: (L - 1,) middles between levels.
        near: (L^v, C) the entries nearest to each point of the lattice of all levels, of which the first column's
            level is the most significant digit; the nearest first.
    """

    magnitudes: Float[np.ndarray, "columns entries"]
    levels: Float[np.ndarray, "levels"]
    indices: Int[np.ndarray, "entries columns"]
    middles: Float[np.ndarray, "gaps"]
    near: Int[np.ndarray, "points candidates"]

    @property
    def entries(self) -> Float[np.ndarray, "entries columns"]:
        """The entries' magnitudes."""
        return self.magnitudes.T


@lru_cache
def codebook(name: str) -> Codebook:
    """Codebook of a vector type, as the gguf library has it."""
    kind: Any = getattr(gguf.quants, name.upper())
    kind.init_grid()
    entries = np.ascontiguousarray(kind.grid[0, 0], np.float32)
    levels, indices = np.unique(entries, return_inverse=True)
    indices = indices.reshape(entries.shape).astype(np.int32)
    points = levels[np.indices((len(levels),) * entries.shape[1]).reshape(entries.shape[1], -1).T]
    distances = (points**2).sum(1, keepdims=True) - 2 * points @ entries.T + (entries**2).sum(1)  # whole numbers: exact
    near = np.argsort(distances, 1, kind="stable")[:, : CANDIDATES[entries.shape[1]]].astype(np.uint32)
    return Codebook(entries.T.copy(), levels, indices, (levels[1:] + levels[:-1]) / 2, np.ascontiguousarray(near))


@checked_dataclass
class VectorGrid(SearchedGrid):
    """One of llama.cpp's grids of vectors.

    Attributes:
        type: iq2_xxs, iq2_xs, iq2_s, iq3_xxs or iq3_s.
        search: how sub-blocks' scales are chosen: minmax, or mse (search.py), as if columns were rounded one by one.
            hessian is mse, too: where later columns make up for an error, weighing it by H left up to a third more
            KL at two bits (docs/log.md, 2026-11-29).

    Raises:
        UserError: an unknown type or search.
    """

    type: Literal["iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"] = "iq3_s"
    search: Search = "mse"

    @property
    def _type(self) -> VectorType:
        return VECTOR_TYPES[self.type]

    @property
    def bits(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Stored bits of a column's share of an entry, and of its sign."""
        return self._type.index / self._type.columns + (7 / 8 if self._type.even else 1)

    @property
    def group_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Columns of a sub-block, which share a scale."""
        return self._type.sub_block

    @property
    def label(self) -> str:
        """Name of the format in llama.cpp, for tables."""
        return self.type

    @property
    def span(self) -> int:
        """Columns of a block, which are fitted together."""
        return BLOCK

    @property
    def unit(self) -> int:
        """Columns that are rounded together."""
        return UNIT if self._type.even else self._type.columns

    @property
    def arithmetic(self) -> Arithmetic:
        """Arithmetic of single columns: levels, then the same with a negative sign."""
        levels = codebook(self.type).levels.tolist()
        return Arithmetic("table", 2 * len(levels) - 1, (*levels, *(-level for level in levels)))

    @property
    def overhead_bits(self) -> float:
        """Stored bits per sub-block besides the codes: σ, and its share of d."""
        return 4 + 16 * self.group_size / BLOCK

    @property
    def stored_dtype(self) -> str:
        """Dtype of a block's d: float16."""
        return "float16"

    def check_columns(self, columns: int, where: str) -> None:
        """Raise UserError for a number of columns that is no multiple of 256, the columns of a block."""
        if columns % BLOCK:
            raise UserError(
                f"grid={self.type}: {where} has {columns} columns, not a multiple of {BLOCK}; grid=iq4_nl and "
                "grid=q4_0 need multiples of 32 only"
            )

    @property
    def needs_hessian(self) -> bool:
        """False, whatever the search."""
        return False

    def fit(self, w: Float[Tensor, "rows 256"], hessian: Float[Tensor, "*spans 256 256"] | None = None) -> Fitted:
        """Fit the scales of one block of 256 columns."""
        del hessian
        parts, _ = sub_blocks(w, None, self.group_size)
        # 1. Every sub-block's own scale.
        scales = self._own_scale(parts).view(len(w), -1)
        # 2. The block's: the largest sub-block gets the largest σ.
        unit = self._type.unit
        d = half(scales.amax(1, keepdim=True) / (unit * (2 * MOST + 1)))
        sigma = torch.where(d == 0, 0.0, torch.round((scales / (d * unit) - 1) / 2)).clamp(0, MOST)
        # 3. The nearest σ, or its best neighbour.
        if self.search != "minmax":
            near = (sigma[..., None] + w.new_tensor([0, -1, 1])).clamp(0, MOST)
            best = self._best(parts, (d[..., None] * unit * (2 * near + 1)).flatten(0, 1)).view(len(w), -1)
            sigma = torch.where(d == 0, 0.0, torch.round((best / (d * unit) - 1) / 2))
        scales = d * unit * (2 * sigma + 1)
        return Fitted(scales, torch.zeros_like(scales), {"d": d, "scale_codes": sigma})

    def _own_scale(self, w: Float[Tensor, "parts size"]) -> Float[Tensor, "parts 1"]:
        """Scale of every sub-block by itself."""
        scale = w.abs().amax(1, keepdim=True) / float(codebook(self.type).levels[-1])
        if self.search == "minmax":
            return scale
        coarse = self._best(w, scale * w.new_tensor(COARSE))
        return self._best(w, coarse * w.new_tensor(FINE))

    def _best(self, w: Tensor, scales: Tensor) -> Float[Tensor, "parts 1"]:
        """The best of each row's candidates (rows, n) for a sub-block's scale."""
        return search_ranges(w.abs(), scales, torch.zeros_like(scales), self._magnitudes, "mse", None)[0]

    @property
    def _magnitudes(self) -> Arithmetic:
        """Arithmetic of magnitudes: signs don't matter to a scale, and half the levels are enough."""
        levels = codebook(self.type).levels.tolist()
        return Arithmetic("table", len(levels) - 1, tuple(levels))

    def encode(self, w: Float[Tensor, "rows cols"], params: Params) -> Float[Tensor, "rows cols"]:
        """Codes of the entries nearest to the weights, in whole units of columns."""
        codes, errors = torch.empty_like(w), torch.empty_like(w)
        eye = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
        self.sweep(w[None].clone(), eye[None], params[0].expand_as(w)[None], codes[None], errors[None])
        return codes

    def sweep(
        self,
        w: Float[Tensor, "stacks rows block"],
        u: Float[Tensor, "stacks block block"],
        scale: Float[Tensor, "stacks rows block"],
        codes: Float[Tensor, "stacks rows block"],
        errors: Float[Tensor, "stacks rows block"],
    ) -> None:
        """Round a block of columns, unit by unit; later columns make up for the errors of earlier ones.

        Args:
            w: the block's weights, changed in place.
            u: the block's diagonal part of the upper factor of each stack's inverse Hessian.
            scale: each column's scale.
            codes: written.
            errors: written: (w - q) / U_ii of each column, as it is when its turn comes.
        """
        book, parts = codebook(self.type), [x.cpu().contiguous() for x in (w, u, scale, codes, errors)]
        own, factor, scales, written, left = (x.numpy() for x in parts)
        sweep_vectors(
            own,
            factor,
            scales,
            book.magnitudes,
            book.indices,
            book.middles,
            book.near,
            self._type.even,
            written,
            left,
        )
        for given, computed in ((w, parts[0]), (codes, parts[3]), (errors, parts[4])):
            if given.data_ptr() != computed.data_ptr():
                given.copy_(computed)
