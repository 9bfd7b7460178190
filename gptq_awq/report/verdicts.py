"""What can be told apart: every run from full precision, and every run from the best one of its bits.

Bits are those of weights, activations and cache: W4A8 competes with W4A8, not with W4A16.

Tests are paired, over the blocks of tokens and the items that both runs scored (`scores.npz`): the studentized block
bootstrap of the mean loss (of which perplexity is a function), KL and agreement; McNemar's exact test for items
that are right or wrong, else the bootstrap over items. Each of the two families is adjusted by Holm's method over all
tests of a table, so a table has at most 5% chance of any false "differs" in each.

The best of k runs was chosen by looking, as if all k(k - 1)/2 pairs had been tested: the p-values of its k - 1 tests
are first multiplied by k/2 (Bonferroni over all pairs). Without that, a table of eight equal runs found one worse than
the best in 13% of simulations; with it in 3%.
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
    """What is known of one metric of one run; p-values are None where nothing was tested.

    Attributes:
        p: that chance alone makes it differ from full precision.
        p_holm: the same, adjusted for all such tests of the table.
        same: not distinguishable from full precision; by the run's own interval, unadjusted, where p is None.
        best: the best of the runs of as many bits: of weights, activations and cache.
        p_best, p_best_holm: that chance alone makes it differ from the best of the runs of as many bits.
    """

    p: float | None = None
    p_holm: float | None = None
    same: bool = False
    best: bool = False
    p_best: float | None = None
    p_best_holm: float | None = None

    @property
    def ties(self) -> bool:
        """Not the best, but not distinguishable from it."""
        return self.p_best_holm is not None and self.p_best_holm >= LEVEL


Verdicts = Mapping[tuple[str, str], Verdict]
Bits = tuple[float, str | None, str | None]
"""Of weights, and the labels of what activations and cache are rounded to: None where they aren't."""
Leaders = Mapping[tuple[Bits, str], tuple[Row, Sequence[Row]]]
Arrays = Mapping[str, Float[np.ndarray, "values"]]


@dataclass(frozen=True)
class _Test:
    """Two series to compare, and by what the p-value is multiplied; `weights` are tokens per block."""

    path: str
    series: str
    first: Float[np.ndarray, "values"]
    second: Float[np.ndarray, "values"]
    weights: Float[np.ndarray, "values"]
    factor: float = 1.0


def verdicts(runs: Sequence[Row], scores: Callable[[str], Arrays]) -> Verdicts:
    """By path and metric. `scores` maps a run's path to its arrays, {} where it has none."""
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
    """The arrays of the run in folder `path`, {} (and a warning where they are damaged) if it has none."""
    try:
        return Scores.read(path).arrays
    except OSError:
        return {}
    except ValueError as error:
        log.warning("no paired tests for %s: %s", path, error)
        return {}


def series(name: str) -> str | None:
    """The array whose mean (or a function of it) a metric is."""
    text, _, metric = name.rpartition("/")
    if name.startswith("lm_eval/"):
        return name
    if is_perplexity(name) or metric == "dnll":
        return f"{text}/nll"
    return {"kl": f"{text}/kl", "top1_agreement": f"{text}/agree"}.get(metric)


def higher_is_better(name: str) -> bool:
    """Whether more of a metric is better, by its name."""
    metric = name.rpartition("/")[2].partition(",")[0]
    return not any(metric == word or word in metric.split("_") for word in LOWER_IS_BETTER) and not (
        is_perplexity(name) or metric == "dnll"
    )


def best_of_bits(runs: Iterable[Row]) -> Leaders:
    """The best run and the others, by nominal bits and metric; only where there are two or more to choose from."""
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
            sign = -1 if higher_is_better(name) else 1
            ranked = sorted(group, key=lambda run: (sign * run["metrics"][name], run["bits_per_weight"] or 0))
            found[bits, name] = ranked[0], ranked[1:]
    return found


def _against_full_precision(arrays: Mapping[str, Arrays], known: Iterable[str]) -> list[_Test]:
    tests = []
    for path, found in arrays.items():
        for key in sorted(known):
            first, second = found.get(f"{key}/baseline"), found.get(key)
            if first is not None and second is not None and not np.array_equal(first, second):
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
    """Tokens per block; items weigh alike."""
    tokens = arrays.get(f"{key.rpartition('/')[0]}/tokens")
    return tokens if tokens is not None and not key.startswith("lm_eval/") else np.ones(len(arrays[key]))


def _adjusted(tests: Sequence[_Test]) -> dict[tuple[str, str], tuple[float, float]]:
    """The p-value, and what Holm makes of it among all `tests`, by path and series."""
    raw = _p_values(tests)
    tested = [(test, p) for test, p in zip(tests, raw, strict=True) if p is not None]
    paid = [min(1.0, test.factor * p) for test, p in tested]
    return {(test.path, test.series): (p, q) for (test, p), q in zip(tested, holm(paid), strict=True)}


def _p_values(tests: Sequence[_Test]) -> list[float | None]:
    """None where blocks are too few or infinite. What was scored on the same blocks is resampled together."""
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
