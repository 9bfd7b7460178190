"""The transform protocols: function-preserving changes of basis, applied before weights are rounded.

A `Transform` changes one block at a time, in the block loop. A `ModelTransform` changes the whole model, before the
block loop, wherever it stands in the list of transforms.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gptq_awq.calibration.moments import Moments
from gptq_awq.grids.base import Grid
from gptq_awq.models.linear import Site
from gptq_awq.models.topology import absorb

ModuleInputs = Callable[[str], list[tuple[tuple, dict[str, Any]]]]
"""Name of a submodule → the (args, kwargs) of its calls, one entry per sampled batch."""


@dataclass(frozen=True)
class Scaling:
    """Result of a transform at one site: the scales, and what the ledger records of them.

    Attributes:
        scales: (in,) s: the site's columns are multiplied by s and its input divided by s; None: site unchanged.
        details: JSON values for the ledger.
    """

    scales: Tensor | None
    details: dict[str, Any]


@runtime_checkable
class Transform(Protocol):
    """A function-preserving change of basis of one block, site by site."""

    @property
    def name(self) -> str:
        """Name of the transform in the ledger."""
        ...

    def apply(
        self,
        block: nn.Module,
        sites: list[Site],
        moments: list[Moments],
        grids: Mapping[str, Grid],
        inputs: ModuleInputs,
    ) -> list[Scaling]:
        """Transform one block (float32 or the model's dtype) in place, and return one `Scaling` per site.

        `grids` holds the grid that each linear will be rounded to, by its name within the block.
        """
        ...


@runtime_checkable
class SiteTransform(Transform, Protocol):
    """A transform whose result at a site does not depend on the other sites, so that ranks can share the sites."""

    @property
    def by_site(self) -> bool:
        """Whether `search` works without `inputs`, so that any rank can run it."""
        ...

    def search(
        self, block: nn.Module, site: Site, stats: Moments, grids: Mapping[str, Grid], inputs: ModuleInputs
    ) -> Scaling:
        """Find what `apply` does at one site, given the untransformed block, which is not changed."""
        ...


@torch.no_grad()
def absorb_scaling(block: nn.Module, site: Site, scaling: Scaling) -> None:
    """Multiply the site's columns by the scales and divide its absorber's output channels by them, in place."""
    if scaling.scales is not None and site.absorber is not None:
        absorb(block, site, site.absorber, scaling.scales)


@runtime_checkable
class ModelTransform(Protocol):
    """A change of basis of the whole model, such as a rotation of its residual stream.

    A frozen dataclass: its repr lists all options, and is part of the cache keys of models that it changed.
    """

    @property
    def name(self) -> str:
        """Name of the transform in the ledger."""
        ...

    def prepare(self, model: nn.Module) -> dict[str, Any]:
        """Transform a causal LM in place, deterministically, preserving its logits; a tied head becomes untied.

        Returns JSON values for the ledger.

        Raises:
            UserError: the transform would change this model's function.
        """
        ...
