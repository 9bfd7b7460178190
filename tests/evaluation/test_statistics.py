from math import comb

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp, ttest_rel

from gptq_awq.evaluation.statistics import (
    block_sums,
    bootstrap_tests,
    holm,
    interval,
    mcnemar,
    paired_test,
    resampled_means,
)


def correlated(rng, windows, length, memory=0.9):
    """Windows of an autoregressive series of mean 0, stationary from its first token on."""
    x = np.empty((windows, length))
    x[:, 0] = rng.normal(size=windows) / np.sqrt(1 - memory**2)
    for t in range(1, length):
        x[:, t] = memory * x[:, t - 1] + rng.normal(size=windows)
    return x


def coverage(block, repeats, resamples):
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(repeats):
        means = resampled_means(correlated(rng, 8, 1024)[None], block=block, resamples=resamples, seed=seed)[0]
        low, high = interval(means)
        covered += low <= 0 <= high
    return covered / repeats


def test_the_interval_covers_the_truth_of_correlated_tokens():
    assert 0.90 <= coverage(block=128, repeats=200, resamples=400) <= 0.99


def test_blocks_of_one_token_would_not():
    assert coverage(block=1, repeats=30, resamples=100) < 0.6


def test_independent_tokens_have_the_textbook_standard_error():
    x = np.random.default_rng(0).normal(2, 3, size=(1, 8, 2047))
    means = resampled_means(x)[0]
    assert means.mean() == pytest.approx(x.mean(), abs=0.02)
    assert means.std() == pytest.approx(x.std() / np.sqrt(x.size), rel=0.15)


def test_short_last_blocks_weigh_by_their_length():
    x = np.zeros((1, 8, 10))
    x[..., 8:] = 1  # the last two tokens of every window: the short block of 2 after two of 4
    means = resampled_means(x, block=4, resamples=20_000)[0]
    assert means.mean() == pytest.approx(0.2, abs=0.005)


def test_series_are_resampled_together():
    x = np.random.default_rng(0).normal(size=(1, 4, 1000))
    first, second = resampled_means(np.concatenate([x, x + 1]))
    assert np.allclose(second - first, 1)


def test_a_seed_fixes_the_interval():
    x = np.random.default_rng(0).normal(size=(1, 8, 500)).astype(np.float32)
    assert np.array_equal(resampled_means(x, seed=3), resampled_means(x, seed=3))
    assert not np.array_equal(resampled_means(x, seed=3), resampled_means(x, seed=4))


def test_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match="4 blocks of 128 tokens"):
        resampled_means(np.zeros((1, 2, 255)))


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 5), (30, 12), (0, 9), (400, 350)])
def test_mcnemar_is_twice_the_exact_binomial_tail(lost, won):
    n, fewer = lost + won, min(lost, won)
    expected = min(1.0, 2 * sum(comb(n, i) for i in range(fewer + 1)) / 2**n)
    assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-12)


def test_right_and_wrong_answers_are_compared_by_mcnemar():
    full = np.array([1.0] * 60 + [0.0] * 40)
    quantized = np.array([1.0] * 45 + [0.0] * 15 + [1.0] * 3 + [0.0] * 37)
    test = paired_test(full, quantized)
    assert test.test == "mcnemar"
    assert test.delta == pytest.approx(-0.12)
    assert test.p_value == pytest.approx(binomtest(3, 18).pvalue)
    assert test.distinguishable
    assert test.ci95[0] < -0.12 < test.ci95[1] < 0


def test_values_are_compared_by_a_bootstrap_that_agrees_with_the_t_test():
    rng = np.random.default_rng(0)
    full = rng.normal(size=300)
    quantized = full + rng.normal(0.08, 0.6, size=300)
    test = paired_test(full, quantized)
    assert test.test == "paired bootstrap"
    assert test.p_value == pytest.approx(ttest_rel(quantized, full).pvalue, abs=0.02)


@pytest.mark.parametrize("items", [np.array([0.0, 1, 1, 0]), np.array([0.3, -2, 5])])
def test_equal_models_are_not_distinguishable(items):
    test = paired_test(items, items)
    assert (test.delta, test.ci95, test.p_value) == (0, (0, 0), 1)
    assert not test.distinguishable


def test_no_difference_is_rarely_called_one():
    rng = np.random.default_rng(1)
    pairs = [(rng.normal(size=60), rng.normal(size=60)) for _ in range(200)]
    assert np.mean([paired_test(a, b, seed=i).distinguishable for i, (a, b) in enumerate(pairs)]) < 0.1


def test_items_that_do_not_pair_are_refused():
    with pytest.raises((ValueError, TypeError), match=r"pair|items"):  # TypeError where shapes are checked
        paired_test(np.zeros(3), np.zeros(4))


def test_block_sums_are_those_of_each_windows_blocks():
    sums, lengths = block_sums(np.arange(20.0).reshape(1, 2, 10), block=4)
    assert lengths.tolist() == [4, 4, 2, 4, 4, 2]
    assert sums.tolist() == [[6, 22, 17, 46, 62, 37]]


def test_holm_equals_the_values_of_its_definition():
    # p = 0.01, 0.02, 0.03, 0.04 by hand: 4 × 0.01, 3 × 0.02, then never less than before; ties share the larger.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    # R's p.adjust(c(0.001, 0.5, 0.02, 0.9, 0.013), "holm")
    assert holm([0.001, 0.5, 0.02, 0.9, 0.013]) == pytest.approx([0.005, 1.0, 0.06, 1.0, 0.052])
    assert holm([]) == []


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_bootstrap_tests_reject_what_is_true_as_rarely_as_they_say(draw):
    rng = np.random.default_rng(0)
    lengths = np.where(np.arange(64) % 2, 127, 128)
    x = getattr(rng, draw)(size=(4000, 64))
    x = (x - (draw == "exponential")) * lengths
    p = np.concatenate([bootstrap_tests(part, lengths, 2000, seed) for seed, part in enumerate(np.split(x, 4))])
    assert 0.035 < np.mean(p < 0.05) < 0.065
    assert np.mean(p < 0.001) < 0.005  # beyond what 2000 resamples can count


def test_bootstrap_tests_agree_with_the_t_test_far_beyond_their_resolution():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 128)) + np.linspace(0, 1.2, 40)[:, None]
    p, expected = bootstrap_tests(x, np.ones(128)), ttest_1samp(x, 0, axis=1).pvalue
    assert expected.min() < 1e-20
    assert np.log10(p) == pytest.approx(np.log10(expected), rel=0.15, abs=0.1)


def test_bootstrap_tests_do_not_depend_on_units_and_know_no_difference():
    x = np.random.default_rng(0).normal(0.3, 1, size=(1, 32))
    p = bootstrap_tests(np.concatenate([x, x * 1e-30, -x, 0 * x]), np.full(32, 128))
    assert p[1:3] == pytest.approx(p[0], rel=1e-3)
    assert p[3] == 1


def test_holm_over_bootstrap_tests_keeps_a_tables_false_alarms_rare():
    rng = np.random.default_rng(2)
    x = rng.gamma(8, size=(4000, 64)) - 8  # as skewed as losses of blocks are
    p = bootstrap_tests(x, np.ones(64), 2000)
    assert np.mean([min(holm(list(table))) < 0.05 for table in np.split(p, 100)]) < 0.12


def test_too_few_blocks_are_not_tested():
    with pytest.raises(ValueError, match="7 blocks"):
        bootstrap_tests(np.ones((1, 7)), np.ones(7))
