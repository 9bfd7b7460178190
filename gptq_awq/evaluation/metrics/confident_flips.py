"""Confident flips: the quantized model prefers another word where full precision was sure of its own.

Where full precision wavers between two words, a flip costs nothing; `top1_agreement` counts those as well.
"""

from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.evaluation.metrics.base import LogitMetric
from gptq_awq.runtime.options import Fraction, checked_keywords


@checked_keywords
class ConfidentFlips(LogitMetric):
    """Share of all tokens whose likeliest word changes, though full precision gives it at least `confidence`."""

    name: str = "confident_flips"
    confidence: Fraction = 0.5

    def of_logits(
        self,
        full: Float[Tensor, "tokens vocab"],
        quantized: Float[Tensor, "tokens vocab"],
        targets: Int[Tensor, "tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "tokens"]:
        """1 where a confident prediction flips, else 0."""
        sure, word = full.softmax(-1).max(-1)
        return ((sure >= self.confidence) & (quantized.argmax(-1) != word)).float()
