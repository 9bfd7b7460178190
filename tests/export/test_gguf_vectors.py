"""ggml's newer blocks: the gguf library decodes the very weights, and codes come back."""

import re
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from helpers.paths import CONFIGS
from helpers.quantized_weights import quantized
from helpers.tiny_models import tiny_model, tiny_tokens

from gptq_awq.allocation.allocate import allocate, sizes_and_budget
from gptq_awq.api import quantize_model
from gptq_awq.calibration.block_inputs import Settings
from gptq_awq.data.tokens import make_token_set
from gptq_awq.errors import UserError
from gptq_awq.export.base import Source
from gptq_awq.export.gguf import GGUFFormat, ggml_type, pack_weight
from gptq_awq.export.gguf_blocks import BLOCK_TYPES, pack, unpack_codes
from gptq_awq.export.gguf_size import gguf_bytes_beside
from gptq_awq.grids.gguf import GGUFGrid
from gptq_awq.grids.kquant import KGrid
from gptq_awq.grids.mix import llama_grid
from gptq_awq.grids.scaled_float import ScaledFloatGrid
from gptq_awq.grids.vectors import VECTOR_TYPES
from gptq_awq.quantization.method import Method
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN

NEW = ("iq4_xs", "mxfp4", "nvfp4", *VECTOR_TYPES)
TYPES = ("iq4_nl", "q5_0", "q8_0", "mxfp4")


def grid_of(kind):
    return ScaledFloatGrid(tensor_scale=1.0) if kind == "nvfp4" else llama_grid(kind, "mse")


@pytest.mark.parametrize("order", ["natural", "static_groups"])
@pytest.mark.parametrize("kind", NEW)
def test_gguf_decodes_the_weights_and_codes_come_back(kind, order):
    weight = quantized(grid_of(kind), order, rows=12, columns=512)
    name, data = pack_weight(weight)
    assert name == kind.upper()
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    assert np.array_equal(theirs, weight.dequantize().numpy())
    assert np.array_equal(unpack_codes(name, data), weight.codes.numpy())
    assert 8 * data.size / weight.codes.numel() == weight.bits_per_weight
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (BLOCK_TYPES[name].block, BLOCK_TYPES[name].size)


def test_codes_that_no_entry_has_are_refused():
    weight = quantized(llama_grid("iq2_xxs", "mse"), rows=4, columns=256)
    codes = weight.codes.clone()
    codes[0, 0] = (codes[0, 0] + 3) % 6  # another sign
    with pytest.raises(ValueError, match="odd number of negative signs"):
        pack("IQ2_XXS", codes, weight.scales, None, weight.store)
    weight = quantized(llama_grid("iq3_s", "mse"), rows=4, columns=256)
    with pytest.raises(ValueError, match="no entry of its codebook"):
        pack("IQ3_S", torch.full_like(weight.codes, 7), weight.scales, None, weight.store)


def test_nvfp4_with_a_scale_of_the_tensor_has_no_type():
    assert ggml_type(ScaledFloatGrid()) is None
    assert ggml_type(ScaledFloatGrid(tensor_scale=1.0)) == "NVFP4"


def tokens():
    return make_token_set("tiny", tiny_tokens(2), None, "test")


def allocated(budget, beside=0, **options):
    options = {"types": TYPES, "rounding": "rtn", "sensitivity": "error"} | options
    settings = Settings(compute_dtype="float32", tokens_per_batch=64)
    grid = GGUFGrid(budget, **options)
    return allocate(tiny_model("llama"), tokens(), Method("gptq", GPTQ()), grid, settings, beside=beside)


@pytest.mark.usefixtures("converter")
def test_a_file_of_a_given_size_is_met_from_below(tmp_path):
    model = tiny_model("llama")
    names = [*allocated(8.5).chosen]
    assert {"model.embed_tokens", "lm_head"} <= set(names)
    beside, budget = gguf_bytes_beside(model, None, names), 65_000
    grid = allocated(f"{budget / 1e6}MB", beside).grid
    assert len(set(grid.allocated.values())) > 1
    weights = quantize_model(model, None, "rtn", grid=grid).weights
    assert {name: pack_weight(weight)[0].lower() for name, weight in weights.items()} == grid.allocated
    GGUFFormat().write(Source(model, None, "model", weights), tmp_path)
    size = (tmp_path / "model.gguf").stat().st_size
    assert budget - 4000 < size <= budget
    read = {decoded.name: decoded.weight for decoded in GGUFFormat().decode(tmp_path)}
    for name, weight in weights.items():
        assert torch.equal(read[name], weight.dequantize())


def test_other_budgets_are_met():
    assert allocated(5.0).bits_per_weight <= 5.0
    like = allocated("q5_0")
    assert allocated(4.25).bits_per_weight < like.bits_per_weight <= 8.5
    assert allocated(8.5).chosen == dict.fromkeys(like.chosen, "q8_0")
    assert allocated(5.0, sensitivity="fisher").predicted > 0


def test_a_budget_that_is_too_small_is_refused_before_calibration_with_the_least_that_is_met():
    model, method = tiny_model("llama"), Method("rtn", RTN())
    with pytest.raises(
        UserError, match=r"budget=0\.05MB: the smallest of grid\.types take .*MB, all else included"
    ) as e:
        sizes_and_budget(model, method, GGUFGrid("0.05MB", TYPES), beside=10_000)
    least, bits = str(e.value).split("take ")[1].split(",")[0], str(e.value).split("(")[1].split(" ")[0]
    for budget in (least, bits):
        sizes_and_budget(model, method, GGUFGrid(budget, TYPES), beside=10_000)


@pytest.mark.parametrize("budget", ["90 apples", "q9_k", "MB"])
def test_what_is_no_budget_is_refused(budget):
    with pytest.raises(UserError, match="budget="):
        GGUFGrid(budget)


def test_types_that_divide_no_width_are_refused_by_name():
    with pytest.raises(UserError, match=r"none divides the 64 columns of model\.layers\.0"):
        quantize_model(tiny_model("llama"), None, "rtn", grid=replace(GGUFGrid(), types=("q4_k",)))
    with pytest.raises(UserError, match=r"none divides the 64 columns of model\.layers\.0"):
        sizes_and_budget(tiny_model("llama"), Method("rtn", RTN()), GGUFGrid("9MB", ("q4_k", "q6_k")))


def test_where_a_block_of_256_does_not_fit_what_is_named_instead_is_a_grid():
    for kind in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"):
        with pytest.raises(UserError, match="not a multiple of 256") as e:
            KGrid(kind).check_columns(64, "it")
        for name in re.findall(r"grid=(\w+)", str(e.value))[1:]:
            assert (CONFIGS / f"grid/{name}.yaml").is_file(), name
