"""Laws of the tails: percentiles of the KL with their intervals, and what the models' whole distributions share."""

import numpy as np
import pytest
import torch
from helpers.scored_models import windows

from gptq_awq.errors import UserError
from gptq_awq.evaluation.metrics.acceptance import AcceptanceRate
from gptq_awq.evaluation.metrics.base import PairedTokens
from gptq_awq.evaluation.metrics.confident_flips import ConfidentFlips
from gptq_awq.evaluation.metrics.kl_tail import KLTail
from gptq_awq.evaluation.metrics.top5_overlap import Top5Overlap
from gptq_awq.evaluation.statistics import resampled_quantiles
from gptq_awq.evaluation.token_metrics import token_metrics

TARGETS = torch.zeros(6, dtype=torch.int64)


def _paired(kl):
    text = windows(len(kl), kl.shape[1] + 1)
    return PairedTokens(text, kl, kl, kl, kl > 0)


def test_percentiles_of_the_tail_are_those_of_all_tokens_and_grow():
    kl = torch.rand(16, 255, generator=torch.Generator().manual_seed(0)) ** 4
    found = KLTail().values(_paired(kl))
    assert found[""] == pytest.approx(float(np.percentile(kl.double(), 99)))
    assert found["/p50"] < found["/p90"] < found[""] < found["/p99.9"] < found["/max"] == float(kl.double().max())


def test_intervals_of_the_tail_hold_the_percentiles_and_are_stored_beside_them():
    kl = torch.rand(16, 255, generator=torch.Generator().manual_seed(0)) ** 4
    metrics = token_metrics(_paired(kl), [KLTail()])
    for key in ("text/kl_tail", "text/kl_tail/p50", "text/kl_tail/p90", "text/kl_tail/p99.9"):
        low, high = metrics[f"{key}/ci95"]
        assert low <= metrics[key] <= high
        assert low < high
    assert "text/kl_tail/max/ci95" not in metrics


def test_a_resampled_quantile_is_that_of_the_drawn_tokens_written_out():
    rng = np.random.default_rng(0)
    series = rng.random((5, 300))
    found = resampled_quantiles(series, [0.5, 0.99], block=128, resamples=20, seed=3)
    blocks = [row[a : a + 128] for row in series for a in (0, 128, 256)]
    draws = np.random.default_rng(3).multinomial(15, np.full(15, 1 / 15), size=20)
    for r, counts in enumerate(draws):
        drawn = np.sort(np.concatenate([np.tile(b, c) for b, c in zip(blocks, counts, strict=True)]))
        for k, level in enumerate((0.5, 0.99)):
            assert found[k, r] == drawn[int(np.ceil(level * len(drawn) - 1e-9)) - 1]


def test_too_few_blocks_give_percentiles_without_intervals():
    metrics = token_metrics(_paired(torch.rand(1, 100)), [KLTail()])
    assert "text/kl_tail" in metrics
    assert not any(key.endswith("ci95") for key in metrics)


def test_acceptance_is_one_minus_the_total_variation_distance():
    full, quantized = torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(0))
    distance = (full.softmax(-1) - quantized.softmax(-1)).abs().sum(-1) / 2
    torch.testing.assert_close(AcceptanceRate().of_logits(full, quantized, TARGETS), 1 - distance)
    torch.testing.assert_close(AcceptanceRate().of_logits(full, full, TARGETS), torch.ones(6))


def test_overlap_counts_words_in_common_whatever_their_order():
    full = torch.arange(20.0).expand(6, 20)
    reordered = full.clone()
    reordered[:, 15:] = reordered[:, 15:].flip(-1)
    assert (Top5Overlap().of_logits(full, reordered, TARGETS) == 1).all()
    reordered[:, :2] += 100  # two other words come in
    assert Top5Overlap().of_logits(full, reordered, TARGETS).tolist() == pytest.approx([0.6] * 6)


def test_a_flip_counts_only_where_full_precision_was_sure():
    full = torch.tensor([[5.0, 0, 0], [0.1, 0, 0]])
    flipped = torch.tensor([[0.0, 5, 0], [0, 5.0, 0]])
    assert ConfidentFlips().of_logits(full, flipped, TARGETS[:2]).tolist() == [1, 0]
    assert ConfidentFlips(confidence=0.2).of_logits(full, flipped, TARGETS[:2]).tolist() == [1, 1]
    with pytest.raises(UserError, match=r"ConfidentFlips\.confidence=2"):
        ConfidentFlips(confidence=2)
