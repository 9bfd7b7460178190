"""protect=auto: the sites whose rounding costs the model most for their size stay in full precision.

Cost: `fisher` of allocation/sensitivity.py, each linear rounded to nearest on its own grid. Sites stay whole, and all
experts of a block stay together, as engines join them in one layer.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gptq_awq.allocation.sensitivity import Measure, observed_sites
from gptq_awq.calibration.block_inputs import Inputs, Settings
from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.grids.protected import ProtectedGrid
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import matrix
from gptq_awq.models.offload import check_in_memory
from gptq_awq.quantization.targets import assign_grids, block_places
from gptq_awq.runtime.progress import Track, no_track
from gptq_awq.solvers.rtn import RTN

log = logging.getLogger(__name__)
WINDOWS = 8
"""Calibration windows that gradients are computed on, as `AllocatedGrid.windows`."""


@dataclass(frozen=True)
class Protection:
    """Linears that stay in full precision.

    Attributes:
        grid: the grid with their names.
        kept: full name → predicted cost of rounding it to nearest, nats per token.
        share: their share of the weights of the blocks' linears.
        predicted: cost of rounding all others, and
        before: of rounding these, too.
    """

    grid: ProtectedGrid
    kept: Mapping[str, float]
    share: float
    predicted: float
    before: float

    def row(self) -> dict[str, Any]:
        """The protection as JSON values, for the manifest."""
        return {"share": self.share, "predicted": self.predicted, "before": self.before, "linears": dict(self.kept)}

    def __str__(self) -> str:
        names = ", ".join(self.kept) or "none: no site is small enough"
        return (
            f"protect=auto: {len(self.kept)} linears, {self.share:.1%} of the weights, stay in full precision; the KL "
            f"predicted for rounding to nearest falls from {self.before:.2g} to {self.predicted:.2g} ({names})"
        )


@dataclass(frozen=True)
class _Unit:
    """Linears that are protected together.

    Attributes:
        costs: full name → cost.
        weights: number of their weights.
    """

    costs: dict[str, float]
    weights: int

    @property
    def cost(self) -> float:
        return sum(self.costs.values())


def check_protectable(model: nn.Module) -> None:
    """Raise UserError for a model whose gradients can't be computed, as it is offloaded."""
    check_in_memory(model, "protect=auto: gradients go through", "give protect a list of patterns")


def protected(
    model: PreTrainedModel,
    tokens: TokenSet,
    grid: ProtectedGrid,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    seed: int = 0,
    track: Track = no_track,
) -> Protection:
    """Choose the linears that `protect=auto` keeps; the model is not changed.

    Those units whose cost per weight is the highest are taken, as long as they fit into the share.

    Raises:
        UserError: the model is offloaded, or its forward has no gradients.
    """
    check_protectable(model)
    units = list(_units(model, tokens, grid, settings, seed, track))
    total = sum(matrix(model.get_submodule(place.name)).numel() for place in block_places(model))
    room, kept = int(grid.share * total), []
    for unit in sorted(units, key=lambda unit: unit.cost / unit.weights, reverse=True):
        if unit.cost > 0 and unit.weights <= room:
            room -= unit.weights
            kept.append(unit)
    costs = {name: cost for unit in kept for name, cost in unit.costs.items()}
    before, share = sum(unit.cost for unit in units), sum(unit.weights for unit in kept) / total
    return Protection(grid.keeping(costs), costs, share, before - sum(costs.values()), before)


def _units(
    model: PreTrainedModel, tokens: TokenSet, grid: ProtectedGrid, settings: Settings, seed: int, track: Track
) -> Iterator[_Unit]:
    """The sites of all blocks, and the experts of each block as one, with the costs of rounding them to nearest."""
    grids, (_, blocks) = assign_grids(model, grid), find_blocks(model)
    try:
        measure = Measure("fisher", model, tokens.first(WINDOWS), seed, track)
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise UserError(f"protect=auto: no gradients ({why:.150}); give protect a list of patterns") from error
    inputs = Inputs(model, blocks, tokens, settings, error_propagation=False, absorbers=False, track=track)
    experts: dict[str, _Unit] = {}
    for name, site, moments in observed_sites(inputs, model, track):
        unit = _Unit({}, 0)
        for linear in (f"{name}.{linear}" for linear in site.linears):
            if (own := grids.get(linear)) is None:
                continue
            weight = matrix(model.get_submodule(linear))
            known = moments if moments.tokens else None
            rounded = RTN().solve(weight.float(), known, own if known else own.without_search()).quantized
            cost = measure(linear, [rounded.dequantize()], moments)[0] if known else 0.0
            unit = _Unit(unit.costs | {linear: cost}, unit.weights + weight.numel())
        if site.expert is not None:
            seen = experts.get(name, _Unit({}, 0))
            experts[name] = _Unit(seen.costs | unit.costs, seen.weights + unit.weights)
        elif unit.costs:
            yield unit
    yield from experts.values()
