"""Blocks that are alike: a conversion that is watched on a few of each kind is known on all of them."""

import numpy as np
import pytest
import torch
from helpers.tiny_models import GROUPED, ROUTED
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2Config

from gptq_awq.export import alike
from gptq_awq.export.alike import kinds_of_blocks, watched
from gptq_awq.export.gguf_converter import converter_root
from gptq_awq.export.gguf_layout import observe, skeleton
from gptq_awq.export.layout import numbered
from gptq_awq.export.mlx_layout import Conversion
from gptq_awq.models.unfuse import unfuse

DEEP = {"num_hidden_layers": 7}
CONFIGS = {
    "llama": lambda: LlamaConfig(**GROUPED | DEEP),
    "mixtral": lambda: MixtralConfig(**ROUTED | DEEP, num_local_experts=3),
    "qwen2": lambda: Qwen2Config(
        **GROUPED | DEEP, layer_types=["sliding_attention"] * 6 + ["full_attention"], sliding_window=8
    ),
}


def built(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().requires_grad_(False)
    unfuse(model)
    return model


def apart(model):
    """Every block as a kind of its own, so that all are watched."""
    return {block: [block] for blocks in kinds_of_blocks(model).values() for block in blocks}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("library", ["gguf", "mlx"])
def test_watching_a_few_blocks_tells_what_watching_all_of_them_does(name, library, monkeypatch, request):
    model = built(name)
    if library == "gguf":
        request.getfixturevalue("converter")
    else:
        pytest.importorskip("mlx_lm")

    def layout():
        if library == "mlx":
            return Conversion.of(model)._observed()
        with skeleton(model, None) as folder:
            return observe(converter_root(None), folder, model)

    monkeypatch.setattr("gptq_awq.export.gguf_layout.kept_layout", lambda _name, see: see())
    few = layout()
    monkeypatch.setattr(alike, "kinds_of_blocks", apart)
    every = layout()
    assert few.runs.keys() == every.runs.keys()
    for tensor, runs in every.runs.items():
        np.testing.assert_array_equal(few.runs[tensor].starts, runs.starts)
        np.testing.assert_array_equal(few.runs[tensor].lengths, runs.lengths)


def test_blocks_of_which_a_config_says_something_else_are_of_another_kind():
    assert list(kinds_of_blocks(built("llama")).values()) == [list("0123456")]
    assert list(kinds_of_blocks(built("qwen2")).values()) == [list("012345"), ["6"]]


@pytest.mark.parametrize(("reversed_in", "seen"), [("", "036"), ("6", "0361245"), ("0", "0361245")])
def test_all_are_watched_where_those_of_a_kind_went_different_ways(reversed_in, seen):
    model, asked = built("llama"), []
    numbering, _ = numbered(model)

    def block_of(name):
        return name.split(".")[2] if ".layers." in name else None

    def watch(blocks):
        asked.extend(block for block in blocks if block is not None)
        found = {}
        for name, shape in numbering.shapes.items():
            if block_of(name) in blocks:
                numbers = np.arange(np.prod(shape)) + numbering.first[name]
                if block_of(name) == reversed_in:
                    numbers = numbers[::-1]
                starts = numbers if block_of(name) == reversed_in else numbers[:1]
                found[name] = alike.Runs(starts, np.full(len(starts), len(numbers) // len(starts)))
        return found

    runs = watched(model, numbering, block_of, watch)
    assert "".join(asked) == seen
    assert runs.keys() == numbering.shapes.keys()
    for name in numbering.shapes:
        assert runs[name].lengths.sum() == np.prod(numbering.shapes[name])
        assert runs[name].starts[0] == numbering.first[name] or block_of(name) == reversed_in
