"""Significance tests between runs: every run against full precision, and against the best run of its bits.

Runs are of the same bits where weights, activations and cache are: W4A8 competes with W4A8, not with W4A16.

Tests are paired, over the blocks of tokens and the items that both runs scored (`scores.npz`): the studentized block
bootstrap of the mean loss (of which perplexity is a function), KL and agreement; McNemar's exact test for items
that are right or wrong, else the bootstrap over items. Each of the two families is adjusted by Holm's method over all
tests of a table, so in each the chance of any false "differs" in a table is at most 5%.

The best of k runs is selected on the same data, as if all k(k - 1)/2 pairs had been tested: the p-values of its k - 1
tests are first multiplied by k/2 (Bonferroni over all pairs). Without that, the best of eight equal runs was found
better than another in 13% of simulated tables; with it in 3%.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from gptq_awq.evaluation.scores import Scores
from gptq_awq.evaluation.statistics import LEVEL, MIN_BLOCKS, bootstrap_tests, holm, mcnemar
from gptq_awq.report.rows import Row, distinguishable, is_full_precision, is_perplexity, measured

log = logging.getLogger(__name__)
LOWER_IS_BETTER = ("ppl", "perplexity", "kl", "nll", "loss", "bits_per_byte", "brier", "mse", "ter", "wer")


@dataclass(frozen=True)
class Verdict:
    """Test results of one metric of one run; p-values are None where nothing was tested.

    Attributes:
        p: p-value of the difference from full precision.
        p_holm: `p` adjusted by Holm's method over all such tests of the table.
        same: whether the metric is not distinguishable from full precision; by the run's own interval, unadjusted,
            where p is None.
        best: whether the run is the best of those with the same bits of weights, activations and cache.
        p_best: p-value of the difference from the best run of the same bits.
        p_best_holm: `p_best` multiplied by k/2, then adjusted by Holm's method over all such tests of the table.
    """

    p: float | None = None
    p_holm: float | None = None
    same: bool = False
    best: bool = False
    p_best: float | None = None
    p_best_holm: float | None = None

    @property
    def ties(self) -> bool:
        """Whether the run is not the best of its bits, but not distinguishable from it."""
        return self.p_best_holm is not None and self.p_best_holm >= LEVEL


Verdicts = Mapping[tuple[str, str], Verdict]
Bits = tuple[float, str | None, str | None]
"""Bits of weights, and the formats of activations and cache (None where they are not rounded)."""
Leaders = Mapping[tuple[Bits, str], tuple[Row, Sequence[Row]]]
Arrays = Mapping[str, Float[np.ndarray, "values"]]


@dataclass(frozen=True)
class _Test:
    """A paired comparison of two series; `weights` are tokens per block, and the p-value is multiplied by `factor`."""

    path: str
    series: str
    first: Float[np.ndarray, "values"]
    second: Float[np.ndarray, "values"]
    weights: Float[np.ndarray, "values"]
    factor: float = 1.0


def verdicts(runs: Sequence[Row], scores: Callable[[str], Arrays]) -> Verdicts:
    """Test all metrics of the runs of a table; keys are (path, metric).

    `scores` maps a run's path to the arrays of its scores.npz, {} where it has none.
    """
    arrays = {run["path"]: scores(run["path"]) for run in runs}
    known = sorted({key for run in runs for name in measured(run["metrics"]) if (key := series(name))})
    leaders = best_of_bits(runs)
    full = _adjusted(_against_full_precision(arrays, known))
    best = _adjusted(_against_best(leaders, arrays))
    champions = {(leader["path"], name) for (_, name), (leader, _) in leaders.items()}
    found = {}
    for run in runs:
        for name in measured(run["metrics"]):
            key = run["path"], series(name) or name
            p, p_holm = full.get(key, (None, None))
            p_best, p_best_holm = best.get(key, (None, None))
            interval = run["metrics"].get(f"{name}/delta_ci95")
            by_interval = bool(interval) and not distinguishable(run["metrics"], name)
            same = by_interval if p_holm is None else p_holm >= LEVEL
            champion = (run["path"], name) in champions
            found[run["path"], name] = Verdict(p, p_holm, same, champion, p_best, p_best_holm)
    return found


def read_scores(path: str) -> Arrays:
    """Read the scores.npz of the run in folder `path`; {} where there is none, with a warning where it is damaged."""
    try:
        return Scores.read(path).arrays
    except OSError:
        return {}
    except ValueError as error:
        log.warning("no paired tests for %s: %s", path, error)
        return {}


def series(name: str) -> str:
    """Name of the array whose mean, or a function of it, is the metric `name`, if the run stored one."""
    text, _, metric = name.rpartition("/")
    if name.startswith("lm_eval/"):
        return name
    if is_perplexity(name) or metric == "dnll":
        return f"{text}/nll"
    return f"{text}/agree" if metric == "top1_agreement" else name  # further means are stored by their own names


def higher_is_better(name: str, run: Row | None = None) -> bool:
    """Whether larger values of a metric are better: as the run's config declares it, else judged by its name."""
    metric = name.rpartition("/")[2].partition(",")[0]
    declared = (((run or {}).get("config") or {}).get("eval") or {}).get("metric") or {}
    if not name.startswith("lm_eval/") and "higher_is_better" in (own := declared.get(metric.partition("@")[0], {})):
        return own["higher_is_better"]
    return not any(metric == word or word in metric.split("_") for word in LOWER_IS_BETTER) and not (
        is_perplexity(name) or metric == "dnll"
    )


def best_of_bits(runs: Iterable[Row]) -> Leaders:
    """The best run and the others for each (bits, metric) that two or more runs have."""
    groups: dict[tuple[Bits, str], list[Row]] = defaultdict(list)
    for run in runs:
        if not is_full_precision(run) and run["bits"] is not None:
            bits = run["bits"], run.get("act"), run.get("kv")
            for name in measured(run["metrics"]):
                if isinstance(value := run["metrics"][name], (int, float)) and not math.isnan(value):
                    groups[bits, name].append(run)
    found = {}
    for (bits, name), group in groups.items():
        if len(group) > 1:
            sign = -1 if higher_is_better(name, group[0]) else 1
            ranked = sorted(group, key=lambda run: (sign * run["metrics"][name], run["bits_per_weight"] or 0))
            found[bits, name] = ranked[0], ranked[1:]
    return found


def _against_full_precision(arrays: Mapping[str, Arrays], known: Iterable[str]) -> list[_Test]:
    tests = []
    for path, found in arrays.items():
        for key in sorted(known):
            first, second = found.get(f"{key}/baseline"), found.get(key)
            if first is None or second is None or first.shape != second.shape:
                continue
            if not np.array_equal(first, second):
                tests.append(_Test(path, key, first, second, _weights(found, key)))
    return tests


def _against_best(leaders: Leaders, arrays: Mapping[str, Arrays]) -> list[_Test]:
    tests: dict[tuple[str, str], _Test] = {}
    for (_, name), (best, others) in leaders.items():
        key = series(name)
        first = arrays[best["path"]].get(key) if key else None
        if key is None or first is None:
            continue
        weights, pairs_per_test = _weights(arrays[best["path"]], key), (len(others) + 1) / 2
        for run in others:
            second = arrays[run["path"]].get(key)
            if second is not None and second.shape == first.shape:
                test = _Test(run["path"], key, first, second, weights, pairs_per_test)
                tests.setdefault((run["path"], key), test)
    return list(tests.values())


def _weights(arrays: Arrays, key: str) -> Float[np.ndarray, "values"]:
    """Weights of a series in the bootstrap: tokens per block; 1 for each item of an lm-eval task."""
    tokens, count = arrays.get(f"{key.rpartition('/')[0]}/tokens"), len(arrays[key])
    if tokens is None or len(tokens) != count or key.startswith("lm_eval/"):
        return np.ones(count)
    return tokens if np.isfinite(tokens).all() and (tokens > 0).all() else np.ones(count)


def _adjusted(tests: Sequence[_Test]) -> dict[tuple[str, str], tuple[float, float]]:
    """Raw and Holm-adjusted p-values of one family of tests, by (path, series)."""
    raw = _p_values(tests)
    tested = [(test, p) for test, p in zip(tests, raw, strict=True) if p is not None]
    paid = [min(1.0, test.factor * p) for test, p in tested]
    return {(test.path, test.series): (p, q) for (test, p), q in zip(tested, holm(paid), strict=True)}


def _p_values(tests: Sequence[_Test]) -> list[float | None]:
    """P-value of each test, None where blocks are too few or infinite; series over the same blocks share resamples."""
    found: list[float | None] = [None] * len(tests)
    together: dict[bytes, list[int]] = defaultdict(list)
    for index, test in enumerate(tests):
        difference = test.second - test.first
        if not difference.any():
            found[index] = 1.0
        elif test.series.startswith("lm_eval/") and np.isin([test.first, test.second], (0, 1)).all():
            found[index] = mcnemar(int((difference < 0).sum()), int((difference > 0).sum()))
        elif len(difference) >= MIN_BLOCKS and np.isfinite(difference).all():
            together[test.weights.tobytes()].append(index)
    for group in together.values():
        differences = np.stack([tests[index].second - tests[index].first for index in group])
        for index, p in zip(group, bootstrap_tests(differences, tests[group[0]].weights), strict=True):
            found[index] = float(p)
    return found
