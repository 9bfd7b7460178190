"""KL divergence of the next-token distributions ("Accuracy is Not All You Need", arXiv:2407.09141)."""

from dataclasses import dataclass

from torch import Tensor

from gptq_awq.evaluation.metrics.base import MeanMetric, PairedTokens


@dataclass(frozen=True, kw_only=True)
class KL(MeanMetric):
    """Mean over tokens of KL(p ‖ q) = Σ p (log p - log q), p of full precision and q quantized, in nats."""

    name: str = "kl"

    def per_token(self, tokens: PairedTokens) -> Tensor:
        """KL of every token."""
        return tokens.kl
