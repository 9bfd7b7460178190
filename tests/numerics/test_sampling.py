"""Laws of drawing words: frequencies are the model's probabilities, at any temperature, and a seed repeats them."""

import pytest
import torch

from gptq_awq.numerics.sampling import sampled

LOGITS = torch.tensor([2.0, -1.0, 0.5, -torch.inf, 1.0])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_words_are_drawn_as_often_as_the_softmax_says(temperature):
    draws = sampled(LOGITS.expand(40_000, 5), torch.Generator().manual_seed(0), temperature)
    share = torch.bincount(draws[:, 0], minlength=5) / len(draws)
    torch.testing.assert_close(share, (LOGITS / temperature).softmax(-1), atol=0.01, rtol=0)
    assert share[3] == 0


def test_one_seed_draws_the_same_words():
    rows = LOGITS.expand(100, 5)
    first, second = (sampled(rows, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sampled(rows, torch.Generator().manual_seed(8)))
