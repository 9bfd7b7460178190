"""What a transform is: a function-preserving change of basis, applied to a block before it is rounded.

One that needs the whole model at once is a `ModelTransform`: it comes before the block loop, whatever its place.
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
"""Name of a submodule → the (args, kwargs) it was called with, one entry per sampled batch."""


@dataclass(frozen=True)
class Scaling:
    """What a transform did at one site.

    Attributes:
        scales: (in,) s: the site's columns were multiplied by s, its input divided; None: left alone.
        details: for the ledger (JSON values).
    """

    scales: Tensor | None
    details: dict[str, Any]


@runtime_checkable
class Transform(Protocol):
    """A change of basis. `apply` rewrites the block in place and says what it did, site by site."""

    @property
    def name(self) -> str:
        """As the ledger names it."""
        ...

    def apply(
        self,
        block: nn.Module,
        sites: list[Site],
        moments: list[Moments],
        grids: Mapping[str, Grid],
        inputs: ModuleInputs,
    ) -> list[Scaling]:
        """Transform one block (float32 or the model's dtype), one `Scaling` per site.

        `grids` says where each of the block's linears will land, by name within the block.
        """
        ...


@runtime_checkable
class SiteTransform(Transform, Protocol):
    """A transform that may be found site by site, so that ranks share the sites."""

    @property
    def by_site(self) -> bool:
        """Whether `search` needs no `inputs`: any rank can do it."""
        ...

    def search(
        self, block: nn.Module, site: Site, stats: Moments, grids: Mapping[str, Grid], inputs: ModuleInputs
    ) -> Scaling:
        """What `apply` does at one site, found on the block as it was; nothing is changed."""
        ...


@torch.no_grad()
def absorb_scaling(block: nn.Module, site: Site, scaling: Scaling) -> None:
    """Multiply the site's columns by the scales, and divide what its absorber puts out, in place."""
    if scaling.scales is not None and site.absorber is not None:
        absorb(block, site, site.absorber, scaling.scales)


@runtime_checkable
class ModelTransform(Protocol):
    """A change of basis of the whole model, such as a rotation of its residual stream.

    A frozen dataclass: its repr, which says all its options, tells apart what is recorded of models it changed.
    """

    @property
    def name(self) -> str:
        """As the ledger names it."""
        ...

    def prepare(self, model: nn.Module) -> dict[str, Any]:
        """Change a causal LM in place, the same way at every call; its logits stay. A tied head becomes untied.

        Returns what the ledger shall say (JSON values).

        Raises:
            UserError: a model that it would change.
        """
        ...
