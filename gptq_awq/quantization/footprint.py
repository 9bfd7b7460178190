"""Footprint: bytes of a quantized model, and mean bits of its quantized weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from gptq_awq.grids.base import QuantizedWeight

PLAIN_BITS = 16  # what is not quantized is stored in 16 bits, as checkpoints do


@dataclass(frozen=True)
class Footprint:
    """Stored sizes of a model's quantized weights.

    Attributes:
        bits: module name → stored bits of its weight, scales and zeros included.
        weights: module name → number of weights.
    """

    bits: dict[str, float] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)

    def add(self, quantized: Mapping[str, QuantizedWeight]) -> None:
        """Add the sizes of quantized weights, by module name."""
        for name, weight in quantized.items():
            self.weights[name] = weight.codes.numel()
            self.bits[name] = weight.bits_per_weight * weight.codes.numel()

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits of the quantized weights; 16 where nothing is quantized."""
        return sum(self.bits.values()) / sum(self.weights.values()) if self.weights else PLAIN_BITS

    def model_bytes(self, model: nn.Module) -> int:
        """Bytes of the whole model, tied parameters counted once: what isn't quantized takes 16 bits."""
        parameters = sum(p.numel() for p in model.parameters())
        return round(((parameters - sum(self.weights.values())) * PLAIN_BITS + sum(self.bits.values())) / 8)
