"""Weights on integer grids, and folders of their packed tensors, for the tests of export formats."""

import json

import torch
from safetensors.torch import save_file

from gptq_awq.calibration.moments import Moments
from gptq_awq.export.base import LinearSpec, Source
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.grids.integer import IntGrid
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN

ORDERS = {
    "natural": RTN(),
    "act_order": GPTQ(act_order=True),
    "static_groups": GPTQ(act_order=True, static_groups=True),
}


def int_grid(bits=4, group_size=32, sym=False, dtype="float16", min_zero=0) -> IntGrid:
    return IntGrid(bits, group_size, sym, scale_dtype=dtype, min_zero=min_zero)


def quantized(grid: Grid, order="natural", rows=32, columns=96, seed=0) -> QuantizedWeight:
    """A random weight with outliers, whose codes and zeros reach both ends of their range."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw) * torch.logspace(-3, 1, rows)[:, None]
    weight[1], weight[2] = weight[1].abs(), -weight[2].abs()
    x = torch.randn(4 * columns, columns, generator=draw) * torch.rand(columns, generator=draw)
    moments = Moments(x.T @ x / len(x), x.abs().mean(0), len(x))
    return ORDERS[order].solve(weight, moments, grid).quantized


def from_codes(codes, grid: IntGrid, scale=1.0, zero=None) -> QuantizedWeight:
    """Codes given by hand, one group per row, scale 1 and the middle as zero unless said otherwise."""
    codes = torch.tensor(codes, dtype=torch.uint8)
    zeros = torch.tensor(zero) if zero is not None else torch.full((len(codes),), 2.0 ** (grid.bits - 1))
    scales = torch.full((len(codes), 1), scale)
    return QuantizedWeight(codes, scales, zeros.float()[:, None], torch.zeros(codes.shape[1], dtype=torch.int64), grid)


def save_packed(folder, tensors, config) -> None:
    """One linear, "lin", as a checkpoint's folder holds it."""
    save_file({f"lin.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))


def specs(grid, natural_order=True, /, **shapes) -> list[LinearSpec]:
    """Linears as formats check them: name=(rows, columns)."""
    return [LinearSpec(name, *shape, grid, natural_order) for name, shape in (shapes or {"lin": (64, 64)}).items()]


class NoTokenizer:
    """Stands for a tokenizer that has nothing to save."""

    def save_pretrained(self, folder):
        pass


def tiny_source(method="rtn", **options) -> Source:
    """A tiny random Llama, quantized: 64 and 160 wide."""
    from gptq_awq.api import quantize_model
    from helpers.tiny_models import tiny_model, tiny_tokens

    model = tiny_model("llama")
    weights = quantize_model(model, tiny_tokens(), method, grid=int_grid(**options)).weights
    return Source(model, NoTokenizer(), "tiny", weights)


def assert_same(decoded, weight: QuantizedWeight) -> None:
    """Codes equal, and weights bit for bit."""
    assert torch.equal(decoded.codes, weight.codes)
    assert torch.equal(decoded.weight, weight.dequantize())


def rounded_source(model, grid) -> Source:
    """A model whose weights are rounded to the nearest on any grid, in place."""
    from gptq_awq.api import quantize_model

    return Source(model, NoTokenizer(), "tiny", quantize_model(model, method="rtn", grid=grid).weights)


def source_specs(source) -> list[LinearSpec]:
    """A source's linears as formats check them."""
    return [LinearSpec(name, *w.codes.shape, w.grid, w.natural_order) for name, w in source.weights.items()]


def assert_decodes(format_, source, folder) -> None:
    """A checkpoint's codes and weights are those in memory, and no layer is missing."""
    format_.check(source_specs(source), source.model.config)
    format_.write(source, folder)
    decoded = {each.name: each for each in format_.decode(folder)}
    assert decoded.keys() == source.weights.keys()
    for name, weight in source.weights.items():
        assert_same(decoded[name], weight)
