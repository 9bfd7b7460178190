"""Floating-point formats in checkpoints: each reader's own library finds the very codes and weights."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.quantized_weights import assert_decodes, assert_same, quantized, rounded_source, save_packed, specs
from helpers.tiny_models import tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from gptq_awq.errors import UserError
from gptq_awq.export import compressed_tensors, mlx
from gptq_awq.export.compressed_floats import float_format, pack_float
from gptq_awq.export.compressed_tensors import CompressedTensorsFormat, library_reads, quantization_config, stored_grid
from gptq_awq.export.mlx import MLXFormat
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.scaled_float import ScaledFloatGrid

LLAMA = LlamaConfig()
NVFP4 = ScaledFloatGrid()
MXFP4 = ScaledFloatGrid(group_size=32, scale="e8m0")
MXFP8 = ScaledFloatGrid("e4m3", 32, scale="e8m0")
FP8 = [ScaledFloatGrid("e4m3", size, rows, "float32") for size, rows in ((-1, 1), (-1, -1), (128, 128))]
GRIDS = {"nvfp4": NVFP4, "mxfp4": MXFP4, "mxfp8": MXFP8, "channel": FP8[0], "tensor": FP8[1], "block": FP8[2]}
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


@pytest.fixture(params=["library", "own"])
def reader(request, monkeypatch):
    """Decode with compressed-tensors, then with our own reader."""
    if request.param == "library" and not library_reads():
        pytest.skip("compressed-tensors 0.18 or newer is not installed")
    monkeypatch.setattr(compressed_tensors, "library_reads", lambda: request.param == "library")


@each_grid
@pytest.mark.parametrize("order", ["natural", "static_groups"])
def test_compressed_tensors_hold_the_codes_and_scales(grid, order, reader, tmp_path):
    weight = quantized(grid, order, rows=256, columns=256)
    config = quantization_config({"lin": stored_grid(weight.grid)}, "pack-quantized", [])
    save_packed(tmp_path, pack_float(weight), config)
    (decoded,) = CompressedTensorsFormat().decode(tmp_path)
    assert_same(decoded, weight)


@pytest.mark.parametrize("grid", [NVFP4, MXFP4, MXFP8, *FP8[:2]], ids=lambda grid: f"{grid.label}-{grid.rows}")
def test_a_model_is_what_transformers_loads(grid, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = tiny_model("llama")
    source = rounded_source(model, grid)
    dtype = "float32" if grid.scale == "float32" else "bfloat16"
    assert_decodes(CompressedTensorsFormat(dtype=dtype), source, tmp_path)
    # The library computes FP4's and MX's products in bfloat16, where they are exact.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    with torch.no_grad():
        loaded(torch.arange(1, 17)[None])  # which decompresses
    for name, weight in source.weights.items():
        assert torch.equal(loaded.get_submodule(name).weight.float(), weight.dequantize())


def test_activations_and_cache_are_in_the_config(tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig  # pyright: ignore[reportMissingImports]

    source = rounded_source(tiny_model("llama"), FP8[0])
    CompressedTensorsFormat(dtype="float32", activations="fp8", kv_cache="fp8").write(source, tmp_path)
    config = QuantizationConfig.model_validate(
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    )
    inputs = config.config_groups["group_0"].input_activations  # pyright: ignore
    assert (inputs.num_bits, inputs.dynamic, inputs.strategy) == (8, True, "token")  # pyright: ignore
    assert config.kv_cache_scheme.num_bits == 8  # pyright: ignore


@pytest.mark.parametrize("grid", [ScaledFloatGrid("e3m2", 32, scale="e8m0"), ScaledFloatGrid("e5m2", -1, 1, "float32")])
def test_formats_that_the_library_lacks_are_refused_before_calibration(grid):
    assert float_format(grid) is None
    with pytest.raises(UserError, match="has no format for grid="):
        CompressedTensorsFormat().check(specs(grid), LLAMA)


def test_integers_and_floats_are_not_mixed():
    linears = [*specs(NVFP4), *specs(IntGrid(4, 64))]
    with pytest.raises(UserError, match="no common layout"):
        CompressedTensorsFormat().check(linears, LLAMA)


@pytest.mark.parametrize("grid", [replace(NVFP4, tensor_scale=1.0), MXFP4, MXFP8], ids=lambda grid: grid.label)
@pytest.mark.parametrize("library", [True, False])
def test_mlx_decodes_the_codes_and_scales(grid, library, tmp_path, monkeypatch):
    if library:
        pytest.importorskip("mlx")
    monkeypatch.setattr(mlx, "_has_mlx", lambda: library)
    assert_decodes(MLXFormat(), rounded_source(tiny_model("llama"), grid), tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert (entry["mode"], entry["bits"], entry["group_size"]) == (grid.label, grid.bits, grid.group_size)


def test_a_scale_of_the_tensor_has_no_place_in_mlx():
    with pytest.raises(UserError, match=r"set grid\.tensor_scale=1"):
        MLXFormat().check(specs(NVFP4), LLAMA)
