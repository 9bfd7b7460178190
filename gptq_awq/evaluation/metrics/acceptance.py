"""Acceptance rate of speculative decoding (Leviathan et al., arXiv 2211.17192): Σ min(p, q) over the vocabulary.

A token that the quantized model drafts is accepted by full precision with this probability (theorem 3.5 there), so it
says how useful the quantized model is as a draft. It is 1 minus the total variation distance.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.evaluation.metrics.base import LogitMetric


@dataclass(frozen=True, kw_only=True)
class AcceptanceRate(LogitMetric):
    """Mean over tokens of Σ min(p, q), from 0 to 1."""

    name: str = "acceptance"
    higher_is_better: bool = True

    def of_logits(
        self,
        full: Float[Tensor, "tokens vocab"],
        quantized: Float[Tensor, "tokens vocab"],
        targets: Int[Tensor, "tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "tokens"]:
        """Σ min(p, q) of each token."""
        return full.softmax(-1).minimum(quantized.softmax(-1)).sum(-1)
