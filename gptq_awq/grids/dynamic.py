"""Quantization of activations: scales follow each row while the model runs (dynamic), or are a linear's own (static).

A row is the set of numbers that share a scale: a token's channels (SmoothQuant, arXiv 2211.10438, per token; QuaRot,
arXiv 2404.00456), one head's part of a cached key or value, or groups of either. With c the clip ratio and B the bits,

    symmetric   s = c max|x| / (2^(B-1) - 1)                 x̂ = s · clamp(round(x / s), -2^(B-1), 2^(B-1) - 1)
    asymmetric  s = c (max(x, 0) - min(x, 0)) / (2^B - 1)    x̂ = s · (clamp(round(x / s) + z, 0, 2^B - 1) - z)
                z = round(-c min(x, 0) / s)
    fp8         s = max|x| / 448                             x̂ = s · E4M3(x / s)
    mxfp4       s = 2^(⌊log₂ max|x|⌋ - 2)                    x̂ = s · E2M1(x / s)        in groups of 32
    nvfp4       s = t E4M3(max|x| / 6t)                      x̂ = s · E2M1(x / s)        in groups of 16

NVFP4's scale t of a whole token is the power of two that brings its largest block's scale to the top of E4M3's range.

Static (`static=true`), max|x| is the largest input of the linear that calibration saw in full precision, for all
tokens: s of integers and of FP8 is one number then, and NVFP4's t is max|x| / (6 · 448), while its groups' scales still
follow the numbers. Inputs beyond it are clamped. Checkpoints with input scales store that (in compressed-tensors' names
`input_scale`, and 1 / t as `input_global_scale`), and engines compute by it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.grids.floats import FLOAT_TYPES, nearest_float
from gptq_awq.runtime.options import GroupSize, checked_dataclass

E2M1, E4M3 = FLOAT_TYPES["e2m1"], FLOAT_TYPES["e4m3"]
E4M3_MAX = E4M3.largest
TINY = torch.finfo(torch.float32).tiny
"""Smallest scale, so that a row of zeros stays zero."""
_E4M3_STEP = torch.finfo(torch.float8_e4m3fn).eps
"""Scale that compressed-tensors gives a group whose own is below E4M3's smallest number."""


@runtime_checkable
class DynamicGrid(Protocol):
    """A number format that activations are rounded to while the model runs."""

    @property
    def label(self) -> str | None:
        """Name of the format in tables; None where activations are not rounded."""
        ...

    @property
    def static(self) -> bool:
        """Whether scales are a linear's own, from the largest input that calibration saw."""
        ...

    def rounded(
        self, x: Float[Tensor, "*rows channels"], largest: float | None = None
    ) -> Float[Tensor, "*rows channels"]:
        """Round `x` to the grid and back, in its dtype; static grids need the `largest` magnitude of calibration.

        Raises:
            ValueError: groups don't divide the channels.
        """
        ...


@dataclass(frozen=True)
class Unrounded:
    """Unquantized activations: the A16 of W4A16."""

    label: None = None
    static: bool = False

    def rounded(
        self,
        x: Float[Tensor, "*rows channels"],
        largest: float | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "*rows channels"]:
        """Return `x` unchanged."""
        return x


@checked_dataclass
class DynamicInt:
    """Integer format of activations, with a scale (and, asymmetric, a zero) per row.

    Attributes:
        bits: bits of a code, 2 to 16.
        sym: whether the range is symmetric about zero.
        group_size: channels that share a scale; -1: all of the row.
        clip: ratio c of the range that is kept, above 0 and up to 1.
        static: whether the scale is a linear's own, from calibration.

    Raises:
        UserError: a value out of range, or a static scale of groups or with a zero; the message names the option.
    """

    bits: Annotated[int, Interval(ge=2, le=16)] = 8
    sym: bool = True
    group_size: GroupSize = -1
    clip: Annotated[float, Interval(gt=0, le=1)] = 1.0
    static: bool = False

    def __post_init__(self) -> None:
        if not self.sym:
            _refuse_static(self.static, "act.sym=false", "act.sym=true")
        if self.group_size != -1:
            _refuse_static(self.static, f"act.group_size={self.group_size}", "act.group_size=-1")

    @property
    def label(self) -> str:
        """Name of the format in tables, for example `int8` or `int4 asym g64 clip 0.9`."""
        sign, clip = "" if self.sym else " asym", "" if self.clip == 1 else f" clip {self.clip:g}"
        return f"int{self.bits}{sign}{_group_label(self.group_size)}{clip}{_static_label(self.static)}"

    def rounded(
        self, x: Float[Tensor, "*rows channels"], largest: float | None = None
    ) -> Float[Tensor, "*rows channels"]:
        """Round `x` to the grid and back, in its dtype. Raises ValueError where groups don't divide the channels."""
        rows = _rows(x, self.group_size)
        near = self._symmetric(rows, largest) if self.sym else self._asymmetric(rows)
        return near.reshape(x.shape).to(x.dtype)

    def _symmetric(self, x: Float[Tensor, "*rows row"], largest: float | None) -> Float[Tensor, "*rows row"]:
        scale, top = self.scale_of(_magnitude(x, self.static, largest)), 2 ** (self.bits - 1) - 1
        return (x / scale).round_().clamp_(-top - 1, top).mul_(scale)

    def scale_of(self, magnitude: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        """Symmetric scale of rows whose largest magnitudes are given."""
        return (self.clip / (2 ** (self.bits - 1) - 1) * magnitude).clamp_(min=TINY)

    def _asymmetric(self, x: Float[Tensor, "*rows row"]) -> Float[Tensor, "*rows row"]:
        top = 2**self.bits - 1
        low, high = (
            self.clip * x.amin(-1, keepdim=True).clamp_(max=0),
            self.clip * x.amax(-1, keepdim=True).clamp_(min=0),
        )
        scale = ((high - low) / top).clamp_(min=TINY)
        zero = (-low / scale).round_()
        return (x / scale).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(scale)


@checked_dataclass
class DynamicFP8:
    """E4M3 format of activations: 4 exponent and 3 mantissa bits (arXiv 2209.05433), with a float32 scale per row.

    Attributes:
        group_size: channels that share a scale; -1: all of the row.
        static: whether the scale is a linear's own, from calibration.

    Raises:
        UserError: a group_size out of range, or a static scale of groups; the message names the option.
    """

    group_size: GroupSize = -1
    static: bool = False

    def __post_init__(self) -> None:
        if self.group_size != -1:
            _refuse_static(self.static, f"act.group_size={self.group_size}", "act.group_size=-1")

    @property
    def label(self) -> str:
        """Name of the format in tables, for example `fp8` or `fp8 g128`."""
        return f"fp8{_group_label(self.group_size)}{_static_label(self.static)}"

    def rounded(
        self, x: Float[Tensor, "*rows channels"], largest: float | None = None
    ) -> Float[Tensor, "*rows channels"]:
        """Round `x` to the grid and back, in its dtype. Raises ValueError where groups don't divide the channels."""
        rows = _rows(x, self.group_size)
        scale = self.scale_of(_magnitude(rows, self.static, largest))
        near = (rows / scale).clamp_(-E4M3_MAX, E4M3_MAX)  # x / s may exceed the largest number by a rounding error
        return near.to(torch.float8_e4m3fn).float().mul_(scale).reshape(x.shape).to(x.dtype)

    def scale_of(self, magnitude: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        """Scale of rows whose largest magnitudes are given."""
        return (magnitude / E4M3_MAX).clamp_(min=TINY)


@checked_dataclass
class DynamicFloat4:
    """NVFP4 or MXFP4 format of activations: E2M1 numbers with a scale per group of channels.

    Attributes:
        scale: e4m3 (NVFP4, groups of 16), or e8m0 (MXFP4, groups of 32).
        static: whether NVFP4's scale of the tensor is a linear's own, from calibration.

    Raises:
        UserError: an unknown scale, or a static one of MXFP4, which has none of the tensor.
    """

    scale: Literal["e4m3", "e8m0"] = "e4m3"
    static: bool = False

    def __post_init__(self) -> None:
        if self.scale == "e8m0":
            _refuse_static(self.static, "act=mxfp4, which has no scale of the tensor", "act=nvfp4")

    @property
    def label(self) -> str:
        """Name of the format in tables."""
        return ("nvfp4" if self.scale == "e4m3" else "mxfp4") + _static_label(self.static)

    def rounded(
        self, x: Float[Tensor, "*rows channels"], largest: float | None = None
    ) -> Float[Tensor, "*rows channels"]:
        """Round `x` to the grid and back, in its dtype. Raises ValueError where groups don't divide the channels."""
        rows = _rows(x, 16 if self.scale == "e4m3" else 32)
        magnitude = rows.abs().amax(-1, keepdim=True)
        if self.scale == "e8m0":
            exponent = torch.frexp(magnitude.clamp(min=TINY)).exponent - 1 - E2M1.largest_exponent
            scale = torch.ldexp(torch.ones_like(magnitude), exponent.clamp(min=-126))
        elif self.static:
            # The steps of compressed-tensors in its order, so that scales that lie between two E4M3 numbers agree.
            stored = input_scale(_known(largest)).to(x.device)
            scale = nearest_float(stored * (magnitude / E2M1.largest), E4M3)
            scale = torch.where(scale > 0, scale, _E4M3_STEP) / stored
        else:
            top = magnitude.amax(-2, keepdim=True).clamp(min=2.0**-100) / (E2M1.largest * E4M3_MAX)
            token = torch.exp2(torch.log2(top).ceil())
            scale = token * nearest_float(magnitude / E2M1.largest / token, E4M3).clamp(min=2.0**-9)
        near = scale * nearest_float(rows / scale, E2M1)
        return torch.where(rows < 0, -near, near).reshape(x.shape).to(x.dtype)


def input_scale(largest: float) -> Float[Tensor, "1"]:
    """compressed-tensors' `input_global_scale` of NVFP4: 1 / t, which brings the largest scale to E4M3's top."""
    return torch.tensor([E4M3_MAX * E2M1.largest / max(largest, 1e-12)])


def _magnitude(x: Float[Tensor, "*rows row"], static: bool, largest: float | None) -> Tensor:
    """Magnitude that the top of the range meets: of each row, or the one that calibration saw."""
    return torch.full((), _known(largest), device=x.device) if static else x.abs().amax(-1, keepdim=True)


def _known(largest: float | None) -> float:
    if largest is None:
        raise ValueError("static=true: scales come from calibration, and this linear has none")
    return largest


def _refuse_static(static: bool, beside: str, instead: str) -> None:
    if static:
        raise UserError(f"act.static=true: needs one scale of a linear's whole input, beside {beside}; take {instead}")


def _static_label(static: bool) -> str:
    return " static" if static else ""


def _rows(x: Float[Tensor, "*rows channels"], group_size: int) -> Float[Tensor, "*groups row"]:
    """Cut float32 `x` into rows that share a scale each."""
    x = x.float()
    if group_size == -1:
        return x
    if x.shape[-1] % group_size:
        raise ValueError(f"group_size={group_size}: does not divide {x.shape[-1]} channels")
    return x.unflatten(-1, (-1, group_size))


def _group_label(group_size: int) -> str:
    return "" if group_size == -1 else f" g{group_size}"
