"""Laws of the compiled inner loops that no other test covers."""

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch

from gptq_awq.calibration.moments import MomentsSum
from gptq_awq.errors import UserError
from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.arithmetic import in_numbers
from gptq_awq.grids.base import fit_all, nearest
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.table import TableGrid
from gptq_awq.kernels import rank_k
from gptq_awq.kernels.columns import permute_columns
from gptq_awq.kernels.product import packed, product
from gptq_awq.kernels.quadratic import Quadratic
from gptq_awq.kernels.threads import match_torch
from gptq_awq.numerics.linalg import quadratic, rough_form
from gptq_awq.tuning.distill import summed_kl

needs_bf16 = pytest.mark.skipif(not rank_k.available(), reason="this CPU has no bfloat16 dot product (AVX512-BF16)")


@needs_bf16
@pytest.mark.parametrize(("tokens", "width"), [(1, 5), (7, 48), (64, 49), (333, 200), (5000, 96)])
def test_rank_k_products_are_those_of_float64(tokens, width):
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).mul(torch.logspace(-2, 2, width))
    x = x.bfloat16()
    sums = rank_k.RankK(width)
    sums.add(x.view(torch.uint16).numpy())
    sums.add(x[:1].view(torch.uint16).numpy())
    x = torch.cat([x, x[:1]]).double()
    exact = (x.T @ x).numpy()
    size = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    assert (np.abs(np.triu(sums.products[:width, :width] - exact)) <= 1e-5 * size).all()
    np.testing.assert_allclose(sums.magnitude[:width], x.abs().sum(0), rtol=1e-5)
    assert (sums.magnitude[width:] == 0).all()
    np.testing.assert_array_equal(sums.largest[:width], x.abs().amax(0))


@needs_bf16
def test_moments_of_bfloat16_inputs_are_positive_definite_and_mix_with_other_precisions():
    x = torch.randn(600, 64, generator=torch.Generator().manual_seed(0)).bfloat16() + 3  # a large common mean
    exact = (x.double().T @ x.double()) / len(x)
    for parts in ([x], [x[:250], x[250:]], [x[:250], x[250:].float()]):
        total = MomentsSum(64, torch.device("cpu"))
        for part in parts:
            total.add(part, None)
        moments = total.finish("here")
        assert torch.allclose(moments.hessian.double(), exact, rtol=1e-5, atol=0)
        assert torch.equal(moments.hessian, moments.hessian.T)
        assert torch.linalg.eigvalsh(moments.hessian.double()).min() > 0.99 * torch.linalg.eigvalsh(exact).min()
        assert torch.allclose(moments.mean_abs.double(), x.double().abs().mean(0), rtol=3e-6)
        assert torch.equal(moments.max_abs, x.float().abs().amax(0))


@needs_bf16
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_bfloat16_activations_are_seen(bad):
    x = torch.randn(9, 50).bfloat16()
    x[8, 49] = bad
    total = MomentsSum(50, torch.device("cpu"))
    total.add(x, None)
    with pytest.raises(UserError, match="non-finite activations enter here"):
        total.finish("here")


def hessian(width, generator):
    x = torch.randn(2 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return x.T @ x / len(x)


def test_quadratic_is_the_trace_it_says():
    generator = torch.Generator().manual_seed(0)
    H, delta = hessian(500, generator), torch.randn(70, 500, generator=generator)
    exact = float(((delta.double() @ H.double()) * delta).sum())
    assert quadratic(delta, H) == pytest.approx(exact, rel=1e-6)
    if (form := rough_form(H)) is not None:
        assert form.of(delta.numpy()) == pytest.approx(exact, rel=3e-3)


@needs_bf16
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (48, 96), (50, 101), (200, 301)])
@pytest.mark.parametrize("grid", [IntGrid(3, 40), IntGrid(4, -1), AffineGrid(4, 32), TableGrid("nf4", 64)], ids=str)
def test_one_pass_of_rounding_and_its_error_is_both_one_after_the_other(rows, columns, grid):
    generator = torch.Generator().manual_seed(rows)
    H, W = hessian(columns, generator), torch.randn(rows, columns, generator=generator)
    s = torch.rand(columns, generator=generator) + 0.5
    fitted, size = fit_all(grid, W, None), columns if grid.group_size == -1 else grid.group_size
    form = Quadratic(H.numpy())
    scales, zeros = fitted.scales.contiguous().numpy(), fitted.zeros.contiguous().numpy()
    error = form.of_rounding(W.numpy(), scales, zeros, size, in_numbers(grid.arithmetic), s.numpy())
    delta = (nearest(grid, W) - W) / s
    assert error == pytest.approx(form.of(delta.numpy()), rel=1e-4)
    assert error == pytest.approx(float(((delta.double() @ H.double()) * delta).sum()), rel=2e-2)


@needs_bf16
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 1, 2), (48, 48, 64), (50, 97, 101), (130, 200, 33)])
def test_product_rounds_what_enters_it_and_nothing_else(rows, columns, width):
    generator = torch.Generator().manual_seed(width)
    x, w = torch.randn(rows, width, generator=generator), torch.randn(columns, width, generator=generator)
    exact = x.bfloat16().double() @ w.bfloat16().double().T
    found = torch.from_numpy(product(packed(x.numpy()), rows, packed(w.numpy()), len(w)))
    assert ((found - exact).abs() <= 1e-5 * (x.abs().double() @ w.abs().double().T)).all()


@needs_bf16
def test_a_product_keeps_nan_and_infinity():
    x = torch.ones(3, 8)
    x[1, 2], x[2, 2] = torch.nan, torch.inf
    found = product(packed(x.numpy()), 3, packed(np.ones((4, 8), np.float32)), 4)
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()
    assert np.isinf(found[2]).all()


def test_compiled_loops_use_as_many_threads_as_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        match_torch()
        assert numba.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
        match_torch()


def test_compiled_loops_leave_torch_as_many_threads_as_it_had():
    code = (
        "import torch; torch.set_num_threads(1); from gptq_awq.kernels.threads import match_torch; match_torch(); "
        "assert torch.get_num_threads() == 1, torch.get_num_threads()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"NUMBA_NUM_THREADS": "2"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [7, 256, 1000])
def test_a_compiled_divergence_and_its_gradient_are_autograds_in_float64(dtype, words):
    generator = torch.Generator().manual_seed(words)
    full = torch.randn(9, words, generator=generator).mul(4).to(dtype)
    own = (full + torch.randn(9, words, generator=generator)).to(dtype)
    own[0], own[1, 2], full[1, 2] = full[0], -torch.inf, -torch.inf
    kl, gradient = summed_kl(own, full)
    wide = own.double().requires_grad_()
    log_p, log_q = full.double().log_softmax(-1), wide.log_softmax(-1)
    exact = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum()
    exact.backward()
    assert kl == pytest.approx(float(exact.detach()), rel=1e-5)
    assert gradient.dtype == dtype
    torch.testing.assert_close(
        gradient.double(), wide.grad, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 2**-8, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_permuted_columns_are_indexed_ones(dtype):
    matrix = torch.randint(256, (37, 70), generator=torch.Generator().manual_seed(0)).to(dtype)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    expected = matrix[:, order]
    permute_columns(matrix.numpy(), order.numpy())
    assert torch.equal(matrix, expected)
