"""Laws of grids."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_awq.errors import UserError
from gptq_awq.grids.integer import IntGrid
from gptq_awq.solvers.rtn import RTN

grids = st.builds(
    IntGrid,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 1, 7, 16, 64]),
    sym=st.booleans(),
    search=st.sampled_from(["minmax", "mse"]),
    scale_dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)


def weights(seed, rows=8, columns=48, scale=1.0):
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(grid=grids, seed=st.integers(0, 10**6), scale=st.sampled_from([1e-6, 1.0, 1e3]))
def test_codes_round_trip(grid, seed, scale):
    w = weights(seed, scale=scale)
    params = grid.fit(w)
    codes = grid.encode(w, params)
    assert codes.min() >= 0
    assert codes.max() <= grid.max_code
    assert torch.equal(codes, codes.round())
    assert torch.equal(grid.encode(grid.decode(codes, params), params), codes)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), sym=st.booleans(), seed=st.integers(0, 10**6))
def test_minmax_error_is_within_one_step(bits, sym, seed):
    grid, w = IntGrid(bits, -1, sym), weights(seed)
    params = grid.fit(w)
    # Half a step inside the range; the symmetric grid clips its largest positive value, by half a step more.
    assert ((grid.decode(grid.encode(w, params), params) - w).abs() <= 1.001 * params[0]).all()


def test_more_bits_never_hurt():
    w = weights(0)
    errors = []
    for bits in range(2, 9):
        errors.append((RTN().solve(w, None, IntGrid(bits, 16)).quantized.dequantize() - w).square().sum())
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("sym", [False, True])
def test_range_searches_lower_what_they_minimise(sym):
    w = weights(1)
    x = torch.randn(200, 48) * torch.linspace(0.1, 3, 48)
    H = x.T @ x / 200

    def error(search):
        grid = IntGrid(3, -1, sym, search)
        params = grid.fit(w, H)
        delta = grid.decode(grid.encode(w, params), params) - w
        return delta.abs().pow(2.4).sum(), ((delta @ H) * delta).sum()

    assert error("mse")[0] < error("minmax")[0]
    assert error("hessian")[1] < error("minmax")[1]


def test_an_all_positive_row_uses_the_whole_symmetric_range():
    w = torch.linspace(0.1, 1, 32)[None]
    grid = IntGrid(4, -1, sym=True)
    params = grid.fit(w)
    assert (grid.decode(grid.encode(w, params), params) - w).abs().max() <= params[0].max()


def test_a_zero_group_stays_zero():
    for sym in (False, True):
        w = torch.zeros(3, 16)
        grid = IntGrid(4, 16, sym, scale_dtype="float16")
        params = grid.fit(w)
        assert torch.equal(grid.decode(grid.encode(w, params), params), w)


@pytest.mark.parametrize(("columns", "group_size", "groups"), [(48, 32, 2), (48, 64, 1), (48, -1, 1), (48, 7, 7)])
def test_the_last_group_may_be_shorter(columns, group_size, groups):
    quantized = RTN().solve(weights(2), None, IntGrid(4, group_size)).quantized
    assert quantized.scales.shape == (8, groups)
    size = columns if group_size == -1 else group_size
    assert torch.equal(quantized.group_of_column, torch.arange(columns) // size)


def test_bits_per_weight_counts_scales_and_zeros():
    def bits(**options):
        return RTN().solve(weights(3, columns=128), None, IntGrid(**options)).quantized.bits_per_weight

    assert bits(bits=4, group_size=64, sym=True, scale_dtype="float16") == 4 + 16 / 64
    assert bits(bits=4, group_size=64, sym=False, scale_dtype="float16") == 4 + 20 / 64
    assert bits(bits=3, group_size=-1, sym=False, scale_dtype="float16") == 3 + 19 / 128


@pytest.mark.parametrize(
    "options", [{"bits": 1}, {"bits": 9}, {"group_size": 0}, {"group_size": -2}, {"search": "best"}]
)
def test_what_a_grid_cannot_do_is_refused_by_name(options):
    with pytest.raises(UserError, match=next(iter(options))):
        IntGrid(**options)


@pytest.mark.parametrize("sym", [False, True])
def test_compiled_range_search_finds_what_the_plain_loop_finds(sym):
    w, x = weights(4, rows=200), torch.randn(200, 48) * torch.linspace(0.1, 3, 48)
    H = x.T @ x / 200
    grid = IntGrid(3, -1, sym, "hessian", "float16")
    low, high = grid._range(w)
    shrinks = [1 - i / 20 for i in range(11)]
    plain = grid._least(w, low, high, shrinks, lambda e: ((e @ H) * e).sum(1, keepdim=True))
    compiled = grid._least_compiled(w, low, high, shrinks, H)
    for ours, theirs in zip(compiled, plain, strict=True):
        assert (ours == theirs).float().mean() > 0.98  # near ties may fall either way
