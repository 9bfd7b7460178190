"""Laws of scales that the dtype they are stored in cannot hold: the ledger says so, and of no others."""

import logging

import pytest
import torch
from helpers.quantization_runs import SMALL, tokens
from helpers.tiny_models import tiny_model

from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.kquant import TYPES, KGrid
from gptq_awq.grids.scale_range import scales_out_of_range
from gptq_awq.grids.signed import SignedGrid
from gptq_awq.grids.table import TableGrid
from gptq_awq.grids.ternary import TernaryGrid
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import quantize
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN

HALF = [
    *(IntGrid(bits, 32, sym, scale_dtype="float16") for bits in (2, 4, 8) for sym in (False, True)),
    *(AffineGrid(4, 32), AffineGrid(8, 64), SignedGrid(4, 32), SignedGrid(8, 32), TernaryGrid(256)),
    *(TableGrid("iq4_nl", 32), *(KGrid(kind) for kind in TYPES)),
]
WIDE = [IntGrid(8, 32, scale_dtype="float32"), IntGrid(8, 32, scale_dtype="bfloat16"), TableGrid("nf4", 64)]


def weight(scale, rows=4, columns=512):
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def unheld(grid, w, dead=None):
    """Share of the scales that are out of range, and the relative error of rounding to nearest."""
    quantized = RTN().solve(w, None, grid).quantized
    count = quantized.store.get("d", quantized.scales).numel()
    error = (quantized.dequantize() - w).square().sum() / w.square().sum().clamp(min=1e-45)
    return scales_out_of_range(quantized, w, dead) / count, float(error)


@pytest.mark.parametrize("grid", HALF, ids=lambda g: f"{g.label}-{g.bits}-{g.group_size}")
def test_an_error_that_float16_scales_add_is_never_silent(grid):
    usual = unheld(grid, weight(0.02))[1]
    for power in range(-12, 13):
        share, error = unheld(grid, weight(10.0**power))
        assert share == 1 or error < 1.2 * usual + 1e-5, power
    assert unheld(grid, weight(1e-12))[0] == unheld(grid, weight(1e12))[0] == 1


@pytest.mark.parametrize("grid", [*HALF, *WIDE], ids=lambda g: f"{g.label}-{g.bits}-{g.group_size}")
def test_weights_of_usual_size_and_zeros_need_no_note(grid):
    for scale in (0.01, 1.0, 30.0):
        assert unheld(grid, weight(scale))[0] == 0
    assert unheld(grid, torch.zeros(4, 512))[0] == 0
    half = weight(0.02)
    half[:, :256] = 0
    assert unheld(grid, half)[0] == 0


@pytest.mark.parametrize("grid", WIDE, ids=lambda g: f"{g.label}-{g.bits}-{g.group_size}")
def test_dtypes_with_wide_exponents_hold_what_float16_does_not(grid):
    usual = unheld(grid, weight(0.02))[1]
    for scale in (1e-9, 1e9):
        share, error = unheld(grid, weight(scale))
        assert share == 0
        assert error == pytest.approx(usual, rel=0.1)


def test_only_the_groups_in_question_are_counted():
    w = weight(0.02)
    w[1, 32:64] *= 1e-9
    w[2, 64:96] *= 1e9
    assert scales_out_of_range(RTN().solve(w, None, HALF[2]).quantized, w) == 2
    constant = torch.full((1, 32), 0.1)  # above a minimum, a scale of 0 is right
    for value, count in ((constant, 0), (constant * 1e-9, 1), (constant * 0, 0)):
        assert scales_out_of_range(RTN().solve(value, None, AffineGrid(4, 32)).quantized, value) == count


def test_groups_whose_inputs_are_always_zero_need_no_scale():
    w, dead = weight(0.02, columns=64), torch.arange(64) < 32
    w[:, :32] *= 1e-9
    zeroed = w.masked_fill(dead, 0)
    quantized = RTN().solve(zeroed, None, SignedGrid(4, 32)).quantized
    assert scales_out_of_range(quantized, w) == 4
    assert scales_out_of_range(quantized, w, dead) == 0


@pytest.mark.parametrize("solver", [RTN(), GPTQ()], ids=["rtn", "gptq"])
def test_a_model_whose_scales_are_clamped_says_so_in_its_ledger(solver, caplog):
    """A power moved from the up to the down projection changes no output in full precision."""

    def ledger(scale_dtype):
        model = tiny_model("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.up_proj.weight *= 1e-9
                layer.mlp.down_proj.weight *= 1e9
        grid = IntGrid(8, 32, scale_dtype=scale_dtype)
        blocks = quantize(model, tokens(), Method("m", solver), grid, SMALL)
        return {row["name"]: row for block in blocks for row in block.rows}

    with caplog.at_level(logging.WARNING):
        half = ledger("float16")
    for name, row in half.items():
        # GPTQ sees that up's outputs are all zero now, and leaves nothing of down to scale.
        moved = "up_proj" in name or ("down_proj" in name and solver.name == "rtn")
        assert (row["scales_out_of_range"] > 0) == moved, name
        assert ("scales" in row and "grid.scale_dtype=float32" in row["scales"]) == moved
        assert (name in caplog.text) == moved
        assert moved or "down_proj" in name or row["weight_error"] < 0.005
    for row in ledger("float32").values():
        assert row["scales_out_of_range"] == 0
        assert row["weight_error"] < 0.005
