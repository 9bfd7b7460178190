"""Bits by name and by block."""

import pytest

from gptq_awq.errors import UserError
from gptq_awq.grids.base import Place
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.per_layer import PerLayerGrid


def place(block, name, blocks=4):
    return Place(f"model.layers.{block}.{name}", 32, block, blocks)


def test_nothing_named_is_one_integer_grid():
    grid = PerLayerGrid(bits=3, group_size=32, sym=True, search="mse")
    assert grid.at(place(0, "mlp.down_proj")) == IntGrid(3, 32, True, "mse", "float16")
    assert grid.at(Place("model.embed_tokens", 32)) is None


def test_blocks_go_before_modules_and_modules_before_the_rest():
    grid = PerLayerGrid(bits=4, modules={"down_proj": 6}, blocks={"0": 8, "-1": 2})
    assert grid.at(place(1, "mlp.up_proj")).bits == 4
    assert grid.at(place(1, "mlp.down_proj")).bits == 6
    assert grid.at(place(0, "mlp.down_proj")).bits == 8
    assert grid.at(place(3, "mlp.down_proj")).bits == 2


def test_names_that_no_linear_has_are_found():
    grid = PerLayerGrid(modules={"down_proj": 6, "dwon_proj": 6}, blocks={9: 8, -4: 8})
    assert grid.unmatched([place(i, "mlp.down_proj") for i in range(4)]) == ["grid.modules.dwon_proj", "grid.blocks.9"]


@pytest.mark.parametrize("wrong", [{"modules": {"q_proj": 9}}, {"blocks": {0: 1}}, {"blocks": {"first": 4}}])
def test_what_makes_no_sense_is_refused_at_once(wrong):
    with pytest.raises(UserError):
        PerLayerGrid(**wrong)
