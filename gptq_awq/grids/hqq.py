"""HQQ, half-quadratic quantization (Badri and Shaji, 2023, https://mobiusml.github.io/hqq_blog/): needs no data.

Per group, with the scale s of the extremes and a floating-point zero, here the minimum m of ŵ = s c + m:

    min_m Σ |w - ŵ|^p, p = 0.7        few large errors rather than many small ones

by half-quadratic splitting, β growing by κ each time:

    e ← shrink(w - ŵ),  shrink(x) = sign(x) max(|x| - |x|^(p-1) / β, 0)
    m ← mean(w - e - s c)

The published code stops as soon as the whole matrix's mean |w - ŵ| grows; here each row takes the best m it met.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.grids.arithmetic import Arithmetic

NORM, BETA, KAPPA, STEPS = 0.7, 10.0, 1.01, 20
"""p, first β, growth κ and steps of the published code."""


def half_quadratic(
    w: Float[Tensor, "rows cols"],
    scale: Float[Tensor, "rows 1"],
    minimum: Float[Tensor, "rows 1"],
    arithmetic: Arithmetic,
) -> Float[Tensor, "rows 1"]:
    """Minimum m of each row by half-quadratic splitting, started from the given one, at the least mean |w - ŵ| met."""
    best, least = minimum, torch.full_like(minimum, torch.inf)
    beta = BETA
    for _ in range(STEPS + 1):
        steps = scale * arithmetic.encode(w, (scale, minimum))
        residual = w - steps - minimum
        error = residual.abs().mean(1, keepdim=True)
        best, least = torch.where(error < least, minimum, best), torch.minimum(error, least)
        magnitude = residual.abs()
        kept = (magnitude - magnitude.clamp(min=1e-12).pow(NORM - 1) / beta).clamp(min=0)
        minimum = (w - residual.sign() * kept - steps).mean(1, keepdim=True)
        beta *= KAPPA
    return best
