"""Where activations land while a model runs: scales that follow the numbers as they come (dynamic), nothing stored.

A row is what one scale serves: a token's channels (SmoothQuant, arXiv 2211.10438, per token; QuaRot, arXiv 2404.00456),
one head's part of a cached key or value, or groups of either. With c the clip ratio and B the bits,

    symmetric   s = c max|x| / (2^(B-1) - 1)                 x̂ = s · clamp(round(x / s), -2^(B-1), 2^(B-1) - 1)
    asymmetric  s = c (max(x, 0) - min(x, 0)) / (2^B - 1)    x̂ = s · (clamp(round(x / s) + z, 0, 2^B - 1) - z)
                z = round(-c min(x, 0) / s)
    fp8         s = max|x| / 448                             x̂ = s · E4M3(x / s)
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.errors import UserError

E4M3_MAX = 448.0
TINY = torch.finfo(torch.float32).tiny
"""Scales are no smaller, so that a row of zeros stays one."""


@runtime_checkable
class DynamicGrid(Protocol):
    """A number format of activations."""

    @property
    def label(self) -> str | None:
        """In tables; None where nothing is rounded."""
        ...

    def rounded(self, x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        """`x` on the grid and back, in its own dtype. Raises ValueError where groups don't divide the channels."""
        ...


@dataclass(frozen=True)
class Unrounded:
    """Activations as they are: the A16 of W4A16."""

    label: None = None

    def rounded(self, x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        """Itself."""
        return x


@dataclass(frozen=True)
class DynamicInt:
    """Integers, a scale (and, asymmetric, a zero) per row.

    Attributes:
        bits: 2 to 16.
        sym: symmetric about zero.
        group_size: channels that share a scale; -1: all of the row.
        clip: ratio c of the range that is kept, above 0 and up to 1.

    Raises:
        UserError: naming the option.
    """

    bits: int = 8
    sym: bool = True
    group_size: int = -1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise UserError(f"act.bits or kv.bits={self.bits}: choose 2 to 16, or act=none, kv=none")
        if not 0 < self.clip <= 1:
            raise UserError(f"act.clip or kv.clip={self.clip}: give a ratio above 0 and up to 1")
        _check_group_size(self.group_size)

    @property
    def label(self) -> str:
        """For example `int8`, or `int4 asym g64 clip 0.9`."""
        clip = "" if self.clip == 1 else f" clip {self.clip:g}"
        return f"int{self.bits}{'' if self.sym else ' asym'}{_group_label(self.group_size)}{clip}"

    def rounded(self, x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        """`x` on the grid and back, in its own dtype. Raises ValueError where groups don't divide the channels."""
        rows = _rows(x, self.group_size)
        return (self._symmetric(rows) if self.sym else self._asymmetric(rows)).reshape(x.shape).to(x.dtype)

    def _symmetric(self, x: Float[Tensor, "*rows row"]) -> Float[Tensor, "*rows row"]:
        top = 2 ** (self.bits - 1) - 1
        scale = (self.clip / top * x.abs().amax(-1, keepdim=True)).clamp_(min=TINY)
        return (x / scale).round_().clamp_(-top - 1, top).mul_(scale)

    def _asymmetric(self, x: Float[Tensor, "*rows row"]) -> Float[Tensor, "*rows row"]:
        top = 2**self.bits - 1
        low, high = (
            self.clip * x.amin(-1, keepdim=True).clamp_(max=0),
            self.clip * x.amax(-1, keepdim=True).clamp_(min=0),
        )
        scale = ((high - low) / top).clamp_(min=TINY)
        zero = (-low / scale).round_()
        return (x / scale).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(scale)


@dataclass(frozen=True)
class DynamicFP8:
    """8-bit floats of 4 exponent and 3 mantissa bits (E4M3, arXiv 2209.05433), a float32 scale per row.

    Attributes:
        group_size: channels that share a scale; -1: all of the row.

    Raises:
        UserError: naming the option.
    """

    group_size: int = -1

    def __post_init__(self) -> None:
        _check_group_size(self.group_size)

    @property
    def label(self) -> str:
        """`fp8`, or `fp8 g128`."""
        return f"fp8{_group_label(self.group_size)}"

    def rounded(self, x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        """`x` on the grid and back, in its own dtype. Raises ValueError where groups don't divide the channels."""
        rows = _rows(x, self.group_size)
        scale = (rows.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_(min=TINY)
        near = (rows / scale).clamp_(-E4M3_MAX, E4M3_MAX)  # x / s may end a rounding error above the largest
        return near.to(torch.float8_e4m3fn).float().mul_(scale).reshape(x.shape).to(x.dtype)


def _rows(x: Float[Tensor, "*rows channels"], group_size: int) -> Float[Tensor, "*groups row"]:
    """What each scale serves, in float32."""
    x = x.float()
    if group_size == -1:
        return x
    if x.shape[-1] % group_size:
        raise ValueError(f"group_size={group_size}: does not divide {x.shape[-1]} channels")
    return x.unflatten(-1, (-1, group_size))


def _check_group_size(group_size: int) -> None:
    if group_size != -1 and group_size < 1:
        raise UserError(f"act.group_size or kv.group_size={group_size}: give a number of channels, or -1 for all")


def _group_label(group_size: int) -> str:
    return "" if group_size == -1 else f" g{group_size}"
