"""Metrics measured on a text: the standard four, or those that an evaluation chooses."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.evaluation.metrics.base import TokenMetric
from gptq_awq.evaluation.metrics.dnll import LossDifference
from gptq_awq.evaluation.metrics.kl import KL
from gptq_awq.evaluation.metrics.ppl import TokenPerplexity
from gptq_awq.evaluation.metrics.top1_agreement import Top1Agreement

STANDARD: tuple[TokenMetric, ...] = (TokenPerplexity(), LossDifference(), KL(), Top1Agreement())
RESERVED = ("tokens", "nll", "kl", "agree")
"""Names of the arrays that scores.npz holds for every text."""


@dataclass(frozen=True)
class EvaluationText(TokenSet):
    """Windows of an evaluation text, and the metrics measured on them."""

    metrics: tuple[TokenMetric, ...] = STANDARD

    @classmethod
    def of(cls, tokens: TokenSet, metrics: Sequence[TokenMetric]) -> Self:
        """The windows `tokens`, to be measured by `metrics`."""
        return cls(tokens.name, tokens.ids, tokens.mask, tokens.source, tokens.sha256, tuple(metrics))


def metrics_of(tokens: TokenSet) -> tuple[TokenMetric, ...]:
    """Metrics to measure on a text; a plain `TokenSet` gets the standard ones."""
    return tokens.metrics if isinstance(tokens, EvaluationText) else STANDARD


def chosen(names: Iterable[str] | None, available: Mapping[str, TokenMetric]) -> tuple[TokenMetric, ...]:
    """Metrics in the order of `names`, None being all that are available.

    Raises UserError naming eval.metrics for a name that isn't available, or eval.metric for a metric whose own name
    is another one's.
    """
    if names is None:
        names = available
    names = dict.fromkeys([names] if isinstance(names, str) else names)
    for name in names:
        if name not in available:
            raise UserError(
                f"eval.metrics={name}: choose among {', '.join(available)}, or add one with +eval/metric={name}"
            )
    metrics = tuple(available[name] for name in names)
    _check_names(metrics)
    return metrics


def _check_names(metrics: Sequence[TokenMetric]) -> None:
    """Raise UserError if the numbers or arrays of one metric would overwrite another's."""
    for name, count in Counter(metric.name for metric in metrics).items():
        if count > 1:
            raise UserError(f"eval.metric: {count} metrics have name={name}, and their numbers go by it: rename one")
    for metric in metrics:
        if "/" in metric.name:
            raise UserError(f"eval.metric: name={metric.name} must not contain a slash")
        if metric.name in RESERVED and not isinstance(metric, KL):
            raise UserError(f"eval.metric: name={metric.name} is that of another array in scores.npz: rename it")
