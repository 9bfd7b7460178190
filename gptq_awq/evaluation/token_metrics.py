"""Metrics of one text with their intervals, and the block sums that paired tests between runs need."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from gptq_awq.evaluation.metrics.base import PairedTokens, Samples, TokenMetric
from gptq_awq.evaluation.statistics import block_sums, interval, resampled_means

log = logging.getLogger(__name__)


def token_metrics(tokens: PairedTokens, metrics: Sequence[TokenMetric], seed: int = 0) -> dict[str, Any]:
    """Every metric of one text by TEXT/KEY/SUFFIX, with 95% block-bootstrap intervals where a metric has them.

    `seed` draws the resamples. Intervals are left out, with a warning, if there are too few tokens for them.
    """
    name = tokens.text.name
    prefixes = [f"{name}/{metric.key(tokens.text)}" for metric in metrics]
    found: dict[str, Any] = {}
    for prefix, metric in zip(prefixes, metrics, strict=True):
        found |= {f"{prefix}{suffix}": value for suffix, value in metric.values(tokens).items()}
    try:
        means = _resampled(tokens, metrics, seed)
    except ValueError as error:
        log.warning("%s: no intervals (%s); more eval.perplexity.windows would give them", name, error)
        return found
    for prefix, metric in zip(prefixes, metrics, strict=True):
        samples = metric.intervals(means) | metric.resampled(tokens, seed)
        found |= {f"{prefix}{suffix}": list(interval(of)) for suffix, of in samples.items()}
    return found


def token_sums(tokens: PairedTokens, metrics: Sequence[TokenMetric]) -> dict[str, np.ndarray]:
    """Sums of every series of one text over the bootstrap's blocks, by TEXT/SERIES, and the tokens per block."""
    arrays: dict[str, np.ndarray] = {}
    for series in (tokens.series, _own_series(tokens, metrics)):
        if series:
            sums, lengths = block_sums(_stacked(series))
            arrays |= {"tokens": lengths.astype(np.float64), **dict(zip(series, sums, strict=True))}
    return {f"{tokens.text.name}/{key}": values for key, values in arrays.items()}


def _resampled(tokens: PairedTokens, metrics: Sequence[TokenMetric], seed: int) -> dict[str, Samples]:
    """Mean of every series in each resample of blocks; all series share the resamples.

    Series of the metrics' own are resampled one by one: no number depends on which other metrics there are.
    """
    own = [{name: values} for name, values in _own_series(tokens, metrics).items()]
    means: dict[str, Samples] = {}
    for series in (tokens.series, *own):
        means |= dict(zip(series, resampled_means(_stacked(series), seed=seed), strict=True))
    return means


def _own_series(tokens: PairedTokens, metrics: Sequence[TokenMetric]) -> dict[str, Tensor]:
    """Series that metrics add to the standard ones. Raises TypeError for one without a value per token."""
    found: dict[str, Tensor] = {}
    for metric in metrics:
        for name, values in metric.series(tokens).items():
            if values.shape != tokens.nll.shape:
                raise TypeError(f"{metric.name}: {tuple(values.shape)} values for {tuple(tokens.nll.shape)} tokens")
            found |= {} if name in tokens.series else {name: values}
    return found


def _stacked(series: dict[str, Tensor]) -> Float[np.ndarray, "series windows scored"]:
    return np.stack([values.float().numpy() for values in series.values()])
