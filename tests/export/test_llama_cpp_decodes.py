"""llama.cpp's own C code decodes the blocks that we pack to the weights that were scored, bit for bit."""

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from gptq_awq.export.gguf import pack_weight
from gptq_awq.grids.mix import llama_grid
from gptq_awq.grids.scaled_float import ScaledFloatGrid
from gptq_awq.solvers.rtn import RTN

NAMES = [
    *(f"q{bits}_{kind}" for bits, kind in ((4, 0), (4, 1), (5, 0), (5, 1), (8, 0))),
    *(f"q{bits}_k" for bits in range(2, 7)),
    *(f"iq{kind}" for kind in ("4_nl", "4_xs", "3_s", "3_xxs", "2_s", "2_xs", "2_xxs")),
    *("tq1_0", "tq2_0", "mxfp4", "nvfp4"),
]


@pytest.fixture(scope="module")
def ggml():
    """The library that xllamacpp brings."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None:
        pytest.skip("engine xllamacpp is not installed (scripts/install_engine.py xllamacpp)")
    return ctypes.CDLL(str(next(Path(found.submodule_search_locations[0]).glob("xllamacpp*.so"))))


def function(name: str) -> str:
    """The name of a type's decoder in C: k-types are spelled q4_K there."""
    return "dequantize_row_" + (name[:-1] + "K" if name.endswith("_k") else name)


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_decodes_every_block_type_to_the_weights_that_were_scored(name, ggml):
    grid = llama_grid(name) if name != "nvfp4" else ScaledFloatGrid("e2m1", 16, scale="e4m3", tensor_scale=1.0)
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.01
    rounded = RTN().solve(weight, None, grid).quantized
    kind, blocks = pack_weight(rounded)
    assert kind == name.upper()
    found = np.empty((6, 512), np.float32)
    for row, packed in zip(found, np.ascontiguousarray(blocks).view(np.uint8), strict=True):
        getattr(ggml, function(name))(
            packed.ctypes.data_as(ctypes.c_void_p), row.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(512)
        )
    assert torch.equal(torch.from_numpy(found), rounded.dequantize())
