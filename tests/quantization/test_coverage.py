"""Coverage: the share of weights that a run rounds, and what it leaves and why, adds up to the model's matrices."""

import logging

import pytest
import torch
from helpers.mixtures import GRID
from helpers.tiny_models import CONFIGS, MIXTURES, tiny_model
from torch import nn

from gptq_awq import quantize_model
from gptq_awq.api import load_method
from gptq_awq.grids.mix import LlamaMix
from gptq_awq.models.expert_layouts import fused_parameters
from gptq_awq.models.unfuse import unfuse
from gptq_awq.quantization.coverage import coverage_of
from gptq_awq.quantization.quantize import examine
from gptq_awq.quantization.targets import assign_grids


def covered(model, grid=GRID):
    return coverage_of(model, assign_grids(model, grid))


@pytest.mark.parametrize("name", [*CONFIGS, *MIXTURES])
def test_what_is_rounded_and_what_is_left_are_all_matrices_of_the_model(name):
    model = tiny_model(name)
    unfuse(model)
    found = covered(model)
    assert found.rounded + sum(x.weights for x in found.left) == sum(
        p.numel() for p in model.parameters() if p.dim() > 1
    )
    assert found.rounded + sum(x.weights for x in found.left if x.counted) == found.weights


@pytest.mark.parametrize("name", [*CONFIGS, *MIXTURES])
def test_what_is_said_to_be_rounded_is_what_changes(name):
    model, before = tiny_model(name), tiny_model(name)
    unfuse(model)
    unfuse(before)
    said = examine(model, None, load_method("rtn")[0], GRID)
    result = quantize_model(model, None, "rtn", grid=GRID)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert sorted(changed) == sorted(f"{name}.weight" for name in result.weights)
    assert said.rounded == sum(before.get_parameter(n).numel() for n in changed)


def test_of_an_ordinary_model_all_is_rounded_but_the_embedding_and_the_head():
    found = covered(tiny_model("llama"))
    assert found.share == 1.0
    assert str(found).startswith(f"100.0% of {found.weights:,} weights in the layers will be rounded; left: ")
    assert {(x.kind, x.weights, x.counted) for x in found.left} == {
        ("embeddings", 64 * 64, False),
        ("output head", 64 * 64, False),
    }


def test_a_share_below_all_is_never_told_as_all():
    model = tiny_model("mixtral")
    unfuse(model)
    found = covered(model)
    assert 0.99 < found.share < 1
    assert "100.0%" not in str(found)
    assert ("MixtralTopKRouter.weight", "routers stay in full precision", 2) in {
        (x.kind, x.why, x.tensors) for x in found.left
    }


def test_a_mix_that_rounds_the_embedding_leaves_none():
    found = covered(tiny_model("gemma3"), LlamaMix("q8_0"))
    assert not [x for x in found.left if x.kind == "embeddings"]


def test_experts_that_no_one_rounds_are_named_with_their_size(caplog):
    model = tiny_model("mixtral")  # as where no product showed which parameters are experts
    fused = sum(p.numel() for p in fused_parameters(model).values())
    found = covered(model)
    left = [x for x in found.left if "Experts" in x.kind]
    assert sum(x.weights for x in left) == fused
    assert {x.why for x in left} == {"no linear layer"}
    assert found.share < 1 - fused / found.weights
    with caplog.at_level(logging.WARNING, "gptq_awq"):
        found.tell()
    assert caplog.messages == [str(found)]


def test_linears_beside_the_blocks_are_named():
    model = tiny_model("llama")
    model.model.extra = nn.ModuleList([nn.Linear(64, 64)])
    found = covered(model)
    assert [(x.kind, x.why, x.weights) for x in found.left if x.counted] == [
        ("Linear.weight", "outside of the blocks, model.layers", 64 * 64)
    ]


def test_a_method_without_a_grid_has_no_coverage():
    assert examine(tiny_model("llama"), None, load_method("fp")[0], GRID) is None
