"""Top-5 overlap: how many of full precision's five likeliest words are among the quantized model's five."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.evaluation.metrics.base import LogitMetric

COUNT = 5


@dataclass(frozen=True, kw_only=True)
class Top5Overlap(LogitMetric):
    """Mean over tokens of |top 5 of p ∩ top 5 of q| / 5."""

    name: str = "top5_overlap"
    higher_is_better: bool = True

    def of_logits(
        self,
        full: Float[Tensor, "tokens vocab"],
        quantized: Float[Tensor, "tokens vocab"],
        targets: Int[Tensor, "tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "tokens"]:
        """Share of the five likeliest words that both models have in common."""
        count = min(COUNT, full.shape[-1])
        first, second = (logits.topk(count, dim=-1).indices for logits in (full, quantized))
        return (first[:, :, None] == second[:, None, :]).sum((1, 2)).float() / count
