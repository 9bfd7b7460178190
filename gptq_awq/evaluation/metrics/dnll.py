"""Mean loss difference: the logarithm of the ratio of both models' perplexities."""

from collections.abc import Mapping
from dataclasses import dataclass

from gptq_awq.evaluation.metrics.base import PairedTokens, Samples, TokenMetric


@dataclass(frozen=True, kw_only=True)
class LossDifference(TokenMetric):
    """Mean over tokens of the quantized model's loss minus the full-precision model's, in nats."""

    name: str = "dnll"

    def values(self, tokens: PairedTokens) -> dict[str, float]:
        """Mean of the differences."""
        return {"": float((tokens.nll - tokens.baseline_nll).double().mean())}

    def intervals(self, means: Mapping[str, Samples]) -> dict[str, Samples]:
        """Interval of the mean difference."""
        return {"/ci95": means["nll"] - means["nll/baseline"]}
