"""Laws of rounding with output-side curvature, against a dense solve with the Kronecker product of both factors."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.linear_problems import moments, problem
from helpers.quantization_runs import GRID, SMALL, tokens
from helpers.tiny_models import tiny_model

from gptq_awq import quantize_model
from gptq_awq.allocation.sensitivity import output_fisher
from gptq_awq.api import load_method
from gptq_awq.calibration.output_curvature import OutputCurvature
from gptq_awq.errors import UserError
from gptq_awq.grids.integer import IntGrid
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import is_linear
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.qronos import Qronos
from gptq_awq.solvers.yaqa import TwoSided, unit_upper_factor


def curvature(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(6 * rows, rows, generator=generator) @ torch.randn(rows, rows, generator=generator)
    return G.T @ G / len(G)


def dense(W, H, H_O, quantized, damping, damping_O):
    """Round entry by entry, rows by falling diag(H_O), each at its optimum given all entries that are rounded already.

    The quadratic form is the dense matrix of both factors; scales are those that the solver chose.
    """
    rows, columns = W.shape
    damp = [factor * M.diagonal().mean() * torch.eye(len(M), dtype=torch.float64) for factor, M in
            ((damping_O, H_O), (damping, H))]  # fmt: skip
    K = torch.kron(H_O.double() + damp[0], H.double() + damp[1])
    order = [r * columns + c for r in torch.argsort(H_O.diagonal(), descending=True).tolist() for c in range(columns)]
    E, codes = torch.zeros(rows * columns, dtype=torch.float64), torch.zeros(rows * columns)
    scales, zeros = (x[:, quantized.group_of_column].flatten() for x in (quantized.scales, quantized.zeros))
    for position, i in enumerate(order):
        rest, done = order[position:], order[:position]
        best = -torch.linalg.solve(K[rest][:, rest], K[rest][:, done] @ E[done])[0] if done else torch.zeros(())
        wanted = W.flatten()[i].double() - best
        params = scales[i].view(1, 1), zeros[i].view(1, 1)
        code = quantized.grid.encode(wanted.float().view(1, 1), params)
        codes[i] = code[0, 0]
        E[i] = W.flatten()[i] - quantized.grid.decode(code, params)[0, 0]
    return codes.view(rows, columns)


@pytest.mark.parametrize("seed", range(3))
def test_tiles_of_one_row_are_the_dense_solve(seed):
    W, H = problem(6, 8, seed)
    H_O = curvature(6, seed)
    grid = IntGrid(3, 8, scale_dtype="float32")
    found = TwoSided(GPTQ(damping=0.01), H_O, tile=1, damping=0.1).solve(W, moments(H), grid).quantized
    assert torch.equal(found.codes.float(), dense(W, H, H_O, found, 0.01, 0.1))


@pytest.mark.parametrize("solver", [GPTQ(act_order=True, static_groups=True), Qronos(act_order=True)])
@pytest.mark.parametrize("tile", [1, 5, 64])
def test_without_coupling_it_is_the_solver_itself(solver, tile):
    W, H = problem(24, 64)
    own = replace(moments(H), cross=H + 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))
    plain = solver.solve(W, own, GRID).quantized
    for H_O in (torch.diag(torch.arange(1.0, 25.0)), torch.zeros(24, 24)):
        found = TwoSided(solver, H_O, tile, 0.0).solve(W, own, GRID)
        assert found.algorithm == solver.name
        assert (found.quantized.codes == plain.codes).float().mean() > 0.999  # products of other shapes
        torch.testing.assert_close(found.quantized.scales, plain.scales)


def test_what_it_minimizes_is_smaller_and_more_so_with_small_tiles():
    totals = dict.fromkeys((None, 16, 4, 1), 0.0)
    for seed in range(6):
        W, H = problem(32, 48, seed)
        H_O = curvature(32, seed)
        for tile in totals:
            solver = GPTQ() if tile is None else TwoSided(GPTQ(), H_O, tile, 0.01)
            E = W - solver.solve(W, moments(H), IntGrid(3, 48)).quantized.dequantize()
            totals[tile] += float((H_O @ E @ H @ E.T).trace() / (H_O @ W @ H @ W.T).trace())
    assert totals[None] > totals[16] > totals[4] > totals[1]
    assert totals[1] < 0.7 * totals[None]


def test_rows_of_different_blocks_are_solved_apart():
    W, H = problem(20, 32)
    H_O = curvature(20)
    whole = TwoSided(GPTQ(), torch.cat([H_O[:12, :12], torch.nn.functional.pad(H_O[12:, 12:], (0, 4))]), 1, 0.1)
    found = whole.solve(W, moments(H), GRID).quantized
    for rows in (slice(0, 12), slice(12, 20)):
        part = TwoSided(GPTQ(), H_O[rows, rows].contiguous(), 1, 0.1).solve(W[rows], moments(H), GRID).quantized
        assert torch.equal(found.codes[rows], part.codes)


def test_the_factor_multiplies_to_the_damped_curvature():
    H = curvature(12)
    U = unit_upper_factor(H, 0.5).double()
    damped = H.double() + 0.5 * H.diagonal().mean() * torch.eye(12)
    D = torch.linalg.inv(U) @ damped @ torch.linalg.inv(U).T
    torch.testing.assert_close(D, torch.diag(D.diagonal()), rtol=0, atol=1e-4)
    torch.testing.assert_close(U, U.triu())


@pytest.mark.parametrize("rows", [2048, 50])
def test_curvature_is_the_mean_product_of_gradients_by_outputs(rows):
    """Against gradients of leaves that are added to each linear's output, token by token of one label each."""
    model, data = tiny_model("llama"), tokens(3, 12)
    found = OutputCurvature(rows=rows).gather(model, data, torch.float32)
    draw, sums = torch.Generator().manual_seed(0), {}
    for ids in data.ids.long():
        added, handles = {}, []
        for name in found:
            module = model.get_submodule(name)
            added[name] = torch.zeros(12, module.weight.shape[0], requires_grad=True)
            handles.append(module.register_forward_hook(lambda _m, _i, out, own=added[name]: out + own))
        logits = model(ids[None]).logits[0]
        cumulative = logits.detach().softmax(-1).cumsum(-1)
        labels = (cumulative <= torch.rand(12, 1, generator=draw) * cumulative[:, -1:]).sum(-1)
        (-logits.log_softmax(-1)[range(12), labels].sum()).backward()
        for handle in handles:
            handle.remove()
        for name, own in added.items():
            sums[name] = sums.get(name, 0) + own.grad.T @ own.grad / 36
    _, blocks = find_blocks(model)
    assert len(found) == sum(is_linear(module) for module in blocks.modules())
    for name, wanted in sums.items():
        for first in range(0, len(wanted), rows):
            block = wanted[first : first + rows, first : first + rows]
            torch.testing.assert_close(found[name][first : first + rows, : len(block)], block, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


def test_its_diagonal_is_the_fisher_information_of_allocation():
    model, data = tiny_model("llama"), tokens(3, 12)
    found = OutputCurvature().gather(model, data, torch.float32)
    for name, fisher in output_fisher(model, data).items():
        torch.testing.assert_close(found[name].diagonal(), fisher, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("rows", [2048, 24])
def test_in_bfloat16_it_is_that_of_the_same_gradients_in_float64(monkeypatch, rows):
    model, data, seen = tiny_model("llama"), tokens(3, 40), []
    products = OutputCurvature._products
    monkeypatch.setattr(OutputCurvature, "_products", lambda self, g: (seen.append(g), products(self, g))[1])
    found = OutputCurvature(rows=rows).gather(model, data, torch.bfloat16)
    assert {g.dtype for g in seen} == {torch.bfloat16}
    for width in {len(each) for each in found.values()}:
        of_width = [g.double() for g in seen if g.shape[1] == width]
        wanted = sum((g.T @ g for g in of_width), torch.zeros(width, width, dtype=torch.float64)) / len(
            data.ids.flatten()
        )
        total = sum((each for each in found.values() if len(each) == width), torch.zeros(()))
        for first in range(0, width, rows):
            block = wanted[first : first + rows, first : first + rows].float()
            torch.testing.assert_close(total[first : first + rows, : len(block)], block, rtol=1e-4, atol=1e-7)


def test_of_some_windows_it_is_that_of_a_text_that_ends_there():
    model, data = tiny_model("llama"), tokens(6, 12)
    found = OutputCurvature(windows=2).gather(model, data, torch.float32)
    wanted = OutputCurvature().gather(model, data.first(2), torch.float32)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_the_preset_rounds_every_linear_and_uncoupled_it_is_fast(name):
    method, _ = load_method("yaqa")
    done = quantize_model(tiny_model(name), tokens(), method, grid=GRID, settings=SMALL)
    plain = quantize_model(tiny_model(name), tokens(), load_method("fast")[0], grid=GRID, settings=SMALL)
    assert done.weights.keys() == plain.weights.keys()
    assert any(not torch.equal(done.weights[n].codes, plain.weights[n].codes) for n in plain.weights)
    alone = replace(method, output_curvature=OutputCurvature(damping=1e9))
    apart = quantize_model(tiny_model(name), tokens(), alone, grid=GRID, settings=SMALL)
    same = [(apart.weights[n].codes == plain.weights[n].codes).float().mean() for n in plain.weights]
    assert min(same) > 0.9  # ties and products of other shapes, which later layers then see
    assert sum(same) / len(same) > 0.98


def test_the_curvature_is_gathered_once_for_all_widths(cli, tiny, tmp_path):
    cache = tmp_path / "cache"
    done = cli("-m", "method=yaqa", "bits=3,4", *tiny, f"hydra.sweep.dir={tmp_path / 's'}", GPTQ_AWQ_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert len(list((cache / "curvatures").glob("[!.]*"))) == 1
    stored = [json.loads(path.read_text()) for path in (tmp_path / "s").glob("*/results.json")]
    assert {row["bits"] for row in stored} == {3, 4}
    assert {row["method"] for row in stored} == {"yaqa"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method=rtn"], "output_curvature: goes with GPTQ's sweep"),
        (["method=awq_gptq"], "awq changes the outputs"),
        (["method=gptq", "stream=true"], "gradients go through the whole model"),
        (["method=gptq", "+method.output_curvature.tile=0"], r"tile=0"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(cli, tiny, tmp_path, options, message):
    target = "+method.output_curvature._target_=gptq_awq.calibration.output_curvature.OutputCurvature"
    done = cli(*options, *tiny, target, f"out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_grid_that_fits_rows_together_is_refused():
    method = load_method("yaqa")[0]
    with pytest.raises(UserError, match=r"output_curvature: grid=nf4.*fits all rows together"):
        quantize_model(tiny_model("llama"), tokens(), method, grid=load_nf4(), settings=SMALL)


def load_nf4():
    from gptq_awq.grids.table import TableGrid

    return TableGrid(table="nf4", group_size=64, double_quant=True)
