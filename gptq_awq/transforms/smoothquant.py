"""SmoothQuant (Xiao et al., arXiv 2211.10438): move outliers of the activations into the weights.

For input channel j of a site, with W the site's linears stacked:

    s_j = max |x_j|^α / max |w_j|^(1-α),     x_j ← x_j / s_j,     w_j ← w_j s_j        (eq. 4)

The op before the site absorbs 1/s, so the unquantized model is unchanged. α = 1/2 gives both factors of each channel
the same range, √(max |x_j| · max |w_j|). Nothing is searched for and no rounding error is measured: the method is
meant for quantized activations. Where only weights are rounded, AWQ is the better choice.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gptq_awq.calibration.moments import Moments
from gptq_awq.grids.base import Grid
from gptq_awq.models.linear import Site, is_linear, matrix
from gptq_awq.models.topology import absorb
from gptq_awq.runtime.options import Fraction, checked_dataclass
from gptq_awq.runtime.profiling import phase
from gptq_awq.transforms.base import ModuleInputs, Scaling

MIN_SCALE = 1e-5


@checked_dataclass
class SmoothQuant:
    """SmoothQuant: scale each site's channels by the magnitudes of its activations and weights.

    Attributes:
        alpha: α, the migration strength: 0 levels the weights' channels, 1 the activations'.
        sites: sites to scale: "norms", those that a norm precedes, as in the paper; "all", every one with an absorber.

    Raises:
        UserError: α outside of 0 to 1, or an unknown value of `sites`.
    """

    alpha: Fraction = 0.5
    sites: Literal["norms", "all"] = "norms"
    name: str = "smoothquant"

    @phase("search")
    @torch.no_grad()
    def apply(
        self,
        block: nn.Module,
        sites: list[Site],
        moments: list[Moments],
        grids: Mapping[str, Grid],  # noqa: ARG002 (no rounding is measured)
        inputs: ModuleInputs,  # noqa: ARG002
    ) -> list[Scaling]:
        """Scale the chosen sites in place; the `Scaling` of any other site says why it was skipped."""
        return [self._scale(block, site, stats) for site, stats in zip(sites, moments, strict=True)]

    def _scale(self, block: nn.Module, site: Site, stats: Moments) -> Scaling:
        absorber = site.absorber
        if absorber is None:
            return Scaling(None, {"skipped": "no preceding op can absorb a scale"})
        if self.sites == "norms" and is_linear(block.get_submodule(absorber.producer)):
            return Scaling(None, {"skipped": "no norm precedes it (sites=norms)"})
        if stats.max_abs is None:
            raise ValueError(f"{site.name}: smoothquant needs max |x|, which the moments lack")
        largest = torch.stack([matrix(block.get_submodule(name)).float().abs().amax(0) for name in site.linears])
        s = absorber.tie(smoothing(stats.max_abs, largest.amax(0), self.alpha))
        absorb(block, site, absorber, s)
        details = {"absorber": absorber.producer, "alpha": self.alpha, "least": float(s.min()), "most": float(s.max())}
        return Scaling(s, details)


def smoothing(x: Float[Tensor, "in"], w: Float[Tensor, "in"], alpha: float) -> Float[Tensor, "in"]:
    """Scales s of eq. 4, from the channel maxima max |x_j| and max |w_j|."""
    return (x.pow(alpha) / w.clamp(min=MIN_SCALE).pow(1 - alpha)).clamp(min=MIN_SCALE)
