"""Laws of floating-point grids, held against torch's own 8-bit floats, compared with gguf's and written-out tables."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokens

from gptq_awq.api import quantize_model
from gptq_awq.calibration.moments import Moments
from gptq_awq.errors import UserError
from gptq_awq.grids.arithmetic import Arithmetic
from gptq_awq.grids.base import nearest
from gptq_awq.grids.dynamic import DynamicFloat4
from gptq_awq.grids.floats import FLOAT_TYPES
from gptq_awq.grids.scaled_float import ScaledFloatGrid
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN

NVFP4, MXFP4 = ScaledFloatGrid(), ScaledFloatGrid(group_size=32, scale="e8m0")
FP8 = ScaledFloatGrid("e4m3", -1, 1, "float32")
ONE = torch.ones(1), torch.zeros(1)
E2M1 = [sign * x for sign in (1, -1) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]


def weight(rows=64, columns=128, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return 0.05 * torch.randn(rows, columns, generator=draw) * torch.logspace(-1, 1, rows)[:, None]


def moments(columns=128):
    x = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 3, columns)
    return Moments(x.T @ x / len(x), x.abs().mean(0), len(x))


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bits_are_torchs(name, dtype):
    kind = FLOAT_TYPES[name]
    arithmetic = Arithmetic.of_float(kind)
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(dtype).float()
    finite = torch.isfinite(theirs)
    assert torch.equal(arithmetic.decode(codes.float(), ONE)[finite], theirs[finite])
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20000, generator=draw) * torch.exp(4 * torch.randn(20000, generator=draw))
    near = x.clamp(-kind.largest, kind.largest).to(dtype)
    own = arithmetic.encode(x, ONE)
    assert torch.equal(arithmetic.decode(own, ONE), near.float())
    assert torch.equal(own.to(torch.uint8)[near.float() != 0], near.view(torch.uint8)[near.float() != 0])


def test_four_bits_are_the_table_of_the_standard():
    arithmetic = Arithmetic.of_float(FLOAT_TYPES["e2m1"])
    assert arithmetic.decode(torch.arange(16.0), ONE).tolist() == E2M1
    assert arithmetic.encode(torch.tensor([0.25, 0.75, 1.25, 2.5, 3.5, 5.0, 7.0, -0.1]), ONE).tolist() == [
        0, 2, 2, 4, 6, 6, 7, 0,
    ]  # fmt: skip


def test_mxfp4_by_the_largest_weight_is_ggufs():
    w = weight()
    packed = gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType.MXFP4)
    theirs = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.MXFP4))
    ours = RTN().solve(w, None, MXFP4).quantized.dequantize()
    # Halves between two numbers go to the even code here, and downwards there.
    apart = ours != theirs
    assert apart.float().mean() < 0.01
    assert torch.allclose((ours - w).abs()[apart], (theirs - w).abs()[apart])


@pytest.mark.parametrize("grid", [NVFP4, MXFP4, FP8, replace(FP8, rows=128, group_size=128)])
def test_searches_lower_what_they_minimise(grid):
    w, own = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)), moments()

    def errors(search):
        delta = RTN().solve(w, own, replace(grid, search=search)).quantized.dequantize() - w
        return float(delta.abs().pow(2.4).sum()), float(((delta @ own.hessian) * delta).sum())

    plain = errors("minmax")
    assert errors("mse")[0] < plain[0]
    assert errors("hessian")[1] < plain[1]


def test_four_over_six_lies_between_the_largest_and_a_search():
    w = weight()

    def error(search):
        return float((RTN().solve(w, None, replace(NVFP4, search=search)).quantized.dequantize() - w).square().sum())

    assert error("mse") < error("four_over_six") < error("minmax")


def test_scales_are_numbers_of_their_type():
    w = weight()
    weight4 = GPTQ().solve(w, moments(), replace(NVFP4, search="hessian")).quantized
    blocks = weight4.scales / weight4.grid.tensor_scale  # pyright: ignore
    assert torch.equal(blocks.to(torch.float8_e4m3fn).float(), blocks)
    mantissa, _ = torch.frexp(RTN().solve(w, None, MXFP4).quantized.scales)
    assert (mantissa == 0.5).all()


def test_rows_that_share_a_scale_have_one():
    w = weight(rows=300, columns=256)
    block = RTN().solve(w, None, replace(FP8, rows=128, group_size=128)).quantized.scales
    assert block.shape == (300, 2)
    assert [len(block[a:b].unique(dim=0)) for a, b in ((0, 128), (128, 256), (256, 300))] == [1, 1, 1]
    assert len(RTN().solve(w, None, replace(FP8, rows=-1)).quantized.scales.unique()) == 1


def test_linears_of_one_input_share_their_tensors_scale():
    for method, tokens in (("rtn", None), ("gptq", tiny_tokens())):
        weights = quantize_model(tiny_model("llama"), tokens, method, grid=NVFP4).weights
        scales = {name: each.grid.tensor_scale for name, each in weights.items()}  # pyright: ignore
        for layer in ("model.layers.0", "model.layers.1"):
            assert len({scales[f"{layer}.self_attn.{name}_proj"] for name in "qkv"}) == 1
            assert scales[f"{layer}.mlp.gate_proj"] == scales[f"{layer}.mlp.up_proj"]


@pytest.mark.parametrize("grid", [NVFP4, MXFP4])
def test_gptq_rounds_onto_floats_better_than_to_nearest(grid):
    w, own = weight(), moments()

    def error(solver):
        delta = solver.solve(w, own, grid).quantized.dequantize() - w
        return float(((delta @ own.hessian) * delta).sum())

    assert error(GPTQ(act_order=True, static_groups=True)) < 0.95 * error(RTN())


def test_a_weight_of_zeros_stays_zero():
    for grid in (NVFP4, MXFP4, FP8):
        assert (nearest(grid, torch.zeros(4, 64)) == 0).all()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"search": "four_over_six", "element": "e4m3"}, "chooses between FP4's"),
        ({"search": "four_over_six", "scale": "e8m0"}, "powers of two"),
        ({"rows": 128}, "scales of several rows are float32"),
    ],
)
def test_combinations_that_no_format_has_are_refused(options, line):
    with pytest.raises(UserError, match=line):
        ScaledFloatGrid(**options)


def test_a_width_that_groups_dont_divide_is_refused_by_name():
    with pytest.raises(UserError, match=r"layer has 40 columns, not a multiple of 16"):
        NVFP4.check_columns(40, "layer")


@pytest.mark.parametrize(("scale", "kind"), [("e4m3", NVFP4), ("e8m0", MXFP4)])
def test_activations_are_rounded_as_weights_are(scale, kind):
    x = weight(rows=6, columns=96)
    rows = [nearest(kind, row[None]) for row in x]  # a token is a tensor of its own
    assert torch.equal(DynamicFloat4(scale).rounded(x), torch.cat(rows))
    assert np.isfinite(DynamicFloat4(scale).rounded(torch.zeros(2, 96)).numpy()).all()
    with pytest.raises(ValueError, match="does not divide 40 channels"):
        DynamicFloat4(scale).rounded(torch.ones(2, 40))
