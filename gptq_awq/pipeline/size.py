"""How many bytes a model takes, quantized and not."""

from collections.abc import Mapping

from torch import nn

from gptq_awq.grids.base import QuantizedWeight

PLAIN_BITS = 16  # what is not quantized is stored in 16 bits, as checkpoints do


def model_bytes(model: nn.Module, weights: Mapping[str, QuantizedWeight]) -> int:
    """Bytes of the model's parameters, tied ones counted once: quantized ones packed, the rest in 16 bits."""
    packed = {id(_weight(model, name)): weight for name, weight in weights.items()}
    bits = 0.0
    for parameter in model.parameters():
        quantized = packed.get(id(parameter))
        bits += parameter.numel() * (quantized.bits_per_weight if quantized else PLAIN_BITS)
    return round(bits / 8)


def bits_per_weight(weights: Mapping[str, QuantizedWeight]) -> float:
    """Mean stored bits of the quantized weights, scales and zeros included; 16 where nothing is quantized."""
    total = sum(w.codes.numel() for w in weights.values())
    return sum(w.bits_per_weight * w.codes.numel() for w in weights.values()) / total if total else PLAIN_BITS


def _weight(model: nn.Module, name: str):
    return model.get_submodule(name).weight
