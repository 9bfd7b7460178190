"""Sensitivities: the cost to the model of rounding one linear to b bits, all other weights in full precision.

With Δ = Ŵ - W of an actual rounding, H = mean x xᵀ of the full-precision inputs, e_r = (Δ H Δᵀ)_rr the mean squared
error of output r:

fisher   ½ Σ_r E[g_r²] e_r, nats per token: the second-order KL from the full-precision model. g is the gradient of
         -log p(y) by the linear's outputs at one token, y drawn from the model's own distribution, summed over the
         window's positions. Two approximations: outputs and tokens are taken to be independent (the diagonal of
         K-FAC's factor, arXiv 1503.05671). One backward pass.
kl       the measured KL with that linear alone at the width in the middle of the choices, carried to the other widths
         in proportion to Σ_r e_r. One forward per linear.
error    Σ_r e_r / tr(WHWᵀ): the linear's relative output error, whatever its effect on the rest of the model.

A weight outside of the blocks (the embedding, an output head), where a budget counts it, costs the KL that is measured
with it alone rounded to nearest (`error`: its relative error).

How costs fall from width to width hardly depends on the linear, so a few linears are rounded to all widths, and the
others to one: their other costs follow in the median proportion. On SmolLM2-135M with 25 widths the allocation found so
costs 0.4 to 0.9% more than the one of all costs, which takes six times as many solves (docs/log.md, 2026-11-29).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq_awq.calibration.block_inputs import Inputs, Settings
from gptq_awq.calibration.moments import Moments
from gptq_awq.calibration.output_gradients import mean_over_tokens
from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.evaluation.divergence import divergence
from gptq_awq.evaluation.perplexity import TokenScores, token_losses
from gptq_awq.grids.allocated import BudgetedGrid
from gptq_awq.grids.base import Grid, Place
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.experts import experts_in
from gptq_awq.models.linear import Site, matrix
from gptq_awq.models.offload import check_in_memory, read_ahead, resident
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.numerics.linalg import NotPositiveDefiniteError
from gptq_awq.quantization.targets import all_places, block_places
from gptq_awq.runtime.fingerprint import observations_sha256, sensitivities_sha256
from gptq_awq.runtime.progress import Track, no_track
from gptq_awq.solvers.base import Solver
from gptq_awq.solvers.rtn import RTN
from gptq_awq.storage.checksummed import ChecksummedFile, once

MEASURED = 12
"""Linears with equally many columns that are rounded to all widths, spread over the model."""
TOKENS = 16384
"""Most tokens, about, that inputs are observed on to compare linears; those of experts on all of them."""


@dataclass(frozen=True)
class Cost:
    """Costs of rounding one linear to each of the grid's widths.

    Attributes:
        name: full name of the linear in the model.
        site: full name of its site, the linears that read the same input.
        costs: cost by width, in the unit of the measure; None where the width's groups don't divide the columns.
    """

    name: str
    site: str
    costs: tuple[float | None, ...]


@dataclass(frozen=True)
class SensitivityAnalysis:
    """Sensitivities of a model's linears, and all that they depend on: the arguments of `allocate`."""

    model: PreTrainedModel
    tokens: TokenSet
    solver: Solver | None
    grid: BudgetedGrid
    settings: Settings
    seed: int

    def costs(self, cache: Path | None, model_sha256: str, track: Track) -> list[Cost]:
        """Costs of every linear at every width, read from the cache or computed and stored there.

        Raises:
            UserError: the Hessian of an input does not factor; a cost is not finite, and then none is stored; see
                `check_offloaded`.
        """
        check_offloaded(self.model, self.grid)

        def compute() -> ChecksummedFile:
            return ChecksummedFile({}, {"costs": [asdict(cost) for cost in self._computed(track)]})

        def finite(content: ChecksummedFile) -> bool:
            return all(c is None or math.isfinite(c) for cost in content.facts["costs"] for c in cost["costs"])

        if cache is None:
            content = compute()
        else:
            content = once(self._path(cache, model_sha256), "sensitivities", compute, finite)
        return [Cost(c["name"], c["site"], tuple(c["costs"])) for c in content.facts["costs"]]

    def known(self, cache: Path, model_sha256: str) -> bool:
        """Whether the costs are in the cache."""
        return self._path(cache, model_sha256).exists()

    @property
    def observed(self) -> TokenSet:
        """The first windows of the calibration text, enough to compare costs on: recipes that add text share them."""
        if experts_in(self.model):
            return self.tokens
        return self.tokens.first(max(self.grid.windows, TOKENS // self.tokens.ids.shape[1]))

    def _path(self, cache: Path, model_sha256: str) -> Path:
        dtype = resolve_compute_dtype(self.settings.compute_dtype, self.model.device)
        observed = observations_sha256(
            self.model, model_sha256, self.observed.sha256, dtype, self.settings.tokens_per_batch
        )
        key = sensitivities_sha256(observed, self.grid, self.rounds, self.seed, torch.get_num_threads())
        return cache / "sensitivities" / f"{key}.safetensors"

    @property
    def rounds(self) -> Solver:
        """The solver that rounds weights to measure costs."""
        solver = RTN() if self.grid.rounding == "rtn" or self.solver is None else self.solver
        return getattr(solver, "plain", lambda: solver)()

    def _computed(self, track: Track) -> Iterator[Cost]:
        model, grid, tokens = self.model, self.grid, self.observed
        _, blocks = find_blocks(model)
        dtype = resolve_compute_dtype(self.settings.compute_dtype, model.device)
        measure = Measure(grid.sensitivity, model, tokens.first(grid.windows), self.seed, track, dtype)
        inputs = Inputs(model, blocks, tokens, self.settings, error_propagation=False, absorbers=False, track=track)
        measured = measured_costs(inputs, model, self.rounds, grid, measure, track)
        yield from completed([self._finite(cost) for cost in measured], model, grid)
        yield from map(self._finite, outside_costs(model, grid, measure.tokens))

    def _finite(self, cost: Cost) -> Cost:
        """The cost, if it is finite at every width at which it was measured. Raises UserError."""
        if all(c is None or math.isfinite(c) for c in cost.costs):
            return cost
        raise UserError(
            f"grid.sensitivity={self.grid.sensitivity}: rounding {cost.name} costs {cost.costs}, which is not finite; "
            "try dtype=float32 compute_dtype=float32, or check the model"
        )


def check_offloaded(model: nn.Module, grid: BudgetedGrid) -> None:
    """Refuse a measure that needs the whole model in memory, for a model that is offloaded block by block.

    Raises:
        UserError: naming the option.
    """
    if grid.sensitivity == "fisher":
        check_in_memory(model, "grid.sensitivity=fisher: gradients go through", "choose grid.sensitivity=error")


class Measure:
    """Costs of rounding a linear, by one of the three measures of the module's docstring.

    Args:
        kind: fisher, kl or error.
        model: full-precision model.
        tokens: calibration tokens that gradients (fisher) or losses (kl) are computed on.
        seed: seed of the labels y that fisher draws.
        track: reports progress.
        dtype: dtype that gradients are computed in; None: the model's.
    """

    def __init__(
        self,
        kind: str,
        model: PreTrainedModel,
        tokens: TokenSet,
        seed: int,
        track: Track,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._model, self.tokens = model, tokens
        self._fisher: Mapping[str, Tensor] = {}
        if kind == "fisher":
            self._fisher = output_fisher(model, tokens, seed, track, dtype)
        self._full: TokenScores | None = None
        if kind == "kl":
            if tokens.mask is not None:
                raise UserError(
                    "grid.sensitivity=kl needs data.packing=windows; grid.sensitivity=fisher takes documents too"
                )
            self._full = token_losses(model, tokens, track)

    def __call__(self, name: str, rounded: Sequence[Float[Tensor, "out in"]], moments: Moments) -> tuple[float, ...]:
        """Cost of each candidate rounding of one linear, given the moments of its full-precision input."""
        weight = matrix(self._model.get_submodule(name))
        W = weight.float()
        errors = [_row_errors(r - W, moments.hessian) for r in rounded]
        if self._fisher:
            fisher = self._fisher.get(name)  # an expert that no token reaches costs nothing
            return tuple(0.0 if fisher is None else float((fisher * e).sum()) / 2 for e in errors)
        sums = [float(e.sum()) for e in errors]
        if self._full is None:
            signal = float(_row_errors(W, moments.hessian).sum())
            return tuple(e / signal if signal else 0.0 for e in sums)
        middle = len(rounded) // 2
        kl = self._measured_kl(weight, rounded[middle], self._full)
        return tuple(kl * e / sums[middle] if sums[middle] else 0.0 for e in sums)

    def _measured_kl(self, weight: Tensor, rounded: Tensor, full: TokenScores) -> float:
        """Mean KL from the full-precision model once one weight is rounded."""
        own = weight.clone()
        try:
            weight.copy_(rounded)
            return max(0.0, float(divergence(self._model, self.tokens, full).kl.double().mean()))
        finally:
            weight.copy_(own)


def measured_costs(
    inputs: Inputs,
    model: nn.Module,
    solver: Solver,
    grid: BudgetedGrid,
    measure: Measure,
    track: Track = no_track,
) -> Iterator[Cost]:
    """Yield each linear's cost, rounded by `solver` on full-precision inputs: of a few linears at every width that fits
    them, of the others at the one in the middle.

    Raises:
        UserError: the Hessian of an input does not factor.
    """
    everywhere = _spread(block_places(model))
    needs_cross = getattr(solver, "needs_cross", False)
    for block, site, moments in observed_sites(inputs, model, track):
        if needs_cross:  # nothing has drifted from full precision
            moments = replace(moments, cross=moments.hessian)
        for linear in site.linears:
            name = f"{block}.{linear}"
            weight = matrix(model.get_submodule(name)).float()
            widths = grid.fitting(weight.shape[1])
            costs: dict[str, float] = {}
            # A cost of 0 in the middle says nothing of other widths: weights may lie on that grid.
            for part in (widths,) if name in everywhere else ([widths[len(widths) // 2]], widths):
                if not any(costs.values()):
                    wanted = [width for width in part if width not in costs]
                    rounded = _rounded(name, weight, solver, moments, [grid.grid(width) for width in wanted])
                    costs |= zip(wanted, measure(name, rounded, moments), strict=True)
            yield Cost(name, f"{block}.{site.name}", tuple(map(costs.get, grid.widths)))


def solves(model: nn.Module, grid: BudgetedGrid) -> int:
    """Roundings of a linear that the costs of all the model's linears take."""
    places = list(block_places(model))
    everywhere = _spread(places)
    return sum(len(grid.fitting(place.columns)) if place.name in everywhere else 1 for place in places)


def completed(measured: Sequence[Cost], model: nn.Module, grid: BudgetedGrid) -> list[Cost]:
    """The costs with those at other widths filled in, in the median proportion of linears with equally many columns."""
    columns = [matrix(model.get_submodule(cost.name)).shape[1] for cost in measured]
    costs = np.array([[math.nan if c is None else c for c in cost.costs] for cost in measured])
    for count in set(columns):
        fitting = [grid.widths.index(width) for width in grid.fitting(count)]
        rows = [row for row, own in enumerate(columns) if own == count]
        own = costs[np.ix_(rows, fitting)]
        middle = own[:, [len(fitting) // 2]]
        known = own[~np.isnan(own).any(1) & (middle[:, 0] > 0)]
        with np.errstate(divide="ignore"):  # widths that cost nothing, as weights lie on their grid
            ratios = np.exp(np.median(np.log(known / known[:, [len(fitting) // 2]]), 0)) if len(known) else 1.0
        costs[np.ix_(rows, fitting)] = np.where(np.isnan(own), middle * ratios, own)
    return [
        replace(cost, costs=tuple(None if math.isnan(c) else float(c) for c in row))
        for cost, row in zip(measured, costs, strict=True)
    ]


def _spread(places: Iterable[Place]) -> set[str]:
    """Names of up to `MEASURED` linears with equally many columns, at equal distances."""
    names: dict[int, list[str]] = {}
    for place in places:
        names.setdefault(place.columns, []).append(place.name)
    counts = {columns: min(MEASURED, len(own)) for columns, own in names.items()}
    return {own[(2 * i + 1) * len(own) // (2 * counts[c])] for c, own in names.items() for i in range(counts[c])}


def observed_sites(inputs: Inputs, model: nn.Module, track: Track = no_track) -> Iterator[tuple[str, Site, Moments]]:
    """Yield each block's name with each of its sites and the moments of that site's full-precision input.

    Blocks that the model calls for images only have none.
    """
    prefix, blocks = find_blocks(model)
    for index in track(range(len(blocks)), "sensitivities", len(blocks)):
        block = blocks[index]
        if index + 1 < len(blocks):
            read_ahead(blocks[index + 1])
        with torch.no_grad(), resident(block):
            if not inputs.enter(index):
                continue
            runner = inputs.runner(block) if inputs.activations is not None else block
            seen = inputs.observe(block, runner, index)
            for site, moments in zip(seen.sites, seen.moments, strict=True):
                yield f"{prefix}.{index}", site, moments


def allocated_places(model: PreTrainedModel, grid: BudgetedGrid) -> list[Place]:
    """Places of the weights that a grid allocates: of the blocks, and outside of them where the budget counts those."""
    places = all_places(model)
    return [p for p in places if p.block >= 0 or (grid.counts_file and grid.fitting(p.columns))]


@torch.no_grad()
def outside_costs(model: PreTrainedModel, grid: BudgetedGrid, tokens: TokenSet) -> Iterator[Cost]:
    """Yield the cost of each weight outside of the blocks at every type that fits it: the measured KL."""
    places = [place for place in allocated_places(model, grid) if place.block < 0]
    if not places:
        return
    head: Any = model.get_output_embeddings()
    output = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    full = token_losses(model, tokens) if grid.sensitivity != "error" else None
    for place in places:
        weight = model.get_submodule(place.name).get_parameter("weight").data
        own, costs = weight.clone(), {}
        for width in grid.fitting(place.columns):
            chosen = grid.resolved({place.name: width}).at(place)
            weight.copy_(RTN().solve(own.float(), None, chosen).quantized.dequantize())
            if full is None:
                costs[width] = float((weight - own).square().sum() / own.square().sum())
            else:
                costs[width] = max(0.0, float(divergence(model, tokens, full, output=output).kl.double().mean()))
            weight.copy_(own)
        yield Cost(place.name, place.name, tuple(map(costs.get, grid.widths)))


def output_fisher(
    model: PreTrainedModel,
    tokens: TokenSet,
    seed: int = 0,
    track: Track = no_track,
    dtype: torch.dtype | None = None,
) -> dict[str, Float[Tensor, "out"]]:
    """Mean over real tokens of the squared output gradients, E[g_r²], for every linear in the model's blocks.

    Linears that no token reaches (of experts) are left out.
    """
    return mean_over_tokens(model, tokens, _squares, seed, track=track, dtype=dtype)


def _squares(gradients: Float[Tensor, "tokens out"]) -> Float[Tensor, "out"]:
    return gradients.float().square().sum(0)


def _rounded(
    name: str, weight: Float[Tensor, "out in"], solver: Solver, moments: Moments, grids: Sequence[Grid]
) -> list[Tensor]:
    try:
        return [solver.solve(weight, moments, grid).quantized.dequantize() for grid in grids]
    except NotPositiveDefiniteError as error:
        raise UserError(
            f"{name}: {error}; raise method.solver.damping, give more calibration text (data.samples), or take "
            "grid.rounding=rtn"
        ) from error


def _row_errors(delta: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]) -> Float[Tensor, "out"]:
    return ((delta @ hessian) * delta).sum(1).clamp(min=0)
