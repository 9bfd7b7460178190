"""Coordinate descent after the sweep: no step raises the error, and where it ends no single change would lower it."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from helpers.linear_problems import moments as moments_of
from helpers.linear_problems import problem

from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.arithmetic import KINDS
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.kquant import KGrid
from gptq_awq.grids.rescale import times
from gptq_awq.grids.scaled_float import ScaledFloatGrid
from gptq_awq.grids.table import TableGrid
from gptq_awq.kernels import descent
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.refine import INNER, STORAGE, descended_plain, refined, refined_compiled, refined_plain
from gptq_awq.solvers.yaqa import TwoSided

GRIDS = {
    "int2": IntGrid(bits=2, group_size=16),
    "int3, float16": IntGrid(bits=3, group_size=16, scale_dtype="float16"),
    "int4, symmetric": IntGrid(bits=4, group_size=16, sym=True),
    "int3, whole rows": IntGrid(bits=3, group_size=-1),
    "int3, uneven groups": IntGrid(bits=3, group_size=24),
    "minimum": AffineGrid(bits=3, group_size=16),
    "nf4": TableGrid(group_size=16),
    "nvfp4": ScaledFloatGrid(group_size=16),
    "q2_k": KGrid("q2_k"),
}


def error(quantized, weight, hessian):
    """Output error of each row."""
    delta = (quantized.dequantize() - weight).double()
    return ((delta @ hessian.double()) * delta).sum(1)


def columns_of(grid):
    return 256 if grid == "q2_k" else 64


def drawn(columns=64, rows=37, seed=0):
    """A weight and the moments of its input."""
    weight, hessian = problem(rows, columns, seed)
    return weight, moments_of(hessian)


def rounded(grid, **options):
    weight, moments = drawn(columns_of(grid))
    return weight, moments, GPTQ(damping=0.0, **options).solve(weight, moments, GRIDS[grid]).quantized


@pytest.mark.parametrize("grid", GRIDS)
def test_no_pass_raises_the_error_of_any_row(grid):
    weight, moments, weight_now = rounded(grid)
    before = first = error(weight_now, weight, moments.hessian)
    for _ in range(4):
        weight_now = refined(weight_now, weight, moments.hessian, 1)
        after = error(weight_now, weight, moments.hessian)
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    assert after.sum() < 0.97 * first.sum()
    assert weight_now.loss == pytest.approx(float(after.sum()) / 2, rel=1e-4)


@pytest.mark.parametrize("grid", ["int2", "nf4", "minimum", "q2_k"])
def test_where_it_ends_no_other_code_lowers_the_error(grid):
    weight, moments, now = rounded(grid)
    now = refined(now, weight, moments.hessian, 60)
    H, E = moments.hessian.double(), (now.dequantize() - weight).double()
    scales, zeros = now.scales[:, now.group_of_column], now.zeros[:, now.group_of_column]
    for code in range(now.grid.arithmetic.max_code + 1):
        other = now.grid.decode(torch.full_like(weight, code), (scales, zeros))
        change = (other - now.dequantize()).double()
        gain = 2 * change * (E @ H) + change.square() * H.diagonal()  # of changing one code to this one
        assert (gain >= -1e-4 * error(now, weight, moments.hessian)[:, None]).all()


def test_where_it_ends_no_other_scale_lowers_the_error():
    weight, moments, now = rounded("int2")
    now = refined(now, weight, moments.hessian, 60)
    ends = error(now, weight, moments.hessian)
    for group in range(now.scales.shape[1]):
        for factor in (0.98, 0.995, 1.005, 1.02):
            scales = now.scales.clone()
            scales[:, group] *= factor
            moved = type(now)(now.codes, scales, now.zeros, now.group_of_column, now.grid)
            assert (error(moved, weight, moments.hessian) >= ends * (1 - 1e-5)).all()


def one_group(grid):
    """Weights, E H, H, scale and zero of one group of a rounded weight."""
    weight, moments, now = rounded(grid)
    group = 1 % now.scales.shape[1]
    columns = torch.nonzero(now.group_of_column == group)[:, 0]
    E = now.dequantize() - weight
    value, slope = (E + weight)[:, columns].contiguous(), (E @ moments.hessian)[:, columns].contiguous()
    return value, slope, moments.hessian[columns][:, columns].contiguous(), now.scales[:, group], now.zeros[:, group]


def assert_descends_alike(kernel, plain):
    codes, *others = kernel
    assert torch.equal(codes.cpu(), plain[0])
    assert torch.equal(others[0].cpu(), plain[1])
    assert torch.allclose(others[1].cpu(), plain[2], rtol=1e-3, atol=1e-3)


def plainly(grid):
    value, slope, h, scale, zero = one_group(grid)
    return descended_plain(GRIDS[grid], value, slope, h, (scale[:, None], zero[:, None])), value, slope


@pytest.mark.parametrize("options", [{}, {"act_order": True}])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_compiled_descent_is_the_plain_one(grid, options):
    weight, moments, start = rounded(grid, **options)
    compiled, plain = (each(start, weight, moments.hessian, 3) for each in (refined_compiled, refined_plain))
    assert (compiled.codes != plain.codes).float().mean() < 1e-3  # sums in another order: a tie may fall otherwise
    torch.testing.assert_close(compiled.scales, plain.scales, rtol=1e-3, atol=1e-6)
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-3)


@pytest.mark.parametrize("grid", ["int3, float16", "minimum"])
def test_a_row_is_refined_alike_in_any_company_on_any_number_of_threads(grid, monkeypatch):
    weight, moments, start = rounded(grid)
    whole = refined_compiled(start, weight, moments.hessian, 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    rows = torch.arange(5, 22)
    part = refined_compiled(start.rows(rows), weight[rows], moments.hessian, 2)
    assert torch.equal(part.codes, whole.codes[rows])
    assert torch.equal(part.scales, whole.scales[rows])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("positive", [True, False])
def test_the_kernel_stores_scales_as_torch_does(dtype, positive):
    exponents = torch.linspace(-60, 20, 4001) if dtype == "float16" else torch.linspace(-120, 120, 4001)
    scales = 2.0**exponents * (1 if positive else torch.tensor([1.0, -1.0]).repeat(2001)[:4001])
    grid = IntGrid(3, 16, scale_dtype=dtype) if positive else AffineGrid(3, 16, scale_dtype=dtype)
    wanted, _ = times(grid, scales, torch.zeros_like(scales), torch.ones_like(scales))
    ours = [float(descent.stored(np.float32(each), STORAGE[dtype], positive)) for each in scales.tolist()]
    assert torch.equal(torch.tensor(ours), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("triton") is None, reason="no CUDA device, or no Triton")
@pytest.mark.parametrize("grid", GRIDS)
def test_on_a_gpu_the_kernel_is_the_plain_loop(grid):
    from gptq_awq.kernels import triton_descent

    tensors = [each.contiguous().cuda() for each in one_group(grid)]
    arithmetic, codes = GRIDS[grid].arithmetic, torch.empty_like(tensors[0])
    levels, kind = tensors[0].new_tensor(arithmetic.levels), KINDS.index(arithmetic.kind)
    triton_descent.descend(*tensors, arithmetic.max_code, kind, levels, INNER, codes)
    assert_descends_alike((codes, *tensors[:2]), plainly(grid))


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"act_order": True, "static_groups": True}])
@pytest.mark.parametrize("grid", ["int3, float16", "nf4"])
def test_refinement_is_of_the_solver_and_follows_its_groups(grid, options):
    weight, moments, plain = rounded(grid, **options)
    _, _, better = rounded(grid, **options, refine=2)
    assert torch.equal(better.group_of_column, plain.group_of_column)
    before, after = (error(each, weight, moments.hessian).sum() for each in (plain, better))
    assert after < 0.97 * before
    assert better.loss == pytest.approx(float(after) / 2, rel=1e-4)
    assert better.sha256() == refined(plain, weight, moments.hessian, 2).sha256()


def test_stored_scales_stay_in_their_precision():
    _, _, better = rounded("int3, float16", refine=3)
    assert torch.equal(better.scales, better.scales.half().float())
    _, _, plain = rounded("q2_k")
    _, _, better = rounded("q2_k", refine=3)
    assert torch.equal(better.scales, plain.scales)  # which are codes themselves: only the weights' codes change
    assert not torch.equal(better.codes, plain.codes)


def test_linears_solved_together_are_refined_as_by_themselves():
    (a, moments), (b, others) = drawn(rows=64), drawn(rows=64, seed=1)
    solver = GPTQ(refine=2)
    together = solver.solve_together([a, b], [moments, others], GRIDS["int2"])
    for weight, own, solution in zip((a, b), (moments, others), together, strict=True):
        alone = solver.solve(weight, own, GRIDS["int2"]).quantized
        assert torch.equal(solution.quantized.codes, alone.codes)
        assert torch.equal(solution.quantized.scales, alone.scales)


def test_rows_that_the_end_loss_does_not_couple_are_refined_as_without_it():
    weight, moments = drawn()
    solver = GPTQ(act_order=True, static_groups=True, refine=2)
    coupled = TwoSided(solver, torch.eye(len(weight)), tile=5, damping=0.0).solve(weight, moments, GRIDS["int2"])
    alone = solver.solve(weight, moments, GRIDS["int2"])
    assert (coupled.quantized.codes == alone.quantized.codes).float().mean() > 0.999  # sums of other orders
    assert torch.allclose(coupled.quantized.scales, alone.quantized.scales, rtol=1e-3)


def test_what_the_end_loss_feels_falls_where_rows_are_coupled():
    weight, moments = drawn()
    draw = torch.Generator().manual_seed(2)
    g = torch.randn(300, len(weight), generator=draw) @ torch.randn(len(weight), len(weight), generator=draw)
    H_O = g.T @ g / len(g)
    found = []
    for passes in (0, 2):
        solver = TwoSided(GPTQ(act_order=True, static_groups=True, refine=passes), H_O, tile=1, damping=0.0)
        E = solver.solve(weight, moments, GRIDS["int3, float16"]).quantized.dequantize() - weight
        found.append(float((H_O @ E @ moments.hessian @ E.T).trace()))
    assert found[1] < 0.97 * found[0]


def test_dead_inputs_and_empty_groups_keep_finite_scales():
    weight, moments = drawn()
    dead = moments.hessian.clone()
    dead[:16], dead[:, :16] = 0, 0
    weight[:, 20:40] = 0
    solution = GPTQ(refine=3).solve(weight, moments_of(dead), GRIDS["int2"])
    assert torch.isfinite(solution.quantized.dequantize()).all()
    assert (solution.quantized.scales > 0).all()
