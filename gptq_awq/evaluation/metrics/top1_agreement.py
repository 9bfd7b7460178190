"""Top-1 agreement: share of tokens for which both models predict the same word (arXiv:2407.09141: 1 - flips)."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from gptq_awq.evaluation.metrics.base import MeanMetric, PairedTokens, Samples


@dataclass(frozen=True, kw_only=True)
class Top1Agreement(MeanMetric):
    """Share of tokens for which both models have the same most likely word."""

    name: str = "top1_agreement"
    higher_is_better: bool = True

    def per_token(self, tokens: PairedTokens) -> Tensor:
        """1 where the models agree, else 0."""
        return tokens.agree.float()

    def series(self, tokens: PairedTokens) -> dict[str, Tensor]:  # noqa: ARG002
        """None of its own: agreement is stored for every run, as "agree"."""
        return {}

    def intervals(self, means: Mapping[str, Samples]) -> dict[str, Samples]:
        """Interval of the share."""
        return {"/ci95": means["agree"]}
