"""Laws of the allocation of bits, and of the sensitivities that it goes by."""

import itertools
import json
import logging
import statistics

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokens

from gptq_awq import quantize_model
from gptq_awq.allocation import knapsack
from gptq_awq.allocation.allocate import FILE_NAME, allocate
from gptq_awq.allocation.knapsack import PROVEN, cheapest, combination
from gptq_awq.allocation.sensitivity import output_fisher
from gptq_awq.calibration.block_inputs import Settings
from gptq_awq.data.tokens import make_token_set
from gptq_awq.errors import UserError
from gptq_awq.grids.allocated import AllocatedGrid
from gptq_awq.quantization.footprint import Footprint
from gptq_awq.quantization.method import Method
from gptq_awq.solvers.gptaq import GPTAQ
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.qronos import Qronos
from gptq_awq.solvers.rtn import RTN

SMALL = Settings(compute_dtype="float32", tokens_per_batch=64)
METHOD = Method("gptq", GPTQ())
UNIFORM_3 = 3 + (16 + 3) / 32


def tokens(rows=4):
    return make_token_set("tiny", tiny_tokens(rows), None, "test")


def allocation(cache=None, method=METHOD, **options):
    options = {"budget_bits": UNIFORM_3, "group_size": 32} | options
    return allocate(tiny_model("llama"), tokens(), method, AllocatedGrid(**options), SMALL, cache=cache)


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_equals_brute_force(seed):
    draw = np.random.default_rng(seed)
    costs, sizes = draw.exponential(size=(5, 4)) ** 4, draw.integers(1, 50, (5, 4)) * 8
    missing = draw.random((5, 4)) < 0.3
    missing[range(5), draw.integers(0, 4, 5)] = False
    costs[missing] = np.inf
    budget = int(np.where(missing, 400, sizes).min(1).sum() + draw.integers(0, 600))
    options = [o for o in itertools.product(range(4), repeat=5) if not missing[range(5), o].any()]
    fitting = [o for o in options if sizes[range(5), o].sum() <= budget]
    least = min(costs[range(5), o].sum() for o in fitting)
    chosen = cheapest(costs, sizes, budget)
    assert not missing[range(5), chosen].any()
    assert sizes[range(5), chosen].sum() <= budget
    assert costs[range(5), chosen].sum() == pytest.approx(least, rel=1e-5)


def large_problem(seed=0, items=200, choices=12):
    """Costs and sizes of linears of many shapes that lose a factor of four per bit, and a budget in between."""
    draw = np.random.default_rng(seed)
    bits, columns = np.linspace(2, 8, choices), draw.integers(1, 30, size=(items, 1)) * 4096
    costs = draw.gamma(0.3, size=(items, 1)) * 4.0**-bits * draw.uniform(0.7, 1.3, size=(items, choices))
    sizes = (columns * bits).astype(np.int64)
    return costs, sizes, int(sizes.sum(0)[choices // 3] * 1.003)


@pytest.mark.parametrize("seconds", [1e-9, 0.02, 0.1])
def test_a_knapsack_that_runs_out_of_time_stays_within_the_gap_that_it_states(monkeypatch, seconds):
    costs, sizes, budget = large_problem()
    items = range(len(costs))
    best = combination(costs, sizes, budget)
    assert best.gap <= PROVEN
    least = costs[items, best.chosen].sum()
    monkeypatch.setattr(knapsack, "SECONDS", seconds)
    found = combination(costs, sizes, budget)
    cost = costs[items, found.chosen].sum()
    assert sizes[items, found.chosen].sum() <= budget
    assert least * (1 - PROVEN) <= cost <= 1.001 * least
    assert cost * (1 - found.gap) <= least * (1 + 1e-9)
    assert found.gap < 0.01


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_costs_that_no_one_chooses_change_no_choice(scale):
    """HiGHS' tolerances are absolute: beside one cost of 1e9, all combinations look alike to it."""
    costs, sizes, budget = large_problem(items=60)
    items = range(len(costs))
    costs[:, 0] = np.inf
    missing = combination(costs, sizes, budget)
    costs[:, 0] = 1e9
    huge = combination(costs * scale, sizes, budget)
    assert max(missing.gap, huge.gap) <= PROVEN
    assert costs[items, huge.chosen].sum() == pytest.approx(costs[items, missing.chosen].sum(), rel=1e-5)


def test_a_cost_that_is_no_number_is_refused():
    for wrong in (np.nan, -1.0):
        with pytest.raises(ValueError, match="cost"):
            cheapest(np.array([[wrong, 1.0]]), np.array([[1, 2]]), 2)


def test_an_allocation_without_proof_says_so(monkeypatch, caplog, tmp_path):
    options = {"sensitivity": "error", "budget_bits": 3.9, "choices": [2, 3, 4, 5, 6, 7, 8]}
    found = allocation(tmp_path, **options)
    assert found.summary()["gap"] <= PROVEN
    assert found.summary()["optimal"] is True
    monkeypatch.setattr(knapsack, "_highs", lambda *_args: knapsack._Found(None, -np.inf))
    with caplog.at_level(logging.WARNING):
        hurried = allocation(tmp_path, **options)
    assert json.loads(json.dumps(hurried.summary()))["gap"] > PROVEN
    assert hurried.summary()["optimal"] is False
    assert "manifest.allocation.gap" in caplog.text
    assert hurried.predicted * (1 - hurried.gap) <= found.predicted * (1 + 1e-9)


@pytest.mark.parametrize("sensitivity", ["fisher", "error", "kl"])
def test_a_budget_of_uniform_bits_never_predicts_more_than_uniform(sensitivity):
    found = allocation(sensitivity=sensitivity)
    uniform = sum(cost.costs[found.grid.choices.index(3)] for cost in found.costs)
    assert found.predicted <= uniform * (1 + 1e-5)


def test_more_budget_never_predicts_more_and_is_never_exceeded(tmp_path):
    found = [allocation(tmp_path, budget_bits=b, method=Method("rtn", RTN())) for b in (2.6, 3.0, 3.5, 4.5, 9.0)]
    assert all(a.predicted >= b.predicted for a, b in itertools.pairwise(found))
    assert all(a.bits_per_weight <= a.grid.budget_bits for a in found)
    assert {bits for bits, _ in found[-1].chosen.values()} == {8}
    assert len(list((tmp_path / "sensitivities").glob("*.safetensors"))) == 1  # whatever the budget


@pytest.mark.parametrize("solver", [GPTQ(), GPTQ(act_order=True)])
@pytest.mark.parametrize("group_sizes", [None, [16, 64]])
def test_what_is_stored_is_what_was_counted(solver, group_sizes):
    method = Method("gptq", solver)
    found = allocation(method=method, budget_bits=6.0, group_sizes=group_sizes)
    done = quantize_model(tiny_model("llama"), tokens(), method, grid=found.grid, settings=SMALL)
    footprint = Footprint()
    footprint.add(done.weights)
    assert footprint.bits_per_weight == pytest.approx(found.bits_per_weight)
    assert {name: (weight.grid.bits, weight.grid.group_size) for name, weight in done.weights.items()} == found.chosen


def test_a_choice_of_group_sizes_never_predicts_more_than_one_of_them():
    """Bits go where a finer scale is the cheaper way to spend them."""
    one, both = (allocation(budget_bits=4.3, group_sizes=sizes) for sizes in (None, [32, 16]))
    assert both.predicted <= one.predicted * (1 + 1e-5)
    assert {size for _, size in both.chosen.values()} == {16, 32}
    assert both.grid.group_size == statistics.mode(size for _, size in both.chosen.values())
    assert set(both.summary()["linears_by_bits"]) == {f"{b}g{g}" for b in both.grid.choices for g in (32, 16)}


def test_group_sizes_go_to_linears_whose_columns_they_divide():
    """64 and 160 columns."""
    found = allocation(budget_bits=5.0, group_sizes=[16, 64, 80])
    for cost in found.costs:
        columns = 160 if cost.name.endswith("down_proj") else 64
        possible = [size for (_, size), c in zip(found.grid.widths, cost.costs, strict=True) if c is not None]
        assert set(possible) == ({16, 80} if columns == 160 else {16, 64})
        assert columns % found.chosen[cost.name][1] == 0
    with pytest.raises(UserError, match="group_sizes"):
        allocation(budget_bits=5.0, group_sizes=[64, 80], tie="model")


@pytest.mark.parametrize("solver", [GPTQ(), GPTQ(act_order=True)])
def test_a_budget_of_uniform_bits_is_their_size(solver):
    found = allocation(budget_bits=None, budget_uniform=3, group_sizes=[16, 32, 64, 160], method=Method("", solver))
    uniform = allocation(budget_bits=99, choices=[3], method=Method("", solver))
    assert 0.95 * uniform.bits_per_weight < found.bits_per_weight <= uniform.bits_per_weight
    assert (found.grid.bits, found.grid.group_size) == (3, 32)


@pytest.mark.parametrize("solver", [GPTAQ(act_order=True), Qronos(act_order=True)])
def test_solvers_that_make_up_for_drift_have_the_sensitivities_of_gptq(solver):
    """They are measured on full precision's inputs, where nothing has drifted."""
    own, gptq = (allocation(method=Method("", s)) for s in (solver, GPTQ(act_order=True)))
    for one, other in zip(own.costs, gptq.costs, strict=True):
        assert one.costs == pytest.approx(other.costs, rel=1e-3)


def test_bytes_are_bits():
    bits = allocation(budget_bits=4.0)
    weights = sum(m.weight.numel() for m in tiny_model("llama").model.layers.modules() if hasattr(m, "in_features"))
    assert allocation(budget_bits=None, budget_bytes=weights // 2).chosen == bits.chosen


def test_tied_sites_get_the_same_bits():
    found = allocation(tie="site")
    for q in (name for name in found.chosen if name.endswith("q_proj")):
        assert len({found.chosen[q.replace("q_proj", f"{x}_proj")] for x in "qkv"}) == 1


def test_a_tied_model_is_uniform_and_shares_the_sensitivities(tmp_path):
    for budget, bits in ((UNIFORM_3, 3), (UNIFORM_3 + 0.9, 3), (20.0, 8)):
        found = allocation(tmp_path, tie="model", budget_bits=budget)
        assert set(found.chosen.values()) == {(bits, 32)}
    allocation(tmp_path)
    assert len(list((tmp_path / "sensitivities").glob("*.safetensors"))) == 1


def test_the_model_is_what_it_was():
    model = tiny_model("llama")
    for sensitivity in ("kl", "fisher"):
        allocate(model, tokens(), METHOD, AllocatedGrid(group_size=32, sensitivity=sensitivity), SMALL)
    for key, value in tiny_model("llama").state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fisher_predicts_the_kl_of_small_changes():
    """Of the last block's down projection, whose error meets nothing but a norm and the head.

    The diagonal leaves out products of different outputs' errors: of one random change they make up 2.5% of the KL
    (standard deviation), either way; of the sum over 8 changes 0.9%. 4% is four of these.
    """
    model, data = tiny_model("llama"), tokens(16)
    name = "model.layers.1.mlp.down_proj"
    fisher = output_fisher(model, data)[name]
    linear = model.get_submodule(name)
    log_p = model(data.ids).logits.log_softmax(-1)
    inputs = []
    with torch.no_grad():
        hook = linear.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].flatten(0, 1)))
        model(data.ids)
        hook.remove()
        weight, predicted, kl = linear.weight.clone(), 0.0, 0.0
        for seed in range(8):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            delta = 0.02 * weight.std() * noise
            predicted += 0.5 * float((fisher * (inputs[0] @ delta.T).square().mean(0)).sum())
            linear.weight.copy_(weight + delta)
            log_q = model(data.ids).logits.log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert predicted == pytest.approx(kl, rel=0.04)


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            {"budget_bits": None},
            {"budget_bytes": 5},
            {"budget_uniform": 3},
            {"choices": []},
            {"choices": [1]},
            {"group_sizes": []},
        ),
        *({"group_sizes": [0]}, {"tie": "q"}, {"windows": 0}, {"budget_bits": None, "budget_uniform": 1}),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(wrong):
    with pytest.raises(UserError):
        AllocatedGrid(**wrong)


def test_a_budget_that_nothing_fits_is_refused():
    with pytest.raises(UserError, match="budget_bits"):
        allocation(budget_bits=2.0)


def test_a_mixed_run_is_as_large_as_uniform_bits(cli, tiny_folder, tiny_text, tmp_path):
    options = ["model=local", f"model.path={tiny_folder}", "data=local", f"data.path={tiny_text}", "data.samples=4"]
    options += ["data.seqlen=32", "eval=none", "method=fast", "bits=4", "group_size=32"]
    mixed = ["grid=mixed", "grid.group_sizes=[16,32,64]", "export.formats=[compressed_tensors]"]
    rows = []
    for number, grid in enumerate((["grid=int"], mixed)):
        done = cli(*options, *grid, f"out={tmp_path / str(number)}")
        assert done.returncode == 0, done.stderr
        rows.append(json.loads((tmp_path / str(number) / "results.json").read_text()))
    assert rows[1]["bits_per_weight"] <= rows[0]["bits_per_weight"]
    assert [row["bits"] for row in rows] == [4, 4]
    assert len(rows[1]["manifest"]["allocation"]["linears_by_bits"]) > 1


def test_a_run_allocates_and_says_so(cli, tiny_folder, tiny_text, tmp_path):
    options = ["model=local", f"model.path={tiny_folder}", "data=local", f"data.path={tiny_text}", "data.samples=4"]
    options += ["data.seqlen=32", "eval=none", "method=gptq", "group_size=16", "grid=allocated", "grid.budget_bits=5"]
    done = cli(*options, f"out={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "run" / "results.json").read_text())
    told = json.loads((tmp_path / "run" / FILE_NAME).read_text())
    assert row["bits_per_weight"] == pytest.approx(told["bits_per_weight"])
    assert row["bits_per_weight"] <= 5
    assert row["manifest"]["allocation"]["predicted"] == told["predicted"]
    assert sum(one["predicted"] for one in told["linears"].values()) == pytest.approx(told["predicted"])
