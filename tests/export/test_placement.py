"""Laws of observing a conversion: what was moved is found wherever it went, what was computed is not taken for it."""

import numpy as np
import pytest
import torch

from gptq_awq.export import placement
from gptq_awq.export.placement import Numbering, indices

SHAPES = {"q": (8, 6), "k": (4, 6), "experts.0": (3, 6), "experts.1": (3, 6), "norm": (6,)}
DRAW = np.random.default_rng(0)
VALUES = {name: DRAW.standard_normal(shape) for name, shape in SHAPES.items()}

MOVES = {
    "as it is": lambda t: t["q"],
    "rows permuted": lambda t: t["q"].reshape(2, 2, 2, 6).swapaxes(1, 2).reshape(8, 6),
    "experts stacked": lambda t: np.stack([t["experts.0"], t["experts.1"]]),
    "joined": lambda t: np.concatenate([t["k"], t["q"]]),
    "split": lambda t: t["q"][2:6],
    "every other row": lambda t: t["q"][::2],
    "transposed": lambda t: t["q"].T,
    "columns permuted": lambda t: t["q"][:, [3, 4, 5, 0, 1, 2]],
    "a vector": lambda t: t["norm"],
}
COMPUTED = {
    "one added": lambda t: t["norm"] + 1,
    "scaled": lambda t: t["q"] * 2,
    "negated": lambda t: -t["q"],
    "summed": lambda t: t["k"] + t["q"][:4],
    "padded": lambda t: np.concatenate([t["q"], np.zeros((1, 6))]),
    "an exponential": lambda t: -np.exp(np.minimum(t["norm"], 50)),
    "nothing of the model's": lambda _: np.arange(5),
}


@pytest.fixture(params=[1 << 23, 7])
def base(request, monkeypatch):
    """Digits of the usual size, and so small that a number has several of them."""
    monkeypatch.setattr(placement, "BASE", request.param)
    monkeypatch.setattr(placement, "AT_ONCE", 5)


def observed(move):
    numbering = Numbering.of(SHAPES)
    passes = [{n: numbering.digits(n, i).double().numpy() for n in SHAPES} for i in range(numbering.passes)]
    return numbering, numbering.runs([move(each) for each in passes])


@pytest.mark.parametrize("how", MOVES)
def test_what_was_moved_is_put_together_from_runs(how, base):
    numbering, runs = observed(MOVES[how])
    wanted = MOVES[how](VALUES)
    found = np.full(wanted.size, np.nan)
    for name, starts, positions, lengths in numbering.split(runs):
        found[indices(positions, lengths)] = VALUES[name].reshape(-1)[indices(starts, lengths)]
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("how", COMPUTED)
def test_what_was_computed_is_no_run(how, base):
    assert observed(COMPUTED[how])[1] is None


def test_neighbours_are_one_run_and_tensors_never_run_into_each_other():
    _, runs = observed(MOVES["joined"])
    assert len(runs.starts) == 2
    _, runs = observed(lambda t: np.concatenate([t["q"].reshape(-1), t["k"].reshape(-1)]))
    assert len(runs.starts) == 2


def test_numbers_of_a_large_model_are_exact_in_float32():
    numbering = Numbering({"a": (2, 3)}, {"a": 3 * 2**40})
    digits = [numbering.digits("a", i).numpy() for i in range(numbering.passes)]
    assert numbering.passes == 3
    (start,) = numbering.runs(digits).starts
    assert start == 3 * 2**40


def test_indices_are_starts_and_what_follows():
    assert indices(np.array([5, 0]), np.array([3, 2])).tolist() == [5, 6, 7, 0, 1]
    assert torch.from_numpy(indices(np.array([], int), np.array([], int))).numel() == 0
