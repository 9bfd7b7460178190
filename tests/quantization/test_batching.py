"""Solving several linears together gives what solving them one by one gives."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.linear_problems import moments, problem
from helpers.quantization_runs import GRID, SMALL, run
from helpers.tiny_models import tiny_model, tiny_tokens

from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.kquant import KGrid
from gptq_awq.grids.table import TableGrid
from gptq_awq.models.blocks import BlockCalls, find_blocks
from gptq_awq.models.linear import Site
from gptq_awq.models.topology import observe_sites
from gptq_awq.numerics.distributed import ONE, Ranks
from gptq_awq.numerics.linalg import inverse_cholesky, inverse_choleskys
from gptq_awq.quantization import batching as together
from gptq_awq.quantization import block
from gptq_awq.quantization.batching import RowSlice, batches, shared
from gptq_awq.quantization.method import Method
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN
from gptq_awq.transforms.awq import AWQ

ORDERS = [(False, False), (True, False), (True, True)]
GRIDS = [
    IntGrid(3, 32),
    IntGrid(4, 40, search="hessian"),
    IntGrid(4, -1, search="mse"),
    AffineGrid(3, 32),
    TableGrid("nf4", 32, search="hessian"),
    KGrid("q4_k", search="hessian"),
]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.quantized.sha256() == b.quantized.sha256()
        assert a.quantized.loss == pytest.approx(b.quantized.loss, rel=1e-6)
        assert (a.algorithm, a.damping, a.fallback) == (b.algorithm, b.damping, b.fallback)


def inputs(count, columns):
    """Weights of two linears for each input, which has a column that is dead."""
    weights, stats = [], []
    for seed in range(count):
        W, H = problem(24, columns, seed)
        H[seed], H[:, seed] = 0, 0
        weights += [W[:10], W[10:]]
        stats += [moments(H)] * 2
    return weights, stats


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("act_order", "static_groups"), ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.label)
def test_weights_together_land_where_they_land_alone(grid, act_order, static_groups, count):
    weights, stats = inputs(count, 512 if isinstance(grid, KGrid) else 96)
    solver = GPTQ(act_order=act_order, static_groups=static_groups, block_size=64)
    ours = solver.solve_together(weights, stats, grid)
    assert_equal(ours, [solver.solve(*each, grid) for each in zip(weights, map(replace, stats), strict=True)])


def test_one_input_that_needs_more_damping_or_wont_factor_leaves_the_others_alone():
    weights, stats = inputs(4, 96)
    H = stats[2].hessian - 0.05 * stats[2].hessian.diagonal().mean() * torch.eye(96)
    stats[2:4], stats[4:6] = [moments(H)] * 2, [moments(-stats[4].hessian)] * 2
    solver, grid = GPTQ(fallback="rtn"), IntGrid(3, 32)
    ours = solver.solve_together(weights, stats, grid)
    assert_equal(ours, [solver.solve(*each, grid) for each in zip(weights, stats, strict=True)])
    assert [solution.algorithm for solution in ours[::2]] == ["gptq", "gptq", "rtn", "gptq"]
    assert [solution.damping for solution in ours[::2]] == [0.01, pytest.approx(0.1), None, 0.01]


@pytest.mark.parametrize("columns", [96, 900])
def test_factors_found_together_are_those_found_alone(columns):
    hessians = [problem(1, columns, seed)[1] for seed in range(3)]
    orders = [None, torch.randperm(columns), torch.arange(columns).flip(0)]
    hessians[2] = -hessians[2]
    *good, bad = inverse_choleskys(hessians, 0.01, orders)
    for ours, hessian, order in zip(good, hessians, orders, strict=False):
        assert ours is not None
        assert torch.allclose(ours, inverse_cholesky(hessian, 0.01, order)[0], rtol=1e-4, atol=1e-5)
    assert bad is None


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
@pytest.mark.parametrize("error_propagation", [False, True])
def test_a_model_whose_linears_are_solved_together_is_that_of_one_by_one(monkeypatch, name, error_propagation):
    method = Method("gptq", GPTQ(act_order=True, static_groups=True), error_propagation=error_propagation)
    sizes = []

    def noted(pieces):
        sizes.extend(map(len, batches(pieces)))
        return batches(pieces)

    monkeypatch.setattr(block, "batches", noted)
    ours = run(name, method, settings=SMALL)
    assert max(sizes) >= (8 if name != "llama" and not error_propagation else 2)
    monkeypatch.setattr(block, "batches", lambda pieces: [[piece] for piece in pieces])
    theirs = run(name, method, settings=SMALL)
    assert {k: w.sha256() for k, w in ours.weights.items()} == {k: w.sha256() for k, w in theirs.weights.items()}
    for a, b in zip(ours.ledger, theirs.ledger, strict=True):
        assert a["error_after"] == pytest.approx(b["error_after"], rel=1e-6)
    assert tiny_model(name).dtype == ours.model.dtype


def test_awqs_scales_are_those_of_one_site_after_the_other():
    model = tiny_model("llama")
    _, blocks = find_blocks(model)
    hidden, calls = BlockCalls(model, blocks).record(tiny_tokens())
    sites = observe_sites(blocks[0], hidden, calls[0], absorbers=True)
    stats = [moments(problem(4, site.width, seed)[1]) for seed, site in enumerate(sites)]
    grids, awq, other = {name: GRID for site in sites for name in site.linears}, AWQ(), copy.deepcopy(blocks[0])
    ours = awq.apply(blocks[0], sites, stats, grids, lambda _name: [])
    for site, own, scaling in zip(sites, stats, ours, strict=True):
        (theirs,) = awq.apply(other, [site], [own], grids, lambda _name: [])
        assert theirs.details == scaling.details
        if theirs.scales is not None and scaling.scales is not None:
            assert torch.equal(theirs.scales, scaling.scales)
    assert sum(scaling.scales is not None for scaling in ours) > 2
    for a, b in zip(blocks[0].parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def pieces(experts=3, grid=GRID, solver=None):
    """A site of every token, and one of each expert."""
    made, solver = [], solver or GPTQ()
    for expert in [None, *range(experts)]:
        stats = moments(torch.eye(64))
        site = Site((f"{expert}.gate", f"{expert}.up"), 64, expert=expert)
        made += [RowSlice(name, site, stats, solver, grid, 64, (0, 25)) for name in site.linears]
    return made


@pytest.mark.parametrize("grid", [GRID, TableGrid("nf4", 32, double_quant=True)])
@pytest.mark.parametrize("solver", [GPTQ(), RTN()])
def test_every_row_is_some_ranks_and_only_one_ranks(grid, solver):
    for size in (1, 2, 3):
        found = [piece for rank in range(size) for piece in shared(pieces(grid=grid, solver=solver), Ranks(rank, size))]
        rows = sorted((piece.name, row) for piece in found for row in range(*piece.rows))
        assert rows == sorted((piece.name, row) for piece in pieces() for row in range(25))


def test_ranks_share_rows_of_what_all_tokens_pass_and_whole_experts():
    first, second = (shared(pieces(2), Ranks(rank, 2)) for rank in range(2))
    assert [(piece.name, piece.rows) for piece in first if piece.site.expert is None] == [("None.gate", (0, 25))]
    assert [(piece.name, piece.rows) for piece in second if piece.site.expert is None] == [("None.up", (0, 25))]
    assert {piece.site.expert for piece in first} == {None, 0}
    assert {piece.site.expert for piece in second} == {None, 1}
    (alone,) = shared(pieces()[:1], Ranks(1, 2))
    assert alone.rows == (12, 25)


def test_linears_are_solved_together_as_far_as_memory_is_given(monkeypatch):
    assert [len(batch) for batch in batches(shared(pieces(), ONE))] == [8]
    monkeypatch.setattr(together, "BATCH_BYTES", 2 * 4 * 64 * (50 + 64))
    assert [len(batch) for batch in batches(shared(pieces(), ONE))] == [4, 4]
    monkeypatch.setattr(together, "STACK_BYTES", 0)  # but as much as H: 64 rows
    wide = [replace(piece, rows=(0, 40)) for piece in pieces(0)]
    assert [len(batch) for batch in batches(wide)] == [1, 1]
