"""What a tuning is: gradients, after weights have landed. Of each block, or of the whole model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor, nn

from gptq_awq.data.tokens import TokenSet
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.models.blocks import Call
from gptq_awq.runtime.progress import Track
from gptq_awq.tuning.teacher import Teacher

Tuned = tuple[dict[str, QuantizedWeight], dict[str, Any]]
"""The weights, and what the ledger says of how they were tuned (JSON values)."""


@dataclass(frozen=True)
class Example:
    """One batch of calibration data at a block.

    Attributes:
        inputs: what enters the quantized block.
        targets: what full precision leaves it with.
        call: the block's other arguments.
        mask: True at real tokens; None when all are.
    """

    inputs: Float[Tensor, "batch tokens width"]
    targets: Float[Tensor, "batch tokens width"]
    call: Call
    mask: Bool[Tensor, "batch tokens"] | None


@runtime_checkable
class BlockTuning(Protocol):
    """Tunes each block, after its linears are solved and before the next block is."""

    @property
    def name(self) -> str:
        """As the ledger names it."""
        ...

    def check(self, grid: Grid) -> None:
        """Raise UserError for a grid that can't be tuned, before anything slow begins."""
        ...

    def apply_block(
        self,
        block: nn.Module,
        weights: Mapping[str, QuantizedWeight],
        originals: Mapping[str, Float[Tensor, "out in"]],
        examples: Sequence[Example],
    ) -> Tuned:
        """Tune one block in place; `weights` and full precision's `originals` are by name within the block."""
        ...


@runtime_checkable
class ModelTuning(Protocol):
    """Tunes the whole model, after its last block."""

    @property
    def name(self) -> str:
        """As the ledger names it."""
        ...

    def check(self, grid: Grid) -> None:
        """Raise UserError for a grid that can't be tuned, before anything slow begins."""
        ...

    def apply(
        self,
        model: nn.Module,
        weights: Mapping[str, QuantizedWeight],
        teacher: Teacher,
        tokens: TokenSet,
        track: Track,
    ) -> Tuned:
        """Tune a model in place, whose linears hold the dequantized `weights`."""
        ...
