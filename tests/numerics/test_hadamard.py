"""Hadamard matrices: orthogonal, of ±1, for the widths that models have."""

import pytest
import scipy.linalg
import torch

from gptq_awq.numerics.hadamard import hadamard, largest_order, times_hadamard

# Paley I (12, 20, 24, 60, 108), Paley II (28, 36, 76), and widths and head sizes of models.
ORDERS = [
    1,
    2,
    4,
    12,
    20,
    24,
    28,
    36,
    76,
    60,
    108,
    48,
    64,
    80,
    96,
    128,
    288,
    576,
    768,
    896,
    960,
    1536,
    2048,
    2560,
    3072,
]
LARGE = [3584, 4096, 5120, 8192, 14336]


@pytest.mark.parametrize("n", ORDERS)
def test_hadamard_rows_are_orthogonal(n):
    H = hadamard(n)
    assert torch.equal(H.abs(), torch.ones(n, n))
    assert torch.equal(H @ H.T, n * torch.eye(n))


@pytest.mark.parametrize("n", [2, 8, 64, 512])
def test_powers_of_two_are_sylvesters(n):
    assert torch.equal(hadamard(n), torch.from_numpy(scipy.linalg.hadamard(n)).float())


@pytest.mark.parametrize("n", ORDERS)
def test_the_fast_product_is_the_product(n):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(times_hadamard(x), x @ hadamard(n).double() / n**0.5)


@pytest.mark.parametrize("n", [*LARGE, 172, 7])
def test_the_fast_product_keeps_lengths_and_spreads_a_spike_over_one_block(n):
    spike = torch.zeros(n, dtype=torch.float64)
    spike[n // 3] = 1
    spread = times_hadamard(spike)
    order = largest_order(n)
    torch.testing.assert_close(spread.norm().item(), 1.0)
    torch.testing.assert_close(spread[spread != 0].abs(), torch.full((order,), order**-0.5, dtype=torch.float64))


def test_a_width_without_a_hadamard_matrix_gets_the_largest_blocks():
    assert [largest_order(n) for n in (*LARGE, 11008, 172, 7)] == [*LARGE, 11008, 4, 1]
    with pytest.raises(ValueError, match="172"):
        hadamard(172)
