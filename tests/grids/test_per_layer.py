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


def test_patterns_on_full_names_go_first_and_the_first_of_them_counts():
    overrides = {"model.layers.0.*": 8, "*.down_proj": {"bits": 6, "group_size": 16}, "re:.*[.]3[.].*up_proj": 2}
    grid = PerLayerGrid(bits=4, blocks={1: 3}, overrides=overrides)
    assert grid.at(place(0, "mlp.down_proj")).bits == 8
    assert grid.at(place(1, "mlp.down_proj")) == IntGrid(6, 16, False, "minmax", "float16")
    assert [grid.at(place(i, "mlp.up_proj")).bits for i in range(4)] == [8, 3, 4, 2]


def test_patterns_that_match_nothing_or_come_too_late_are_found():
    grid = PerLayerGrid(overrides={"*.down_proj": 6, "*.0.mlp.down_proj": 8, "*.dwon_proj": 8})
    wrong = grid.unmatched([place(i, "mlp.down_proj") for i in range(4)])
    assert wrong == ["grid.overrides.*.0.mlp.down_proj", "grid.overrides.*.dwon_proj"]


@pytest.mark.parametrize("overrides", [{"*": 9}, {"re:(": 4}, {"*": {"bitz": 4}}, {"*": {"group_size": 0}}])
def test_overrides_that_make_no_sense_are_refused_at_once(overrides):
    with pytest.raises(UserError):
        PerLayerGrid(overrides=overrides)
