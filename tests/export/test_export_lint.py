"""Warnings: what engines refuse, and how many devices can share a model."""

from dataclasses import replace

import pytest
from helpers.quantized_weights import int_grid, specs
from transformers import LlamaConfig

from gptq_awq.export.lint import lint, tensor_parallel
from gptq_awq.grids.ternary import TernaryGrid

CONFIG = LlamaConfig(hidden_size=256, num_attention_heads=8, num_key_value_heads=2, intermediate_size=768)
SHAPES = {
    "model.layers.0.self_attn.q_proj": (256, 256),
    "model.layers.0.self_attn.k_proj": (64, 256),
    "model.layers.0.self_attn.o_proj": (256, 256),
    "model.layers.0.mlp.up_proj": (768, 256),
    "model.layers.0.mlp.down_proj": (256, 768),
}


def said(grid, natural_order=True, **options):
    return "\n".join(lint(specs(grid, natural_order, **SHAPES), CONFIG, **options))


def test_nothing_but_devices_is_said_of_what_every_engine_takes():
    assert said(int_grid(4, 32, sym=True)) == "tensor parallel: 1, 2, 4, 8 devices fit"


@pytest.mark.parametrize(
    ("grid", "natural_order", "line"),
    [
        (int_grid(4, 32), True, "gptq: vLLM refuses sym=false"),
        (int_grid(3, 32, sym=True), True, "gptq: vLLM refuses 3 bits"),
        (int_grid(3, 32, sym=True), True, "compressed_tensors: libraries before"),
        (int_grid(8, 32, sym=True), True, "compressed_tensors: vLLM takes 8 bits on a GPU"),
        (int_grid(4, 32, sym=True), False, "gptq: vLLM refuses act_order"),
        (int_grid(4, 16, sym=True), True, "gptq: vLLM refuses group_size=16"),
        (int_grid(4, 160, sym=True), True, "gptq: vLLM refuses a last group shorter"),
        (int_grid(4, 256, sym=True), True, "awq: GPTQModel, and so transformers, refuses group_size=256"),
    ],
)
def test_what_an_engine_refuses_is_said(grid, natural_order, line):
    assert line in said(grid, natural_order)


def test_of_several_widths_each_is_spoken_of_once_and_what_vllm_fuses_is():
    linears = [*specs(int_grid(3, 32), **SHAPES), *specs(int_grid(3, 64), other=(64, 64))]
    lines = [line for line in lint(linears, CONFIG) if line.startswith("compressed_tensors")]
    assert len([line for line in lines if "3 bits on a GPU" in line]) == 1
    assert any("sym=true only" in line for line in lines)
    assert not any("tie=site" in line for line in lines), "q and k are alike"


@pytest.mark.parametrize("pair", [("self_attn.q_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")])
def test_linears_that_vllm_joins_are_to_be_alike(pair):
    mixed = [
        specs(int_grid(bits, 32), **{f"model.layers.0.{name}": (64, 256)})
        for bits, name in zip((3, 4), pair, strict=True)
    ]
    alike = [
        specs(int_grid(bits, 32), **{f"model.layers.{bits}.{name}": (64, 256)}) for bits in (3, 4) for name in pair
    ]
    for linears, told in ((mixed, True), (alike, False)):
        assert any("tie=site" in line for line in lint([x for each in linears for x in each], CONFIG)) == told


def test_vllm_runs_packed_experts_on_a_gpu_only():
    line = "gptq: vLLM runs packed experts on a GPU only"
    (linear,) = specs(int_grid(sym=True))
    assert line in lint([replace(linear, expert=True)], CONFIG, ["gptq"])
    assert line not in lint([linear], CONFIG, ["gptq"])


def test_mlx_says_that_an_asymmetric_grid_takes_float32():
    assert "float32" in said(int_grid(4, 32), formats=("mlx",))
    assert said(int_grid(4, 32, sym=True), formats=("mlx",)) == ""


def test_only_formats_that_are_asked_for_are_spoken_of():
    assert "gptq" not in said(int_grid(4, 32), formats=("awq", "gguf"))
    assert said(int_grid(4, 32), formats=("gguf",)) == ""
    assert lint(specs(TernaryGrid(), **SHAPES), CONFIG) == []


@pytest.mark.parametrize(
    ("grid", "line"),
    [
        (
            int_grid(4, 64),
            r"tensor parallel: 1, 2, 4 devices fit; 8 won't (model.layers.0.self_attn.o_proj: 256 columns "
            r"in 8 parts are no whole groups of 64)",
        ),
        (int_grid(4, -1), "tensor parallel: 1, 2, 4, 8 devices fit"),
    ],
)
def test_groups_are_not_split_between_devices(grid, line):
    assert tensor_parallel(specs(grid, **SHAPES), CONFIG) == line


def test_heads_are_not_split_between_devices():
    config = LlamaConfig(hidden_size=384, num_attention_heads=6, num_key_value_heads=6)
    assert "4 won't (6 heads); 8 won't (6 heads)" in tensor_parallel(specs(int_grid(4, 16), **SHAPES), config)
