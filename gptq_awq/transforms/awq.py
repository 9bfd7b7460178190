"""AWQ (Lin et al., arXiv 2306.00978): scale salient input channels up before rounding.

For one site with weights W (the site's linears stacked) and input magnitudes a = mean |x|:

    s(α) = a^α                      or, with duo scaling,  a^α / w^(1-α),   w = mean |W| / group max
    s*   = argmin over α of  ‖ Q(W diag(s)) diag(s)⁻¹ X - W X ‖²             (eq. 4)

s is normalized to √(max s · min s) = 1. The op before the site absorbs 1/s, so the unquantized model is
unchanged. With objective `linear`, the loss is tr(ΔHΔᵀ) and needs no activations: every α costs out·in² flops
whatever the amount of calibration data. With `module` it is the output error of the smallest module that holds
the site's linears (attention, MLP), as in the authors' code, on a few sampled batches.

The paper's weight clipping is a range search of the grid: `grid.search=hessian`.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gptq_awq.calibration.moments import Moments
from gptq_awq.grids.base import Grid, fit_all, group_spans, nearest
from gptq_awq.grids.search import nearest_error
from gptq_awq.models.linear import Site, matrix
from gptq_awq.numerics.linalg import quadratic, rough_form
from gptq_awq.runtime.options import PositiveInt, checked_dataclass
from gptq_awq.runtime.profiling import phase
from gptq_awq.transforms.base import ModuleInputs, Scaling, absorb_scaling

MIN_SCALE = 1e-4
Loss = Callable[[Tensor], float]
"""Scales (in,) → the output error of rounding with those scales."""


@checked_dataclass
class AWQ:
    """AWQ: activation-aware scaling of each site's input channels.

    Attributes:
        ratio_steps: n, the number of candidates of α: 0, 1/n, …, (n-1)/n.
        duo: whether scales are also divided by the weights' magnitude: "on", "off", or "both" (search each).
        objective: loss of the search, "linear" or "module"; see the module's docstring.
    """

    ratio_steps: PositiveInt = 20
    duo: Literal["on", "off", "both"] = "on"
    objective: Literal["linear", "module"] = "linear"
    name: str = "awq"

    @torch.no_grad()
    def apply(
        self,
        block: nn.Module,
        sites: list[Site],
        moments: list[Moments],
        grids: Mapping[str, Grid],
        inputs: ModuleInputs,
    ) -> list[Scaling]:
        """Scale every site that has an absorber, in place; the `Scaling` of any other site says why it was skipped."""
        found = [self.search(block, site, stats, grids, inputs) for site, stats in zip(sites, moments, strict=True)]
        for site, scaling in zip(sites, found, strict=True):
            absorb_scaling(block, site, scaling)
        return found

    @property
    def by_site(self) -> bool:
        """Whether a site's scales depend on its weights and moments only, not on sampled activations."""
        return self.objective == "linear"

    @phase("search")
    @torch.no_grad()
    def search(
        self, block: nn.Module, site: Site, stats: Moments, grids: Mapping[str, Grid], inputs: ModuleInputs
    ) -> Scaling:
        """Find one site's scales, leaving the block unchanged; scaling earlier sites first would not change them."""
        if site.absorber is None:
            return Scaling(None, {"skipped": "no preceding op can absorb a scale"})
        tie = site.absorber.tie
        weights = _weights_by_grid(block, site, grids)
        linear = self.objective == "linear"
        loss = _linear_loss(weights, stats) if linear else _module_loss(block, site, grids, inputs)
        magnitude = relative_magnitude(weights)

        def scales(duo: bool, step: int) -> Tensor:
            return tie(candidate_scales(stats.mean_abs, magnitude if duo else None, step / self.ratio_steps))

        best, alpha, duo = torch.ones_like(stats.mean_abs), 0.0, False
        unscaled = least = loss(best)
        for with_duo in {"on": (True,), "off": (False,), "both": (False, True)}[self.duo]:
            step, value = least_loss(lambda step, d=with_duo: loss(scales(d, step)), self.ratio_steps)
            if value < least:
                least, best = value, scales(with_duo, step)
                alpha, duo = step / self.ratio_steps, with_duo
        return Scaling(
            best,
            {
                "absorber": site.absorber.producer,
                "alpha": alpha,
                "duo": duo,
                "loss_unscaled": unscaled,
                "loss_scaled": least,
            },
        )


def least_loss(loss: Callable[[int], float], steps: int, stride: int = 4) -> tuple[int, float]:
    """Step of the least loss among 0…steps-1, and that loss: every `stride`-th is tried, then all around the best one.

    The loss is nearly smooth in α, so this finds what trying every step finds, for half the work (docs/log.md).
    """
    coarse = {step: loss(step) for step in range(0, steps, stride)}
    best = min(coarse, key=coarse.__getitem__)
    near = range(max(0, best - stride + 1), min(steps, best + stride))
    tried = coarse | {step: loss(step) for step in near if step not in coarse}
    best = min(tried, key=tried.__getitem__)
    return best, tried[best]


def candidate_scales(
    mean_abs: Float[Tensor, "in"], magnitude: Float[Tensor, "in"] | None, alpha: float
) -> Float[Tensor, "in"]:
    """Candidate scales s(α), normalized to √(max s · min s) = 1; with duo scaling where `magnitude` w is given."""
    s = mean_abs.clamp(min=MIN_SCALE).pow(alpha)
    if magnitude is not None:
        s = s / magnitude.clamp(min=MIN_SCALE).pow(1 - alpha)
    s = s.clamp(min=MIN_SCALE)
    return s / (s.max() * s.min()).sqrt()


def _weights_by_grid(block: nn.Module, site: Site, grids: Mapping[str, Grid]) -> list[tuple[Tensor, Grid]]:
    """The site's float32 weights by grid, the linears of one grid stacked; nearly always there is one grid only."""
    named: dict[Grid, list[Tensor]] = {}
    for name in site.linears:
        named.setdefault(grids[name], []).append(matrix(block.get_submodule(name)).float())
    return [(torch.cat(weights), grid) for grid, weights in named.items()]


def relative_magnitude(weights: list[tuple[Float[Tensor, "out in"], Grid]]) -> Float[Tensor, "in"]:
    """Share of its group's range that each column uses, w of duo scaling: the mean over rows of |w| / group max |w|."""
    totals = torch.stack([_relative(W.abs(), grid) for W, grid in weights])
    return totals.sum(0) / sum(len(W) for W, _ in weights)


def _relative(magnitude: Float[Tensor, "out in"], grid: Grid) -> Float[Tensor, "in"]:
    groups = [magnitude[:, a:b] for a, b in group_spans(magnitude.shape[1], grid.group_size)]
    return torch.cat([(g / g.amax(1, keepdim=True).clamp(min=1e-12)).sum(0) for g in groups])


def _linear_loss(weights: list[tuple[Float[Tensor, "out in"], Grid]], stats: Moments) -> Loss:
    """Build the loss s → tr(ΔHΔᵀ) with Δ = Q(W s)/s - W.

    Products are in bfloat16 where the CPU multiplies it natively (see `quadratic`).
    """
    form = rough_form(stats.hessian)

    def error(W: Tensor, grid: Grid, s: Tensor) -> float:
        if form is None:
            return quadratic(nearest(grid, W * s) / s - W, stats.hessian)
        scaled = W * s
        grid = grid.without_search().for_weights([scaled])
        return nearest_error(form, grid, fit_all(grid, scaled, None), scaled, s)

    def loss(s: Tensor) -> float:
        total = 0.0
        for W, grid in weights:
            with phase("search", *W.shape):
                total += error(W, grid, s)
        return total

    return loss


def _module_loss(block: nn.Module, site: Site, grids: Mapping[str, Grid], inputs: ModuleInputs) -> Loss:
    """Build the loss s → Σ ‖module(x; Q(W s)/s) - module(x; W)‖² over sampled calls of the site's `common_module`."""
    name = common_module(site)
    module = copy.deepcopy(block.get_submodule(name))
    calls = inputs(name)
    linears = [module.get_submodule(n.removeprefix(name).removeprefix(".")) for n in site.linears]
    originals = [(matrix(linear).clone(), grids[name]) for linear, name in zip(linears, site.linears, strict=True)]

    def run() -> list[Tensor]:
        outs = [module(*args, **kwargs) for args, kwargs in calls]
        return [out[0] if isinstance(out, tuple) else out for out in outs]

    expected = run()

    def loss(s: Tensor) -> float:
        for linear, (W, grid) in zip(linears, originals, strict=True):
            matrix(linear).copy_(nearest(grid, W.float() * s) / s)
        return sum(float((a - b).float().square().sum()) for a, b in zip(run(), expected, strict=True))

    return loss


def common_module(site: Site) -> str:
    """Name of the smallest module that holds all of the site's linears ("" is the block itself)."""
    paths = [name.split(".") for name in site.linears]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
