"""Percentiles of the KL per token: how far apart the two models are where they differ most.

Two models with equal mean KL can differ in how it is spread: a little on every token, or much on a few. Those few are
what a reader notices.
"""

from dataclasses import dataclass

import numpy as np

from gptq_awq.evaluation.metrics.base import PairedTokens, Samples, TokenMetric
from gptq_awq.evaluation.statistics import resampled_quantiles

SHOWN = 0.99
"""The quantile that stands for the tail in tables and searches."""
OTHERS = {"/p50": 0.5, "/p90": 0.9, "/p99.9": 0.999}


@dataclass(frozen=True, kw_only=True)
class KLTail(TokenMetric):
    """The KL, in nats, that 99% of all tokens stay below.

    With it come the median, the 90th and 99.9th percentile and the maximum. Intervals of the percentiles are from the
    block bootstrap. The maximum has none: no resample exceeds it.
    """

    name: str = "kl_tail"

    def values(self, tokens: PairedTokens) -> dict[str, float]:
        """Percentiles of the KL by suffix, and "/max"."""
        found = np.quantile(tokens.kl.double().numpy(), [SHOWN, *OTHERS.values(), 1.0])
        return {suffix: float(value) for suffix, value in zip(["", *OTHERS, "/max"], found, strict=True)}

    def resampled(self, tokens: PairedTokens, seed: int) -> dict[str, Samples]:
        """Samples of the percentiles, by suffix."""
        samples = resampled_quantiles(tokens.kl.double().numpy(), [SHOWN, *OTHERS.values()], seed=seed)
        return {f"{suffix}/ci95": own for suffix, own in zip(["", *OTHERS], samples, strict=True)}
