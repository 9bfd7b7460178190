"""Perplexity, exp(mean loss) over contiguous windows: the protocol of GPTQ (arXiv:2210.17323)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gptq_awq.data.tokens import TokenSet
from gptq_awq.evaluation.metrics.base import PairedTokens, Samples, TokenMetric
from gptq_awq.evaluation.perplexity import perplexity


@dataclass(frozen=True, kw_only=True)
class TokenPerplexity(TokenMetric):
    """Perplexity of both models and its change, with an interval of the change."""

    name: str = "ppl"

    def key(self, text: TokenSet) -> str:
        """Name with the window length, "ppl@2048": perplexities of other lengths don't compare."""
        return f"{self.name}@{text.ids.shape[1]}"

    def values(self, tokens: PairedTokens) -> dict[str, float]:
        """Perplexity of the quantized model, of full precision, and the difference."""
        full, value = perplexity(tokens.baseline_nll), perplexity(tokens.nll)
        return {"": value, "/baseline": full, "/delta": value - full}

    def intervals(self, means: Mapping[str, Samples]) -> dict[str, Samples]:
        """Interval of the difference: both models are resampled on the same blocks."""
        return {"/delta_ci95": np.exp(means["nll"]) - np.exp(means["nll/baseline"])}
