"""Weights that lie on a grid are recognized as such, and no others; rounding them onto it again changes nothing."""

import pytest
import torch
from helpers.tiny_models import CONFIGS, tiny_model

from gptq_awq import quantize_model
from gptq_awq.grids.integer import IntGrid
from gptq_awq.models.on_grid import grid_of


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_no_grid_are_on_none(name):
    assert grid_of(tiny_model(name)) is None
    assert grid_of(tiny_model(name).to(torch.float16)) is None


@pytest.mark.parametrize(("bits", "size"), [(2, 32), (3, 64), (4, 32), (4, 64)])
def test_a_grid_is_told_by_its_bits_and_groups_and_rounding_again_is_exact(bits, size):
    model, grid = tiny_model("llama"), IntGrid(bits, size, scale_dtype="float32")
    quantize_model(model, None, "rtn", grid=grid)
    assert grid_of(model) == f"at most {2**bits} values in each group of {size} columns ({bits} bits)"
    before = {name: p.clone() for name, p in model.named_parameters()}
    quantize_model(model, None, "rtn", grid=grid)
    assert all(torch.allclose(p, before[name], rtol=1e-5, atol=1e-7) for name, p in model.named_parameters())
