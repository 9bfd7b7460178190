"""Small floating-point numbers with shared scales, ŵ = s f(c): NVFP4, MXFP4, MXFP6, MXFP8 and FP8.

                elements   columns   rows        scale s of a group
  nvfp4         E2M1       16        1           E4M3 times a float32 per tensor
  mxfp4         E2M1       32        1           E8M0, a power of two (OCP Microscaling Formats 1.0)
  mxfp6, mxfp8  E3M2 …     32        1           E8M0
  fp8           E4M3       all, 128  1, all, 128 float32

How a scale is chosen among those that its format has (`search`):

  minmax        the largest weight meets the largest number (E8M0: the power of two at or below that, as OCP has it)
  four_over_six of that and the scale at which the largest weight meets 4 instead of 6, the one with the lower squared
                error (arXiv 2512.02010): E2M1 has nothing between 4 and 6
  mse, hessian  of all scales near, the one with the least error of weights or outputs (search.py)

NVFP4's scale of the tensor brings the largest block's scale to the top of E4M3's range. Linears that engines fuse (q, k
and v; gate and up) share it, so it is chosen before any weight is rounded: see `Grid.for_weights`. It is a power of
two here: a smaller step than that changes nothing but where E4M3 underflows, and every product of scales and codes is
exact, in whatever order an engine computes it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.grids.arithmetic import Arithmetic
from gptq_awq.grids.base import Fitted, SearchedGrid
from gptq_awq.grids.floats import FLOAT_TYPES, FloatType, decode_float, encode_float
from gptq_awq.grids.search import least_error_together, search_ranges, shrinks
from gptq_awq.runtime.options import GroupSize, PositiveFloat, checked_dataclass

E4M3 = FLOAT_TYPES["e4m3"]
TOP = E4M3.largest
ROOM = 256.0
"""Scale of the largest NVFP4 block under a search, which may want it 1.5 times as large (arXiv 2512.02010)."""
NEAR = range(-8, 6)
"""E4M3 scales that a search tries, counted from the one of minmax: from half of it to 1.6 times as much."""
EXPONENTS = (0, 1, -1)
"""Powers of two that a search tries, from the one of minmax."""


@checked_dataclass
class ScaledFloatGrid(SearchedGrid):
    """Grid of small floating-point numbers with a scale per group.

    Attributes:
        element: type of the codes.
        group_size: columns that share a scale; -1 for the whole row.
        rows: rows that share a scale, 1 or 128; -1 for all of them.
        scale: type of the scales: e4m3 with a float32 per tensor, e8m0, or float32.
        search: how a group's scale is chosen, see the module's docstring.
        tensor_scale: the float32 per tensor; None until `for_weights` has chosen it, and without scale=e4m3.

    Raises:
        UserError: a combination that no format has.
    """

    element: Literal["e2m1", "e2m3", "e3m2", "e4m3", "e5m2"] = "e2m1"
    group_size: GroupSize = 16
    rows: Literal[1, 128, -1] = 1
    scale: Literal["e4m3", "e8m0", "float32"] = "e4m3"
    search: Literal["minmax", "four_over_six", "mse", "hessian"] = "minmax"
    tensor_scale: PositiveFloat | None = None

    def __post_init__(self) -> None:
        if self.rows != 1 and self.scale != "float32":
            raise UserError(f"grid.rows={self.rows}: scales of several rows are float32; choose grid.scale=float32")
        if self.search == "four_over_six" and self.element != "e2m1":
            raise UserError("grid.search=four_over_six: chooses between FP4's numbers 4 and 6; choose mse or hessian")
        if self.search == "four_over_six" and self.scale == "e8m0":
            raise UserError(
                "grid.search=four_over_six: powers of two aren't 1.5 times each other; choose mse or hessian"
            )

    @property
    def bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Stored bits of a code."""
        return self._type.bits

    @property
    def label(self) -> str:
        """Name of the format in tables."""
        if self.scale == "float32":
            return {"e4m3": "fp8", "e5m2": "fp8_e5m2"}.get(self.element, f"{self.element}_float32")
        names = {"e4m3": "nvfp", "e8m0": "mxfp"}
        variant = "" if self.element in ("e2m1", "e3m2", "e4m3") else f"_{self.element}"
        return f"{names[self.scale]}{self.bits}{variant}"

    @property
    def arithmetic(self) -> Arithmetic:
        """Arithmetic of the element type."""
        return Arithmetic.of_float(self._type)

    @property
    def overhead_bits(self) -> float:
        """Stored bits of a group's scale, of each row's share where rows share one."""
        bits = 32 if self.scale == "float32" else 8
        return bits if self.rows == 1 else bits / 128 if self.rows == 128 else 0

    @property
    def rows_independent(self) -> bool:
        """Whether each row has scales of its own."""
        return self.rows == 1

    @property
    def shared_by_tensor(self) -> bool:
        """Whether the format has a scale per tensor, which `for_weights` chooses."""
        return self.scale == "e4m3"

    def for_weights(self, weights: Sequence[Float[Tensor, "_ in"]]) -> "ScaledFloatGrid":
        """This grid with the float32 scale of these weights together; itself without scale=e4m3, or once it has one."""
        if not self.shared_by_tensor or self.tensor_scale is not None:
            return self
        largest = max((float(w.abs().max()) for w in weights if w.numel()), default=0.0)
        top = TOP if self.search == "minmax" else ROOM
        exponent = math.ceil(math.log2(largest / (self._type.largest * top))) if largest else 0
        return replace(self, tensor_scale=2.0 ** max(exponent, -100))

    def check_columns(self, columns: int, where: str) -> None:
        """Raise UserError for a number of columns that is no multiple of the group's."""
        if self.group_size != -1 and columns % self.group_size:
            raise UserError(
                f"grid={self.label}: {where} has {columns} columns, not a multiple of {self.group_size}; "
                "grid=fp8 with grid.group_size=-1 takes any width"
            )

    def fit(self, w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "*spans cols cols"] | None = None) -> Fitted:
        """Fit the scale of every row, or of the rows that share one.

        Raises:
            ValueError: `search=hessian` gets no Hessian block, or the tensor's scale isn't chosen yet.
        """
        largest = w.abs().amax(1, keepdim=True)
        if self.rows != 1:
            return self._fit_together(w, largest, hessian)
        scales = {"e4m3": self._block_scales, "e8m0": self._powers_of_two, "float32": self._floats}[self.scale](largest)
        if scales.shape[1] > 1:
            search, h = self.search, hessian
            if search == "four_over_six":  # squared errors of weights: of outputs whose inputs are white
                search, h = "hessian", torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
            scales, _ = search_ranges(w, scales, torch.zeros_like(scales), self.arithmetic, search, h)
        return Fitted(scales, torch.zeros_like(scales))

    @property
    def _type(self) -> FloatType:
        return FLOAT_TYPES[self.element]

    def _block_scales(self, largest: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows n"]:
        """E4M3 scales times the tensor's: that which the largest weight meets, then those of the search."""
        if self.tensor_scale is None:
            raise ValueError("NVFP4 needs the scale of its tensor: call for_weights first")
        wanted = largest / self._type.largest / self.tensor_scale
        if self.search == "four_over_six":
            wanted = torch.cat([wanted, wanted * (6.0 / 4.0)], 1)
        codes = encode_float(wanted, E4M3.mantissa, E4M3.least, TOP).clamp(min=1)  # 0 would flush the block
        if self.search in ("mse", "hessian"):
            steps = sorted(NEAR, key=lambda step: step != 0)  # minmax first, so that it wins a tie
            codes = (codes + torch.tensor(steps).to(codes)).clamp(1, 126)
        return decode_float(codes, E4M3.mantissa, E4M3.least) * self.tensor_scale

    def _powers_of_two(self, largest: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows n"]:
        _, exponent = torch.frexp(largest.clamp(min=2.0**-126))
        exponent = exponent - 1 - self._type.largest_exponent
        if self.search != "minmax":
            exponent = exponent + torch.tensor(EXPONENTS, device=exponent.device)
        return torch.ldexp(largest.new_ones(exponent.shape), exponent.clamp(-126, 127))

    def _floats(self, largest: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows n"]:
        scale = largest / self._type.largest
        return scale if self.search == "minmax" else scale * shrinks(largest)

    def _fit_together(self, w: Tensor, largest: Tensor, hessian: Tensor | None) -> Fitted:
        """Fit the scale of every `rows` neighbouring rows, and give it to each of them."""
        count = len(w) if self.rows == -1 else self.rows
        together = torch.arange(len(w), device=w.device) // count
        top = largest.new_zeros(int(together[-1]) + 1, 1).scatter_reduce_(0, together[:, None], largest, "amax")
        scales = self._floats(top)
        if scales.shape[1] > 1:
            scales = least_error_together(w, scales, together, self.arithmetic, self.search, hessian)
        return Fitted(scales[together], torch.zeros_like(largest))


def block_scales(scales: Float[Tensor, "rows groups"], tensor_scale: float) -> Float[Tensor, "rows groups"]:
    """E4M3 scales of blocks, given their scales in weight units: exact, as the tensor's is a power of two."""
    return scales / tensor_scale
