"""Costs of linears that are rounded to one width only: what the others say of the proportions between widths."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokens

from gptq_awq.allocation import sensitivity
from gptq_awq.allocation.allocate import allocate
from gptq_awq.data.tokens import make_token_set
from gptq_awq.grids.allocated import AllocatedGrid
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import Settings
from gptq_awq.solvers.gptaq import GPTAQ
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.qronos import Qronos
from gptq_awq.solvers.rtn import RTN

SMALL = Settings(compute_dtype="float32", tokens_per_batch=64)
GRID = AllocatedGrid(budget_bits=4.5, choices=(2, 3, 4, 5), group_size=32, group_sizes=(16, 32))


def allocated(measured: int, monkeypatch, grid=GRID, solver=RTN(), cache=None):  # noqa: B008 (frozen)
    monkeypatch.setattr(sensitivity, "MEASURED", measured)
    tokens = make_token_set("tiny", tiny_tokens(4), None, "test")
    return allocate(tiny_model("llama"), tokens, Method("m", solver), grid, SMALL, model_sha256="w", cache=cache)


@pytest.mark.parametrize("measure", ["fisher", "error", "kl"])
def test_filled_in_costs_are_near_measured_ones_and_so_is_what_follows(monkeypatch, measure):
    grid = dataclasses.replace(GRID, sensitivity=measure)
    full, few = allocated(100, monkeypatch, grid), allocated(2, monkeypatch, grid)
    exact = {cost.name: cost.costs for cost in full.costs}
    filled = {cost.name: cost.costs for cost in few.costs}
    assert list(exact) == list(filled)
    ratios = np.array([np.divide(filled[name], exact[name]) for name in exact if min(exact[name]) > 0])
    measured = (abs(ratios - 1) < 1e-6).all(1)
    assert 2 <= measured.sum() < len(ratios)
    assert (abs(ratios[~measured] - 1) < 1e-6).sum(1).min() >= 1  # the width in the middle was measured
    assert abs(np.log(ratios)).mean() < 0.15
    widths = [grid.widths.index(few.chosen[name]) for name in exact]
    true = sum(exact[name][width] for name, width in zip(exact, widths, strict=True))
    assert true < 1.1 * full.predicted


def test_a_linear_that_costs_nothing_costs_nothing_at_any_width():
    model = tiny_model("llama")
    names = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    costs = (0.0,) * 8, (None, None, None, None, 0.0, None, None, None), (8.0, 7, 6, 5, 4, 3, 2, 1)
    measured = [sensitivity.Cost(name, "site", own) for name, own in zip(names, costs, strict=True)]
    found = sensitivity.completed(measured, model, GRID)
    assert found[1].costs == (0.0,) * 8
    assert found[2].costs == costs[2]


def test_weights_that_lie_on_the_grid_of_one_width_cost_what_they_do_at_others(monkeypatch):
    monkeypatch.setattr(sensitivity, "MEASURED", 1)
    model, draw = tiny_model("llama"), torch.Generator().manual_seed(0)
    for _, linear in sensitivity.find_blocks(model)[1].named_modules():
        if isinstance(linear, torch.nn.Linear):
            codes = torch.randint(16, linear.weight.shape, generator=draw)
            codes[:, ::16], codes[:, 1::16] = 0, 15
            linear.weight.data = (codes - 8) / 64.0
    grid = AllocatedGrid(budget_bits=4.75, choices=(2, 4, 5), group_size=32)
    found = allocate(model, make_token_set("tiny", tiny_tokens(4), None, "test"), Method("m", RTN()), grid, SMALL)
    assert all(cost.costs[1] == 0 and min(cost.costs[0], cost.costs[2]) > 0 for cost in found.costs)
    assert set(found.chosen.values()) == {grid.widths[1]}


def test_methods_that_differ_in_drift_and_refinement_share_sensitivities(monkeypatch, tmp_path):
    solvers = GPTQ(), GPTQ(refine=2), Qronos(), Qronos(refine=4), GPTAQ()
    found = [allocated(100, monkeypatch, solver=solver, cache=tmp_path) for solver in solvers]
    assert len(list((tmp_path / "sensitivities").glob("*.safetensors"))) == 1
    assert all(each.costs == found[0].costs for each in found)


def test_recipes_with_more_text_share_sensitivities_where_enough_tokens_are_given(monkeypatch, tmp_path):
    monkeypatch.setattr(sensitivity, "TOKENS", 128)
    given, model = tiny_tokens(4), tiny_model("llama")
    for more in (0, 3):
        tokens = make_token_set("tiny", torch.cat([given, tiny_tokens(more, seed=1)]), None, "test")
        grid = dataclasses.replace(GRID, windows=2)
        allocate(model, tokens, Method("m", GPTQ()), grid, SMALL, model_sha256="w", cache=tmp_path)
    assert len(list((tmp_path / "sensitivities").glob("*.safetensors"))) == 1
