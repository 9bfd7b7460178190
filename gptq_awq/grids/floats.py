"""Small floating-point numbers: a sign, e bits of exponent, m of mantissa. E2M1 (FP4) to E5M2 (FP8).

    code = sign · 2^(e+m) + E · 2^m + M            E = 0:  value = ± 2^least · M / 2^m             (subnormal)
    least = 1 - bias, bias = 2^(e-1) - 1           E > 0:  value = ± 2^(E-1+least) (1 + M / 2^m)

These are the element types of OCP's microscaling formats (MX, version 1.0) and of OCP's 8-bit floats (OFP8). Numbers
beyond the largest are clamped to it; infinities and NaNs have codes in E5M2 and E4M3, and no weight gets them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class FloatType:
    """A small floating-point type.

    Attributes:
        exponent: bits of exponent, e.
        mantissa: bits of mantissa, m.
        largest: largest finite number.
    """

    exponent: int
    mantissa: int
    largest: float

    @property
    def bits(self) -> int:
        """Bits of a code, the sign included."""
        return 1 + self.exponent + self.mantissa

    @property
    def least(self) -> int:
        """Exponent of the smallest normal number, which subnormal numbers share."""
        return 2 - 2 ** (self.exponent - 1)

    @property
    def largest_exponent(self) -> int:
        """Exponent of the largest number: ⌊log₂ largest⌋."""
        return int(torch.tensor(self.largest).log2().floor())


FLOAT_TYPES = {
    "e2m1": FloatType(2, 1, 6.0),
    "e2m3": FloatType(2, 3, 7.5),
    "e3m2": FloatType(3, 2, 28.0),
    "e4m3": FloatType(4, 3, 448.0),
    "e5m2": FloatType(5, 2, 57344.0),
}


def encode_float(x: Float[Tensor, "*shape"], mantissa: int, least: int, largest: float) -> Float[Tensor, "*shape"]:
    """Codes without the sign of the numbers nearest to |x|, halves to even, as IEEE 754 rounds; float32 in and out."""
    a = x.abs().clamp(max=largest)
    # The power of two at or below a: its exponent bits alone.
    power = (a.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=2.0**least)
    quantum = power * 2.0**-mantissa
    value = torch.round(a / quantum) * quantum
    normal = (value.view(torch.int32) >> (23 - mantissa)) - ((least + 126) << mantissa)
    return torch.where(value < 2.0**least, value * 2.0 ** (mantissa - least), normal.to(value.dtype))


def decode_float(codes: Float[Tensor, "*shape"], mantissa: int, least: int) -> Float[Tensor, "*shape"]:
    """Numbers of codes without a sign."""
    # A normal number's bits, with the exponent's bias of float32: torch.ldexp would take a power for each.
    normal = ((codes.int() << (23 - mantissa)) + ((least + 126) << 23)).view(torch.float32)
    return torch.where(codes < 2**mantissa, codes * 2.0 ** (least - mantissa), normal.to(codes.dtype))


def nearest_float(x: Float[Tensor, "*shape"], kind: FloatType) -> Float[Tensor, "*shape"]:
    """Magnitudes of x rounded to the nearest number of a type."""
    return decode_float(encode_float(x, kind.mantissa, kind.least, kind.largest), kind.mantissa, kind.least)
