"""The tuning protocols: gradient-based refinement after rounding, of each block or of the whole model."""

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
"""Tuned weights by linear, and JSON values for the ledger on how they were tuned."""


@dataclass(frozen=True)
class Example:
    """One batch of calibration activations at one block.

    Attributes:
        inputs: hidden states that enter the quantized block.
        targets: hidden states that leave the full-precision block.
        call: the block's other arguments.
        mask: True at real tokens; None where no token is padding.
    """

    inputs: Float[Tensor, "batch tokens width"]
    targets: Float[Tensor, "batch tokens width"]
    call: Call
    mask: Bool[Tensor, "batch tokens"] | None


@runtime_checkable
class BlockTuning(Protocol):
    """A tuning of each block, after its linears are solved and before those of the next block."""

    @property
    def name(self) -> str:
        """Name of the tuning in the ledger."""
        ...

    def check(self, grid: Grid) -> None:
        """Raise UserError for a grid whose weights cannot be tuned, before anything slow begins."""
        ...

    def apply_block(
        self,
        block: nn.Module,
        weights: Mapping[str, QuantizedWeight],
        originals: Mapping[str, Float[Tensor, "out in"]],
        examples: Sequence[Example],
    ) -> Tuned:
        """Tune one block in place.

        Args:
            block: holds the dequantized `weights`.
            weights: quantized weights of the linears to tune, by name within the block.
            originals: full-precision weights of the same linears, by the same names.
            examples: the calibration set at this block, batch by batch.
        """
        ...


@runtime_checkable
class ModelTuning(Protocol):
    """A tuning of the whole model, after its last block is solved."""

    @property
    def name(self) -> str:
        """Name of the tuning in the ledger."""
        ...

    def check(self, grid: Grid) -> None:
        """Raise UserError for a grid whose weights cannot be tuned, before anything slow begins."""
        ...

    def apply(
        self,
        model: nn.Module,
        weights: Mapping[str, QuantizedWeight],
        teacher: Teacher,
        tokens: TokenSet,
        track: Track,
    ) -> Tuned:
        """Tune a model in place towards the teacher's predictions; its linears hold the dequantized `weights`."""
        ...
