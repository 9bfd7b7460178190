"""Laws of GPTQ, and agreement with the original code's outputs."""

import json
from dataclasses import dataclass

import pytest
import torch
from helpers.linear_problems import moments, problem
from helpers.paths import DATA
from safetensors.torch import load_file

from gptq_awq import quantize_weight
from gptq_awq.errors import UserError
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.scaled_float import ScaledFloatGrid
from gptq_awq.numerics.linalg import NotPositiveDefiniteError, inverse_cholesky, quadratic
from gptq_awq.solvers import gptq as gptq_module
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN


@pytest.mark.parametrize("case", range(11))
def test_gptq_reproduces_the_original_code(case):
    tensors = load_file(DATA / "gptq_reference.safetensors")
    settings = json.loads((DATA / "gptq_reference.json").read_text())[f"dequantized_{case}"]
    their_loss = settings.pop("loss")
    ours = quantize_weight(tensors["weight"], tensors["hessian"], method="gptq", **settings)
    theirs = tensors[f"dequantized_{case}"]
    assert ((ours.dequantize() - theirs).abs() < 1e-5).float().mean() >= 0.99
    H = tensors["hessian"].double()
    error, their_error = (quadratic((w - tensors["weight"]).double(), H) for w in (ours.dequantize(), theirs))
    assert error == pytest.approx(their_error, rel=1e-3)
    assert ours.loss == pytest.approx(their_loss, rel=1e-3)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32, 40])
def test_gptq_with_identity_hessian_is_rtn(group_size, sym):
    W, H = problem()
    ours = quantize_weight(W, torch.eye(len(H)), bits=3, group_size=group_size, sym=sym)
    nearest = quantize_weight(W, method="rtn", bits=3, group_size=group_size, sym=sym)
    assert torch.equal(ours.codes, nearest.codes)
    assert torch.equal(ours.dequantize(), nearest.dequantize())


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rtn_in_output_error(act_order, static_groups):
    W, H = problem()
    options = {"bits": 3, "group_size": 32}
    ours = quantize_weight(W, H, act_order=act_order, static_groups=static_groups, **options)
    nearest = quantize_weight(W, method="rtn", **options)
    assert quadratic(ours.dequantize() - W, H) < 0.7 * quadratic(nearest.dequantize() - W, H)


@pytest.mark.parametrize("options", [{"group_size": -1}, {"group_size": 32, "static_groups": True}])
def test_block_size_changes_nothing_but_rounding_errors(options):
    # In-turn groups are left out: the original code fits them to weights as of the last lazy update.
    W, H = problem()
    whole, blocked = (quantize_weight(W, H, bits=4, block_size=b, **options) for b in (96, 17))
    assert (whole.codes == blocked.codes).float().mean() > 0.995
    assert whole.loss == pytest.approx(blocked.loss, rel=1e-2)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("search", ["minmax", "hessian"])
def test_compiled_sweep_equals_the_plain_loop_bit_for_bit(monkeypatch, act_order, search):
    W, H = problem()
    grid, solver = IntGrid(3, 40, search=search), GPTQ(act_order=act_order, block_size=64)
    compiled = solver.solve(W, moments(H), grid).quantized
    monkeypatch.setattr(gptq_module, "_round_compiled", gptq_module._round_plain)
    plain = solver.solve(W, moments(H), grid).quantized
    assert torch.equal(compiled.codes, plain.codes)
    assert torch.equal(compiled.scales, plain.scales)
    assert compiled.loss == plain.loss


@dataclass(frozen=True)
class OneByOne(ScaledFloatGrid):
    """NVFP4 whose spans the sweep has to fit one by one."""

    @property
    def rows_independent(self):
        return False


@pytest.mark.parametrize("search", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize("act_order", [False, True])
def test_spans_that_are_fitted_at_once_are_what_they_are_one_by_one(search, act_order):
    weights, stats = [], []
    for seed in (0, 1):
        W, H = problem(seed=seed)
        weights.append(W[:, :80]), stats.append(moments(H[:80, :80].contiguous()))
    solver = GPTQ(act_order=act_order, block_size=48)
    grids = [kind("e2m1", 16, search=search, tensor_scale=2.0**-8) for kind in (ScaledFloatGrid, OneByOne)]
    at_once, one_by_one = (solver.solve_together(weights, stats, grid) for grid in grids)
    for a, b in zip(at_once, one_by_one, strict=True):
        assert torch.equal(a.quantized.codes, b.quantized.codes)
        assert torch.equal(a.quantized.scales, b.quantized.scales)


def test_loss_is_half_the_damped_output_error():
    W, H = problem()
    ours = quantize_weight(W, H, bits=3, group_size=32, damping=0.01)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H))
    assert ours.loss == pytest.approx(quadratic(ours.dequantize() - W, damped) / 2, rel=1e-3)


def test_rows_are_independent():
    W, H = problem()
    together = quantize_weight(W, H, bits=3, group_size=32)
    alone = quantize_weight(W[5:6], H, bits=3, group_size=32)
    assert torch.equal(together.codes[5:6], alone.codes)


def test_scaling_a_row_scales_its_result():
    W, H = problem()
    factor = 2.0 ** torch.randint(-3, 4, (len(W), 1)).float()
    plain, scaled = (quantize_weight(w, H, bits=3, group_size=32) for w in (W, W * factor))
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(plain.dequantize() * factor, scaled.dequantize())


def test_the_scale_of_the_hessian_does_not_matter():
    W, H = problem()
    assert torch.equal(quantize_weight(W, H, bits=3).codes, quantize_weight(W, 1024 * H, bits=3).codes)


def test_dead_columns_are_set_to_zero_and_disturb_nothing():
    W, H = problem()
    H[7], H[:, 7] = 0, 0
    ours = quantize_weight(W, H, bits=4, group_size=32)
    assert torch.equal(ours.codes[:, 7].float(), ours.zeros[:, 0])
    assert (ours.dequantize()[:, 7] == 0).all()
    W[:, 7] = 0
    without = quantize_weight(W, H, bits=4, group_size=32)
    assert torch.equal(ours.codes, without.codes)
    assert torch.equal(ours.dequantize(), without.dequantize())
    assert quadratic(ours.dequantize() - W, H) < 0.05 * quadratic(W, H)


def test_act_order_without_static_groups_stores_each_columns_group():
    W, H = problem()
    ours = quantize_weight(W, H, bits=4, group_size=32, act_order=True)
    order = torch.argsort(H.diagonal(), descending=True)
    assert torch.equal(ours.group_of_column[order], torch.arange(96) // 32)
    natural = quantize_weight(W, H, bits=4, group_size=32, act_order=True, static_groups=True)
    assert torch.equal(natural.group_of_column, torch.arange(96) // 32)
    assert ours.bits_per_weight > natural.bits_per_weight


def test_damping_is_raised_until_the_hessian_factors_and_this_is_recorded():
    W, _ = problem()
    x = torch.randn(4, 96)
    H = x.T @ x  # rank 4 of 96
    H -= 0.05 * H.diagonal().mean() * torch.eye(96)  # and indefinite
    solution = GPTQ(damping=0.01).solve(W, moments(H), IntGrid(4, 32))
    assert solution.damping == pytest.approx(0.1)
    assert "0.01 to 0.1" in solution.fallback
    assert solution.algorithm == "gptq"


def test_a_hopeless_hessian_fails_unless_a_fallback_is_declared():
    W, H = problem()
    grid = IntGrid(4, 32)
    with pytest.raises(NotPositiveDefiniteError):
        GPTQ().solve(W, moments(-H), grid)
    solution = GPTQ(fallback="rtn").solve(W, moments(-H), grid)
    assert solution.algorithm == "rtn"
    assert solution.fallback
    assert torch.equal(solution.quantized.codes, RTN().solve(W, None, grid).quantized.codes)


@pytest.mark.parametrize("width", [96, 193, 500], ids=["at once", "in halves", "in quarters"])
def test_inverse_cholesky_factors_the_damped_inverse(width):
    X = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(0)).double()
    H = X.T @ X / len(X)
    U, used = inverse_cholesky(H, 0.01)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H))
    assert used == 0.01
    assert torch.equal(U, U.triu())
    assert torch.allclose(U.T @ U, torch.linalg.inv(damped), rtol=1e-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "typo"}, "method=typo"),
        ({"bits": 9}, "bits=9"),
        ({"group_size": 0}, "group_size=0"),
        ({"damping": -1.0}, "damping=-1"),
        ({"block_size": 0}, "block_size=0"),
        ({"hessian": None}, "hessian is missing"),
        ({"hessian": torch.eye(3)}, "hessian has shape"),
        ({"hessian": torch.full((96, 96), torch.nan)}, "hessian has non-finite"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    W, H = problem()
    with pytest.raises(UserError, match=message):
        quantize_weight(**({"weight": W, "hessian": H} | change))
