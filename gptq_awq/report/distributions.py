"""Distributions over a text of what runs lose: quantiles of the KL from full precision over blocks of tokens."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from gptq_awq.report.rows import Row

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def kl_quantiles(
    runs: Sequence[Row], scores: Callable[[str], Mapping[str, Float[np.ndarray, "values"]]]
) -> list[dict[str, list[float]]]:
    """For each run, text → quantiles of a block's mean KL in nats; {} for a run without scores.npz.

    Args:
        runs: results rows.
        scores: maps a run's path to the arrays of its scores.npz.
    """
    found = []
    for run in runs:
        arrays, of_run = scores(run["path"]) if "count" not in run else {}, {}
        for name, sums in arrays.items():
            text, _, metric = name.rpartition("/")
            tokens = arrays.get(f"{text}/tokens")
            if (
                metric == "kl"
                and tokens is not None
                and tokens.shape == sums.shape
                and len(sums)
                and (tokens > 0).all()
            ):
                means = sums / tokens
                if np.isfinite(means).all() and means.any():
                    of_run[text] = [float(f"{value:.4g}") for value in np.quantile(means, QUANTILES)]
        found.append(of_run)
    return found
